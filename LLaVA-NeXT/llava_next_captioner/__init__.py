"""Visual descriptions of medical images with LLaVA-NeXT: engines, prompts, checks and shortening."""

from typing import Any

from llava_next_captioner.engines import Answer, CaptionerError, Chunk, Engine, Request
from llava_next_captioner.openai_engine import OpenAIEngine

__all__ = ["Answer", "CaptionerError", "Chunk", "Engine", "OpenAIEngine", "Request"]


def __getattr__(name: str) -> Any:
    """`TransformersEngine` when it is asked for: importing torch and transformers takes seconds."""
    if name != "TransformersEngine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from llava_next_captioner.transformers_engine import TransformersEngine

    return TransformersEngine

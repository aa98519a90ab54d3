"""What an engine is: requests go in, a chunk that can be sampled again and again comes out."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image


class CaptionerError(ValueError):
    """Something the user can put right; its message is one line: what is wrong, where, what to do."""


@dataclass(frozen=True)
class Request:
    """One image to describe: `image` is RGB, `prefix` a beginning that the answer is forced to have.

    `name` is the image's stable identity, such as its file name: it names the random stream of its samples.
    """

    name: str
    image: Image
    prompt: str
    prefix: str = ""


@dataclass(frozen=True)
class Answer:
    """A sampled description without special tokens, its prefix included, stripped.

    `tokens` were newly generated; `finished` is False where `max_new_tokens` or the server cut it off.
    """

    text: str
    tokens: int
    finished: bool


class Chunk(Protocol):
    """Requests that were taken up together."""

    def sample(self, picks: Sequence[tuple[int, int]]) -> list[Answer]:
        """One answer for each pick (index of a request, attempt); an attempt's noise is its own."""
        ...


class Engine(Protocol):
    """A model that describes images; `prepare` may run in another thread, ahead of the chunk being sampled."""

    model: str

    def prepare(self, requests: Sequence[Request]) -> Chunk: ...


def stream_seed(seed: int, name: str, attempt: int) -> int:
    """The seed of one attempt's random stream, in [0, 2**63): no other attempt, image or seed moves it."""
    digest = hashlib.sha256(f"{seed}/{attempt}/{name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1

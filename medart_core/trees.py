"""Trees of tensors on disk: nested dicts and lists as one safetensors file beside a JSON skeleton."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file


def save_tree(path: Path, tree: Any) -> None:
    """Write `<path>.safetensors` and `<path>.json`; the tree holds dicts, lists, tuples, tensors and JSON scalars."""
    tensors: dict[str, torch.Tensor] = {}

    def skeleton(node: Any) -> Any:
        if isinstance(node, torch.Tensor):
            tensors[str(len(tensors))] = node.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {"tensor": str(len(tensors) - 1)}
        if isinstance(node, Mapping):  # as pairs: JSON would turn the optimiser's integer keys into strings
            return {"dict": [[key, skeleton(value)] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            return {type(node).__name__: [skeleton(value) for value in node]}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise TypeError(f"cannot save a {type(node).__name__} in a checkpoint")

    text = json.dumps(skeleton(tree))
    save_file(tensors, path.with_suffix(".safetensors"))
    path.with_suffix(".json").write_text(text)


def load_tree(path: Path) -> Any:
    """Read back what `save_tree` wrote, bit for bit, on the CPU."""
    tensors = load_file(path.with_suffix(".safetensors"))

    def grow(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        [(kind, content)] = node.items()
        if kind == "tensor":
            return tensors[content]
        if kind == "dict":
            return {key: grow(value) for key, value in content}
        return (tuple if kind == "tuple" else list)(grow(value) for value in content)

    return grow(json.loads(path.with_suffix(".json").read_text()))

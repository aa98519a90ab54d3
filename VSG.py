"""Visual Symptom Generator: LLaVA-NeXT describes every image of a set, so that medart.py learns from what is seen.

    python VSG.py                                   the prepared set that is there, with the bundled captioner
    python VSG.py --data-dir dataset/kvasir/train --model llava-hf/llama3-llava-next-8b-hf
    python VSG.py --data-dir dataset/kvasir --engine openai --base-url http://localhost:8000/v1 --model NAME
    torchrun --nproc_per_node=2 VSG.py ...          whole chunks are shared out; the captions are the same

Reads raw.csv (file_name,text[,label]), writes metadata.csv, which medart.py reads, and captions.jsonl: each attempt at
each image, and why it was rejected. Killed at any moment, the same command goes on. Exit codes: 0; 2 for a mistake that
is told in one line; 3 when more than --max-fallback of the images had to keep their simple caption; 143 and 130 after
SIGTERM and Ctrl-C.
"""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_next_captioner import checks, prompts
from llava_next_captioner.engines import Answer, CaptionerError, Chunk, Engine, Request
from llava_next_captioner.shortening import T5Shortener, drop_sentences
from medart_core import captioning, checkpoint, devices, journal, stopping, text, training_data
from medart_core.captioning import ACCEPTED, FALLEN_BACK, SHORTENED, Described, Split
from medart_core.errors import UserError, exit_codes
from medart_core.options import parse
from medart_core.vsg_options import VSGOptions

ROOT = Path(__file__).resolve().parent
KVASIR = "dataset/kvasir/train"
PUBLISHED = "lmms-lab/llama3-llava-next-8b"  # the paper's name of FULL_SIZE, in a format that transformers cannot load
SAFE = "what captions.jsonl holds is safe"


@dataclass(frozen=True)
class Rules:
    """What is asked of the captions of one split."""

    opts: VSGOptions
    labels: dict[str, str]  # by file name
    template: str | None
    count_tokens: Callable[[str], int]
    shorten: Callable[[str, Callable[[str], bool]], str | None]

    def features(self, caption: str) -> Sequence[str]:
        if self.opts.features:
            return [feature.strip() for feature in self.opts.features.split(";") if feature.strip()]
        return prompts.DOMAINS[domain_of(caption, self.opts)].features

    def request(self, image: Described) -> Request:
        """What the engine is asked for one image."""
        caption = image.row.caption
        domain = domain_of(caption, self.opts)
        prompt = prompts.build(domain, caption, image.label, self.features(caption), self.template)
        assert not isinstance(image.image, str)
        return Request(image.row.file_name, image.image, prompt, caption if self.opts.force_prefix else "")

    def failed(self, said: str, image: Described, finished: bool = True) -> list[str]:
        """The names of the checks that a description does not pass."""
        caption = image.row.caption
        return checks.check(
            said,
            finished=finished,
            simple_caption=caption,
            label=image.label,
            labels=sorted(set(self.labels.values())),
            features=self.features(caption),
            count_tokens=self.count_tokens,
            max_words=self.opts.max_words,
            max_tokens=self.opts.max_tokens,
        )


# --- The work on one chunk ---


def judge(images: Sequence[Described], picks: Sequence[tuple[int, int]], answers: Sequence[Answer], rules: Rules):
    """Note each attempt with the checks it failed; an image's first one that failed none is its caption."""
    for (index, attempt), answer in zip(picks, answers, strict=True):
        image, said = images[index], captioning.clean_text(answer.text)
        failed = rules.failed(said, image, answer.finished)
        facts = {"attempt": attempt, "text": said, "tokens": answer.tokens, "finished": answer.finished}
        image.attempts.append(facts | {"failed": failed})
        if not failed and image.text is None:
            image.settle(ACCEPTED, said)


def shorten(image: Described, rules: Rules) -> None:
    """Settle on the first attempt that was only too long, if it can be shortened."""
    for attempt in image.attempts:
        # What was cut off in the middle of a sentence is too long, and nothing else.
        mendable = checks.ONLY_LENGTH | (set() if attempt["finished"] else {"unfinished"})
        if image.text is None and set(attempt["failed"]) <= mendable:
            shorter = rules.shorten(attempt["text"], lambda said: not rules.failed(said, image))
            if shorter is not None:
                image.settle(SHORTENED, shorter)


def describe(images: Sequence[Described], chunk: Chunk, rules: Rules) -> None:
    """Settle on a caption for every image of a chunk, from one prefill of the model."""
    # 1. One attempt at each image, all of them together.
    picks = [(index, 0) for index in range(len(images))]
    judge(images, picks, chunk.sample(picks), rules)

    # 2. The remaining attempts at those that were rejected.
    rejected = [index for index, image in enumerate(images) if image.text is None]
    picks = [(index, attempt) for index in rejected for attempt in range(1, rules.opts.attempts)]
    judge(images, picks, chunk.sample(picks), rules)

    for image in (images[index] for index in rejected):
        # 3. What is only too long is shortened.
        shorten(image, rules)
        # 4. The simple caption is always right.
        if image.text is None:
            image.settle(FALLEN_BACK, image.row.caption)


# --- The work on all of them ---


@dataclass(frozen=True)
class Work:
    """A split, its journal, and what is asked of its captions."""

    split: Split
    journal: Journal
    rules: Rules

    def pending(self) -> list[int]:
        """The chunks that are to be described yet."""
        return [n for n in self.split.wanted(self.rules.opts.max_images) if n not in self.journal.items]


def take_up(work: Work, number: int, engine: Engine, decoders: ThreadPoolExecutor) -> tuple[list[Described], Any]:
    """Decode the images of a chunk, and make the engine ready for those that can be read."""
    rows = work.split.chunks[number]
    images = decoders.map(captioning.open_or_fault, [work.split.folder / row.file_name for row in rows])
    described = [Described(row, work.rules.labels[row.file_name], image) for row, image in zip(rows, images, strict=True)]
    return described, engine.prepare([work.rules.request(image) for image in described if image.readable])


def run(jobs: Sequence[tuple[Work, int]], engine: Engine, opts: VSGOptions, rank: int) -> stopping.StopSignal:
    """Describe chunk after chunk, each of them in the journal before the next, until a signal comes."""
    total = sum(len(work.split.chunks[number]) for work, number in jobs)
    attempts = rejected = 0
    with (
        stopping.StopSignal(say=rank == 0) as stop,
        ThreadPoolExecutor(opts.workers, "decoder") as decoders,
        tqdm(total=total, desc="VSG", unit=" images", disable=rank > 0) as bar,
    ):
        for (work, number), (images, chunk) in captioning.in_advance(
            lambda job: take_up(*job, engine, decoders), jobs
        ):
            started = time.perf_counter()
            readable = [image for image in images if image.readable]
            if readable:
                describe(readable, chunk, work.rules)
            seconds = round((time.perf_counter() - started) / len(images), 4)
            facts = {"seed": opts.seed, "model": engine.model, "seconds": seconds}
            work.journal.append([image.item(number, **facts) for image in images], rank)

            for image in images:
                attempts += len(image.attempts)
                rejected += sum(bool(attempt["failed"]) for attempt in image.attempts)
                if not image.readable:
                    bar.write(f"left out: {image.image}", file=sys.stderr)
            bar.set_postfix({"rejected": f"{rejected / max(attempts, 1):.0%}"}, refresh=False)
            bar.update(len(images))
            if stop.requested:
                break
    return stop


def begin(opts: VSGOptions, rank: int) -> tuple[list[Work], str, torch.device, torch.dtype]:
    """Find all that would stop the work later, before any model loads; take the folders, and read what is done."""
    data_dir = opts.data_dir or (KVASIR if (ROOT / KVASIR / captioning.SIMPLE_CAPTIONS).is_file() else None)
    folder = Path(training_data.locate(data_dir))
    splits = captioning.read_splits(folder, opts.batch_size)
    template = read_template(opts.prompt_file)
    captions = sorted({row.caption for split in splits for row in split.rows})
    domains = {opts.domain or prompts.domain_of(caption): caption for caption in reversed(captions)}
    for domain, caption in domains.items():
        prompts.build(domain, caption, "", opts.feature_list(), template)  # or says what is missing
    model = opts.model or opts.random_weights or ""
    if opts.engine == "transformers" and not opts.random_weights:
        asked = captioners.FULL_SIZE if opts.model == PUBLISHED else opts.model
        model = captioners.choose(asked, domains, str(folder))
    device = devices.pick_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    dtype = pick_dtype(opts.dtype, device)

    tokenizer = text.load_tokenizer(training_data.locate(opts.tokenizer or "nano/pixart"))
    shorten = drop_sentences if opts.shortener == "sentences" else T5Shortener(opts.shortener, str(device))
    works = []
    for split in splits:
        settings = opts.of_the_captions() | {"model": model, "dtype": str(dtype), "rows": split.digest()}
        settings["prompt_file"] = template and hashlib.sha256(template.encode()).hexdigest()[:12]
        path = split.folder / captioning.JOURNAL
        if rank == 0:
            checkpoint.take(split.folder, "describes images", "wait for it")
            made = journal.begin(path, split.names, settings, split.wanted(opts.max_images), opts.overwrite)
        else:
            made = Journal.read(path, split.names)
        known = prompts.labels_from_captions(row.caption for row in split.rows)
        labels = {row.file_name: row.label or known[row.caption] for row in split.rows}
        count = lambda said: text.count_tokens(tokenizer, [said])[0]  # noqa: E731
        works.append(Work(split, made, Rules(opts, labels, template, count, shorten)))
    return works, model, device, dtype

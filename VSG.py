"""Visual Symptom Generator: LLaVA-NeXT describes every image of a set, for medart.py to learn from.

    python VSG.py                                   the prepared set that is there, with the bundled captioner
    python VSG.py --data-dir dataset/kvasir/train --model llava-hf/llama3-llava-next-8b-hf
    python VSG.py --data-dir dataset/kvasir --engine openai --base-url http://localhost:8000/v1 --model NAME
    torchrun --nproc_per_node=2 VSG.py ...          shares whole chunks out: the same captions in less time

Reads raw.csv (file_name,text[,label]); writes metadata.csv, which medart.py reads, and captions.jsonl: all attempts at
every image, and why they were rejected. After a kill at any moment the same command goes on. Exit codes: 0; 2 for a
mistake, told in one line; 3 when more than --max-fallback of the images kept their simple caption; 143, 130 by signal.
"""

from medart_core.errors import UserError, exit_codes  # isort: skip (first, for a Ctrl-C while the rest loads)
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from llava_next_captioner import checks, engines, prompts, shortening
from medart_core import caption_report, captioners, captioning, checkpoint, devices, stopping, text, training_data
from medart_core.captioning import Described, Split
from medart_core.journal import Journal
from medart_core.options import parse
from medart_core.vsg_options import VSGOptions

ROOT = Path(__file__).resolve().parent
KVASIR = "dataset/kvasir/train"
SAFE = "what captions.jsonl holds is safe"


@dataclass(frozen=True)
class Work:
    """A split, its journal, and what is asked of its captions."""

    split: Split
    journal: Journal
    labels: dict[str, str]  # by file name
    classes: Sequence[str]
    opts: VSGOptions
    template: str | None
    tokenizer: Any
    shorten: Callable[[str, Callable[[str], bool]], str | None]

    def pending(self) -> list[int]:
        """The chunks that are to be described yet."""
        return [n for n in self.split.wanted(self.opts.max_images) if n not in self.journal.items]

    def features(self, caption: str) -> Sequence[str]:
        """What to look for in an image of this simple caption."""
        domain = self.opts.domain or prompts.domain_of(caption)
        return self.opts.feature_list() or prompts.DOMAINS[str(domain)].features

    def request(self, image: Described) -> engines.Request:
        """What the engine is asked for one image."""
        caption, label = image.row.caption, image.label
        prompt = prompts.build(None, caption, label, self.features(caption), self.template)
        assert not isinstance(image.image, str)
        return engines.Request(image.row.file_name, image.image, prompt, caption if self.opts.force_prefix else "")

    def failed(self, said: str, image: Described, finished: bool = True) -> list[str]:
        """The names of the checks that a description does not pass."""
        return checks.check(
            said,
            finished=finished,
            simple_caption=image.row.caption,
            label=image.label,
            labels=self.classes,
            features=self.features(image.row.caption),
            count_tokens=lambda said: text.count_tokens(self.tokenizer, [said])[0],
            max_words=self.opts.max_words,
            max_tokens=self.opts.max_tokens,
        )


# --- One chunk ---


def take_up(work: Work, number: int, engine: engines.Engine, decoders: ThreadPoolExecutor):
    """The images of a chunk, decoded, and the engine's chunk of those that can be read."""
    rows = work.split.chunks[number]
    decoded = decoders.map(captioning.open_or_fault, [work.split.folder / row.file_name for row in rows])
    images = [Described(row, work.labels[row.file_name], image) for row, image in zip(rows, decoded, strict=True)]
    return images, engine.prepare([work.request(image) for image in images if image.readable])


def attempt(work: Work, images: Sequence[Described], chunk: engines.Chunk, picks: list[tuple[int, int]]) -> None:
    """Draw descriptions, (image, attempt) each, and note the checks they fail; one that fails none is taken."""
    for (index, number), answer in zip(picks, chunk.sample(picks), strict=True):
        image, said = images[index], captioning.clean_text(answer.text)
        failed = work.failed(said, image, answer.finished)
        facts = {"attempt": number, "text": said, "tokens": answer.tokens, "finished": answer.finished}
        image.attempts.append({**facts, "failed": failed})
        if not failed:
            image.settle(captioning.ACCEPTED, said)


def shorten(work: Work, image: Described) -> None:
    """Take the first attempt that was only too long, if it can be shortened."""
    for tried in image.attempts:
        # What was cut off in the middle of a sentence is too long, too.
        mendable = checks.ONLY_LENGTH if tried["finished"] else checks.ONLY_LENGTH | {"unfinished"}
        if image.text is None and set(tried["failed"]) <= mendable:
            shorter = work.shorten(tried["text"], lambda said: not work.failed(said, image))
            if shorter is not None:
                image.settle(captioning.SHORTENED, shorter)


def describe(work: Work, images: Sequence[Described], chunk: engines.Chunk) -> None:
    """A caption for every image of a chunk, all of it from one prefill of the model."""
    # 1. Attempt after attempt at those that have no good one yet: none is drawn, or paid for, in vain.
    for number in range(work.opts.attempts):
        attempt(work, images, chunk, [(index, number) for index, image in enumerate(images) if image.text is None])

    for image in images:
        # 2. A description that is only too long is shortened.
        shorten(work, image)
        # 3. The simple caption is never wrong.
        if image.text is None:
            image.settle(captioning.FALLEN_BACK, image.row.caption)


# --- All of them ---


def begin(opts: VSGOptions, dtype: torch.dtype, device: torch.device, owner: bool) -> tuple[str, list[Work]]:
    """Meet every mistake before a model loads; then the model's name, and the splits with what is done of them."""
    data_dir = opts.data_dir or (KVASIR if (ROOT / KVASIR / captioning.SIMPLE_CAPTIONS).is_file() else None)
    splits = captioning.read_splits(Path(training_data.locate(data_dir)), opts.batch_size)
    template = opts.read_template()
    examples = {}
    for caption in {row.caption: None for split in splits for row in split.rows}:
        named = prompts.domain_of(caption) or opts.domain  # no --domain makes an endoscopy one that a card knows
        if named not in examples:
            try:
                prompts.build(opts.domain or named, caption, "", opts.feature_list(), template)
            except ValueError as error:
                raise UserError(f"{caption!r}: {error}; see --domain, --features and --prompt-file") from error
            examples[named] = caption
    model = opts.model or opts.random_weights
    if opts.engine == "transformers" and not opts.random_weights:
        model = captioners.choose(opts.model, examples, data_dir or training_data.DEFAULT_DATA)
    settings = opts.of_the_captions() | {"model": model, "dtype": str(dtype), "prompt_file": template}

    tokenizer = text.load_tokenizer(training_data.locate(opts.tokenizer or captioners.TOKENIZER))
    shorten = shortening.drop_sentences
    if opts.shortener != "sentences":
        shorten = shortening.T5Shortener(opts.shortener, str(device))
    works = []
    for split in splits:
        of_caption = prompts.labels_from_captions(row.caption for row in split.rows)
        labels = {row.file_name: row.label or of_caption[row.caption] for row in split.rows}
        journal = captioning.open_journal(split, settings, opts.max_images, opts.overwrite, owner)
        classes = sorted(set(labels.values()))
        works.append(Work(split, journal, labels, classes, opts, template, tokenizer, shorten))
    return str(model), works


def build_engine(opts: VSGOptions, model: str, dtype: torch.dtype, device: torch.device) -> engines.Engine:
    """Load the model, or reach for the server."""
    sampling = opts.part("sampling")
    if opts.engine == "openai":
        from llava_next_captioner.openai_engine import OpenAIEngine

        sampling["top_k"] = opts.top_k or None
        return OpenAIEngine(str(opts.base_url), model, **sampling, **opts.part("server"), seed=opts.seed)
    from llava_next_captioner import decoding, random_weights, transformers_engine  # takes seconds

    where = {"dtype": dtype, "device": device, "attn": opts.attn, "seed": opts.seed}
    if opts.random_weights:
        return random_weights.random_engine(opts.random_weights, sampling=decoding.Sampling(**sampling), **where)
    return transformers_engine.TransformersEngine(training_data.locate(model), **sampling, **where)


def run(jobs: Sequence[tuple[Work, int]], engine: engines.Engine, rank: int, stop: stopping.StopSignal) -> None:
    """Describe chunk after chunk, each of them in the journal before the next one, until a signal comes."""
    attempts = rejected = 0
    total = sum(len(work.split.chunks[number]) for work, number in jobs)
    with (
        ThreadPoolExecutor(jobs[0][0].opts.workers, "decoder") as decoders,
        tqdm(total=total, desc="VSG", unit=" images", disable=rank > 0) as bar,
    ):
        made_ready = captioning.in_advance(lambda job: take_up(job[0], job[1], engine, decoders), jobs)
        for (work, number), (images, chunk) in made_ready:
            started = time.perf_counter()
            if readable := [image for image in images if image.readable]:
                describe(work, readable, chunk)
            seconds = round((time.perf_counter() - started) / len(images), 4)
            facts = {"seed": work.opts.seed, "model": work.journal.header["options"]["model"], "seconds": seconds}
            work.journal.append([image.item(number, **facts) for image in images], rank)

            for image in images:
                attempts += len(image.attempts)
                rejected += sum(bool(tried["failed"]) for tried in image.attempts)
                if not image.readable:
                    bar.write(f"left out: {image.image}", file=sys.stderr)
            bar.set_postfix(rejected=f"{rejected / max(attempts, 1):.0%}", refresh=False)
            bar.update(len(images))
            if stop.requested:
                return


def finish(works: Sequence[Work], opts: VSGOptions) -> int:
    """Write metadata.csv of every split, and say what came of it; returns the exit code."""
    for work in works:
        print(captioning.write_metadata(work.split, work.journal, work.labels))
    picture = Path(opts.picture) if opts.picture else ROOT / "results" / "captions.png"
    return caption_report.report([(work.split, work.journal) for work in works], picture, opts.max_fallback)


def main() -> int:
    opts = parse(VSGOptions, __doc__)
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    stopping.end_with_launcher()
    device = devices.pick_device()
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    dtype = devices.named_dtype(opts.dtype, device)
    with stopping.first_process_begins(processes):
        model, works = begin(opts, dtype, device, owner=rank == 0)

    pending = [(work, number) for work in works for number in work.pending()]
    with stopping.StopSignal(say=rank == 0) as stop, checkpoint.disk_faults(works[0].split.folder, SAFE):
        if jobs := pending[rank::processes]:
            if rank == 0:
                images = sum(len(work.split.chunks[number]) for work, number in pending)
                where = opts.base_url or f"{dtype} on {device}"
                print(f"{images} images to describe with {model} ({where})", flush=True)
            run(jobs, build_engine(opts, model, dtype, device), rank, stop)
        while rank == 0 and not stop.requested and any(work.pending() for work in works):
            time.sleep(0.5)
            for work in works:
                work.journal.take_in_parts()
        left = sum(number not in work.journal.items for work, number in (pending if rank == 0 else jobs))
        if left:
            if rank == 0:
                print(f"stopped, {left} of {len(pending)} chunks are left: run the same command again to go on")
            return stop.exit_code
        return finish(works, opts) if rank == 0 else 0


if __name__ == "__main__":
    with exit_codes(engines.CaptionerError):
        sys.exit(main())

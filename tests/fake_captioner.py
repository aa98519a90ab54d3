"""A captioner of the agreed protocol that needs no model: its answers depend on (seed, name, attempt) only."""

import random
import time
from collections.abc import Sequence
from pathlib import Path

from llava_next_captioner.engines import Answer, Request

SENTENCES = (
    "the lungs are clear and dark.", "The left side is a little hazier than the right.", "Its ribs stand out sharply.",
    "A marker is seen in the upper corner.", "The picture is bright, with strong contrast.", "The heart is slim.",
)  # fmt: skip
FAULTS = {
    "unfinished": lambda caption, text: text.rstrip("."),
    "begins_with_caption": lambda caption, text: text.removeprefix(caption),
    "too long": lambda caption, text: text + " " + " ".join(f"It has {n} grey spots." for n in range(40)),
    "loops": lambda caption, text: f"{text} Its ribs are thin. Its ribs are thin.",
}


class FakeEngine:
    """`faulty` is the share of rejects, `seconds` what each call takes; `calls` lists the images and attempts."""

    model = "fake"

    def __init__(self, seed: int = 0, faulty: float = 0.4, seconds: float = 0.0, calls: Path | None = None):
        self.seed, self.faulty, self.seconds, self.calls = seed, faulty, seconds, calls

    def prepare(self, requests: Sequence[Request]) -> "FakeChunk":
        return FakeChunk(self, requests)

    def answer(self, request: Request, attempt: int) -> Answer:
        draws = random.Random(f"{self.seed}/{request.name}/{attempt}")
        caption = request.prompt.split("right: ")[1].split(". Its class")[0]
        text = f"{caption}, {' '.join(draws.sample(SENTENCES, 3))}"
        if draws.random() < self.faulty:
            text = FAULTS[draws.choice(list(FAULTS))](caption, text)
        return Answer(text, len(text.split()), finished=True)


class FakeChunk:
    def __init__(self, engine: FakeEngine, requests: Sequence[Request]):
        self.engine, self.requests = engine, requests

    def sample(self, picks: Sequence[tuple[int, int]]) -> list[Answer]:
        if self.engine.calls and picks:
            with open(self.engine.calls, "a") as file:
                file.write("".join(f"{self.requests[index].name} {attempt}\n" for index, attempt in picks))
        time.sleep(self.engine.seconds)
        return [self.engine.answer(self.requests[index], attempt) for index, attempt in picks]


def install(**options) -> None:
    """Let VSG.py use it instead of a model."""
    import VSG

    VSG.build_engine = lambda opts, *_: FakeEngine(opts.seed, **options)

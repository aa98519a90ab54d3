"""What came of a set's descriptions, for people: counts, the images to look at, and a picture of some."""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from medart_core.captioning import ACCEPTED, FALLEN_BACK, SHORTENED, UNREADABLE, Split
from medart_core.errors import UserError
from medart_core.images import open_image
from medart_core.journal import Item, Journal
from medart_core.pictures import caption_sheet

WORST, EXAMPLES = 5, 12
TOO_MANY_FELL_BACK = 3


def report(journals: Sequence[tuple[Split, Journal]], picture: Path, max_fallback: float) -> int:
    """Print the summary, write the picture, and return the exit code: 3 if a larger share fell back, else 0."""
    summary = summarize([item for _, journal in journals for item in journal.by_name().values()])
    print("\n".join(lines(summary)), flush=True)
    sheet = example_sheet(journals)
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(picture)
    except OSError as error:
        raise UserError(
            f"all is described, but {picture} cannot be written ({error}); give another --picture"
        ) from error
    print(f"picture: {picture}", flush=True)
    if summary["fallen_back_share"] <= max_fallback:
        return 0
    share = f"{summary['fallen_back_share']:.1%} of the images"
    print(f"{share} had to keep their simple caption, more than --max-fallback {max_fallback}", file=sys.stderr)
    return TOO_MANY_FELL_BACK


def summarize(items: Sequence[Item]) -> dict[str, Any]:
    """Counts of outcomes and of reasons, the share that fell back, and the images that were rejected most often."""
    outcomes = Counter(item["outcome"] for item in items)
    attempts = [attempt for item in items for attempt in item["attempts"]]
    reasons = Counter(name for attempt in attempts for name in attempt["failed"])
    readable = len(items) - outcomes[UNREADABLE]
    by_badness = sorted(items, key=lambda item: (item["outcome"] != FALLEN_BACK, -_rejected(item), item["file_name"]))
    return {
        "images": len(items),
        **{name: outcomes[name] for name in (ACCEPTED, SHORTENED, FALLEN_BACK, UNREADABLE)},
        "fallen_back_share": outcomes[FALLEN_BACK] / readable if readable else 0.0,
        "attempts": len(attempts),
        "rejected_attempts": sum(bool(attempt["failed"]) for attempt in attempts),
        "reasons": dict(reasons.most_common()),
        "worst": [(item["file_name"], _rejected(item), item["reasons"]) for item in by_badness if _rejected(item)][
            :WORST
        ],
    }


def _rejected(item: Item) -> int:
    return sum(bool(attempt["failed"]) for attempt in item["attempts"])


def lines(summary: Mapping[str, Any]) -> list[str]:
    """The summary in lines for people."""
    counts = ", ".join(f"{summary[name]} {name}" for name in (ACCEPTED, SHORTENED, FALLEN_BACK))
    left_out = f", {summary[UNREADABLE]} unreadable and left out" if summary[UNREADABLE] else ""
    told = [f"{summary['images']} images: {counts}{left_out}"]
    if summary["rejected_attempts"]:
        reasons = ", ".join(f"{name} {count}" for name, count in summary["reasons"].items())
        told.append(f"{summary['rejected_attempts']} of {summary['attempts']} attempts were rejected ({reasons})")
    for name, rejected, reasons in summary["worst"]:
        told.append(f"  worst: {name}, {rejected} rejected ({', '.join(reasons)})")
    return told


def example_sheet(journals: Sequence[tuple[Split, Journal]]) -> Image.Image:
    """Twelve images, evenly spread over what was described, with their captions."""
    items = [
        (split.folder / item["file_name"], item["text"])
        for split, journal in journals
        for _, chunk in sorted(journal.items.items())
        for item in chunk
        if item["outcome"] != UNREADABLE
    ]
    count = min(len(items), EXAMPLES)
    chosen = [items[place * len(items) // count] for place in range(count)]
    return caption_sheet([open_image(path) for path, _ in chosen], [caption for _, caption in chosen])

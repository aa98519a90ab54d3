"""report.html: the report as one page for people, with its pictures inside; it needs no network and no script."""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medart_core.checkpoint import write_text
from medart_core.evaluation import report, sheets
from medart_core.evaluation.catalogue import beside_floor, by_question, explanations, put, title_of
from medart_core.evaluation.colour import histograms
from medart_core.evaluation.images import ImageSet
from medart_core.evaluation.measured import Measured
from medart_core.evaluation.privacy import Pair

TILE = 160  # pixels of a picture's longer side, at most
STYLE = """
:root { color-scheme: light; --ink: #1c2733; --soft: #5c6b7a; --line: #dde3e9; --own: #0b6e8f; --floor: #d98b1f }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1060px; padding: 20px 16px 60px; color: var(--ink); background: #fff;
  font: 16px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
h1 { font-size: 1.7em; line-height: 1.2; margin: 0.4em 0 0.2em } h2 { font-size: 1.25em; margin: 2em 0 0.4em }
h3 { font-size: 1em; margin: 1.2em 0 0.3em } p { margin: 0.4em 0 } small, .soft { color: var(--soft);
  font-size: 0.85em }
.warning { background: #fff3d6; border-left: 4px solid var(--floor); padding: 6px 12px; font-weight: 600 }
.cards { display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); margin: 16px 0 }
.cards > div { border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px }
.cards b { display: block; font-size: 1.5em; font-weight: 650 }
.tiles { display: grid; gap: 4px; grid-template-columns: repeat(8, 1fr) }
.pairs { display: grid; gap: 10px; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)) }
.pairs figure { margin: 0; display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
.pairs figcaption { grid-column: 1 / 3 } img, svg { display: block; width: 100% }
.figure { display: grid; gap: 0 14px; grid-template-columns: minmax(0, 1fr) 200px 6.5em 9em; padding: 5px 0;
  border-top: 1px solid var(--line); align-items: center }
.figure > :nth-child(n + 3) { text-align: right } .part { padding-left: 1.2em } .floor { color: #9a5f0c }
.channels { display: grid; gap: 14px; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)) }
ul { padding-left: 1.2em; margin: 0.3em 0 } li { overflow-wrap: anywhere }
@media (max-width: 640px) { .tiles { grid-template-columns: repeat(4, 1fr) }
  .figure { grid-template-columns: minmax(0, 1fr) 6.5em } .figure > :nth-child(2) { grid-row: 2 } }
"""


def write(
    folder: Path,
    figures: Mapping[str, Measured],
    run: Mapping[str, Any],
    sets: Mapping[str, ImageSet],
    colours: Mapping[str, np.ndarray],
    pairs: Sequence[Pair],
) -> Path:
    """Write report.html, at once: what `report.write` and `sheets.write` say and show. Returns its path."""
    count = f"{run['generated_images']} generated images beside {run['real_images']} held-out real ones"
    body = [
        "<h1>How good are these images?</h1>",
        f"<p>{count}. <span class=soft>{escape(run['generated'])} against {escape(run['real'])}</span></p>",
        "<p class=warning>Not for diagnosis: the generated images show nobody's findings.</p>",
        f"<div class=cards>{''.join(_cards(figures))}</div>",
        "<h2>Look at them</h2>",
        *_examples(sheets.examples(sets["generated"], sets["real"])),
        *_sections(figures),
        "<h2>Colours</h2><p>Histograms of all images, dark to the left: real ones filled, generated as a line.</p>",
        f"<div class=channels>{_channels(*(histograms(colours[side]) for side in ('generated', 'real')))}</div>",
        *(_closest(sets["generated"], sets["train"], pairs) if pairs else ()),
        *_listing("Not measured", report.missing(figures)),
        *_listing("Notes", report.notes(figures)),
        *_listing("How it was made", report.how_it_was_made(figures, run)),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>How good are these images?</title><style>{STYLE}</style>"
    lines = ["<!doctype html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""]
    write_text(folder / "report.html", "\n".join(lines))
    return folder / "report.html"


def _cards(figures: Mapping[str, Measured]) -> Iterable[str]:
    """To each question the first of its figures."""
    for question, found in by_question(figures).items():
        name, figure = next(iter(found.items()))
        beside = escape(beside_floor(name, figure) or title_of(name).says).replace(" %", "&nbsp;%")
        yield (
            f"<div>{escape(question)}<b>{put(name, figure.value)}</b>{escape(title_of(name).name)}"
            f"<br><small>{beside}</small></div>"
        )


def _examples(rows: Mapping[str, Sequence[Image.Image]]) -> Iterable[str]:
    for name, images in rows.items():
        yield f"<h3>{escape(name)}</h3><div class=tiles>{''.join(map(_tile, images))}</div>"


def _sections(figures: Mapping[str, Measured]) -> Iterable[str]:
    """All figures, under the questions that they answer."""
    key = "the dot is the figure, the line its 95 % interval, the orange mark what other real images reach"
    yield f"<h2>All figures</h2><p class=soft>In the charts {key} at the same number: no generator can do better.</p>"
    for question, found in by_question(figures).items():
        yield f"<h3>{escape(question)}</h3>"
        explained = explanations(found)
        for name, figure in found.items():
            says, part = "", " class=part"
            if title := explained.get(name):
                wanted = f" ({title.better} is better)" if title.better in ("lower", "higher") else ""
                says, part = f"<br><small>{escape(title.says + wanted)}</small>", ""
            beside = "real" if title_of(name).better else "chance"
            floor = f"{beside} {put(name, figure.floor)}" if figure.floor is not None else ""
            yield (
                f"<div class=figure><div{part}>{escape(title_of(name).name)}{says}</div>"
                f"<div>{_chart(name, figure)}</div><div><b>{put(name, figure.value)}</b></div>"
                f"<div class=floor>{floor}</div></div>"
            )


def _chart(name: str, figure: Measured) -> str:
    """A figure, its interval and its floor on a line that begins at 0, or below."""
    marks = [mark for mark in (figure.value, figure.low, figure.high, figure.floor) if mark is not None]
    least, most = min(0.0, *marks), max(*marks, 1.0 if put(name, 0.5).endswith("%") else 0.0)
    if most <= least:
        return ""
    places = [4 + 192 * (mark - least) / (most - least) for mark in marks]
    interval = f'<path d="M{places[1]:.1f} 9H{places[2]:.1f}" stroke="#0b6e8f" stroke-width="3"/>'
    floor = f'<path d="M{places[-1]:.1f} 1V17" stroke="#d98b1f" stroke-width="3"/>'
    zero = f'<path d="M{4 - 192 * least / (most - least):.1f} 3V15" stroke="#b5bfc9"/>'
    drawn = zero + (interval if figure.low is not None else "") + (floor if figure.floor is not None else "")
    dot = f'<circle cx="{places[0]:.1f}" cy="9" r="5" fill="#0b6e8f"/>'
    return f'<svg viewBox="0 0 200 18"><path d="M4 9H196" stroke="#dde3e9"/>{drawn}{dot}</svg>'


def _channels(generated: np.ndarray, real: np.ndarray) -> str:
    """Average histograms of the channels, two (3, BINS)."""
    drawn = ""
    for (name, ink), ours, theirs in zip(sheets.CHANNELS.items(), generated, real, strict=True):
        scale = 80 / max(ours.max(), theirs.max(), 1e-9)
        width = 200 / len(ours)
        ours, theirs = (
            "".join(f"V{85 - scale * height:.1f}H{width * (place + 1):.1f}" for place, height in enumerate(side))
            for side in (ours, theirs)
        )
        drawn += (
            f'<svg viewBox="0 0 200 100"><path d="M0 85{theirs}V85Z" fill="#d5dae0"/><path d="M0 85{ours}V85" '
            f'fill="none" stroke="rgb{ink}" stroke-width="1.6"/><text x="0" y="97" font-size="10">{name}</text></svg>'
        )
    return drawn


def _closest(generated: ImageSet, train: ImageSet, pairs: Sequence[Pair]) -> Iterable[str]:
    yield (
        "<h2>Closest to training images</h2><p>Left a generated image, right the training image nearest to it; below "
        "their distance (root mean square, 0 to 1). A copy would look like one.</p><div class=pairs>"
    )
    for ours, theirs, distance in pairs:
        both = _tile(generated.image(ours)) + _tile(train.image(theirs))
        yield f"<figure>{both}<figcaption class=soft>{distance:.3f}</figcaption></figure>"
    yield "</div>"


def _listing(heading: str, entries: Sequence[str]) -> Iterable[str]:
    if entries:
        yield f"<h2>{heading}</h2><ul class=soft>{''.join(f'<li>{escape(entry)}</li>' for entry in entries)}</ul>"


def _tile(image: Image.Image) -> str:
    """A picture inside the page."""
    stream = io.BytesIO()
    image = image.convert("RGB")
    image.thumbnail((TILE, TILE))
    image.save(stream, "JPEG", quality=90)
    return f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}">'

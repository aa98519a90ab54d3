"""Put the figures of results/ and nano/records/ into README and docs, between markers; `make tables` after a change.

    python nano/tables.py            rewrites the tables that differ
    python nano/tables.py --check    only names them, and exits with 2

A table stands between the lines `<!-- table: NAME -->` and `<!-- end of table -->`; the names are those of `TABLES`.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, TypeAlias

from ablation_rows import COLOUR, PLAN, ROWS, XRAY
from scripts import ROOT

sys.path.insert(0, str(ROOT))
from medart_core.errors import UserError, exit_codes
from medart_core.options import Parser

RESULTS, RECORDS = ROOT / "results" / "ablation", ROOT / "nano" / "records"
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
NAMES = {
    "med-art": "Med-Art",
    "without-hldf": "without HLDF",
    "simple-caption": "simple caption",
    "empty-caption": "empty caption",
    "without-t5-lora": "without T5 LoRA",
    "dora": "DoRA",
    "dit": "DiT from scratch",
    "unbiased": "unbiased colour loss",
    "last-k": "`last_k`, k = 4",
    "sparse": "`sparse`, k = 4",
    "one-step": "`one_step`",
}
FIGURES = {
    "fid": "FID",
    "kid": "KID",
    "domain_frechet": "domain Frechet distance",
    "class_agreement": "agreement with the prompt",
    "colour_statistics_distance": "colour distance",
    "chroma_error": "chroma error",
    "colour_histogram_distance": "colour histogram distance",
    "colour_diversity": "colour diversity",
}
COLOURS = list(FIGURES)[4:]
TWINS = {"without": "lora-chest-xray-without-hldf", "with": "lora-chest-xray"}
OF_ONE_RUN = {
    **{name: FIGURES[name] for name in (*COLOURS, "fid") if name != "chroma_error"},
    "domain_frechet": "Frechet distance, domain",
    "domain_density": "density, domain",
    "domain_coverage": "coverage, domain",
    "class_agreement_ratio": "agreement over the classifier's accuracy",
    "class_agreement_viral_pneumonia": "agreement, viral pneumonia alone",
    "utility_ratio": "balanced accuracy, synthetic over real",
    "authpct_gap": "authenticity gap, points",
}
PAPER = {"without-hldf": 72.86, "simple-caption": 55.44, "empty-caption": 59.12, "without-t5-lora": 63.10,
         "dora": 55.88, "dit": 102.99, "med-art": 51.99}  # fmt: skip
NONE_YET = ["No row is finished yet."]

Record: TypeAlias = dict[str, Any]
Rows: TypeAlias = dict[str, dict[int, Record]]  # by row and seed


def read_rows(data: str, results: Path = RESULTS) -> Rows:
    """The finished rows of a set, in the order of `ROWS`."""
    files = sorted((results / data).glob("*.json"))
    records = [json.loads(file.read_text()) for file in files]
    found: Rows = {}
    for name in ROWS:
        if of_row := {record["seed"]: record for record in records if record["row"] == name}:
            found[name] = dict(sorted(of_row.items()))
    return found


def values(of_row: dict[int, Record], figure: str) -> dict[int, float]:
    """A figure of a row by seed, where it was measured."""
    figures = {seed: record["figures"].get(figure) for seed, record in of_row.items()}
    return {seed: found["value"] for seed, found in figures.items() if found}


def differences(rows: Rows, name: str, figure: str, other: str = "med-art") -> list[float]:
    """The figure of a row minus that of another, for every seed that both have."""
    ours, theirs = (values(rows.get(row, {}), figure) for row in (name, other))
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def counts(found: Sequence[float]) -> bool:
    """Whether paired differences have one sign and a mean larger than their spread; all else is noise."""
    one_sign = all(value > 0 for value in found) or all(value < 0 for value in found)
    return len(found) > 1 and one_sign and abs(mean(found)) > stdev(found)


def number(value: float) -> str:
    digits = 1 if abs(value) >= 20 else 2 if abs(value) >= 1 else 3
    return f"{value:.{digits}f}"


def markdown(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


# --- The tables ---


def levels(data: str, names: Sequence[str], figures: Sequence[str] = tuple(FIGURES)) -> list[str]:
    """Mean and range over the seeds, under the floor that real images reach."""
    rows = read_rows(data)
    lines = []
    for name in [name for name in names if name in rows]:
        cells = []
        for figure in figures:
            found = list(values(rows[name], figure).values())
            spread = f" ({number(min(found))} to {number(max(found))})" if len(found) > 1 else ""
            cells.append(number(mean(found)) + spread if found else "-")
        lines.append([NAMES[name], str(len(rows[name])), *cells])
    if not lines:
        return NONE_YET
    records = [record for of_row in rows.values() for record in of_row.values()]
    floors = [[record["figures"].get(name, {}).get("floor") for record in records] for name in figures]
    floors = [[floor for floor in found if floor is not None] for found in floors]
    lines.append(["real against real", "", *(number(mean(found)) if found else "-" for found in floors)])
    return markdown(["row", "seeds", *(FIGURES[name] for name in figures)], lines)


def paired(data: str, names: Sequence[str], figures: Sequence[str], other: str = "med-art") -> list[str]:
    """Differences from another row at the same seed: mean and standard deviation, in bold where they count."""
    rows = read_rows(data)
    lines = []
    for name in [name for name in names if name in rows and name != other]:
        cells, pairs = [], 0
        for figure in figures:
            found = differences(rows, name, figure, other)
            pairs = max(pairs, len(found))
            spread = f" ± {number(stdev(found))}" if len(found) > 1 else ""
            text = signed(mean(found)) + spread if found else "-"
            cells.append(f"**{text}**" if counts(found) else text)
        if pairs:
            lines.append([f"{NAMES[name]} minus {NAMES[other]}", str(pairs), *cells])
    return markdown(["", "pairs", *(FIGURES[name] for name in figures)], lines) if lines else NONE_YET


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def order() -> list[str]:
    """The paper's FIDs on Kvasir beside ours, rows in the paper's order."""
    ours, xray = read_rows(COLOUR), read_rows(XRAY)
    lines = []
    for name in sorted(PAPER, key=lambda row: PAPER[row]):
        found = [list(values(rows.get(name, {}), "fid").values()) for rows in (ours, xray)]
        lines.append([NAMES[name], f"{PAPER[name]:.2f}", *(number(mean(each)) if each else "-" for each in found)])
    return markdown(["row", "paper, Kvasir", "dermoscopy patches", "chest X-rays"], lines)


def modes() -> list[str]:
    """Gradient modes: the colours they reach, and what HLDF adds to a step, in ordinary steps."""
    rows, lines = read_rows(COLOUR), []
    for name in [name for name in ("med-art", "last-k", "sparse", "one-step") if name in rows]:
        longer, full = (mean(steps_longer(rows, row)) for row in (name, "med-art"))
        cells = [number(mean(values(rows[name], figure).values())) for figure in COLOURS]
        title = "`full` (Med-Art)" if name == "med-art" else NAMES[name]
        lines.append([title, str(len(rows[name])), f"{longer:.2f} ({longer / full:.0%})", *cells])
    head = ["gradient", "seeds", "cost of HLDF in ordinary steps", *(FIGURES[name] for name in COLOURS)]
    return markdown(head, lines) if lines else NONE_YET


def steps_longer(rows: Rows, name: str) -> list[float]:
    """By how many ordinary steps of the same run a step with HLDF is longer; what shares the machine slows both."""
    seconds = [record["step_seconds"] for record in rows[name].values()]
    return [each["sec_per_hldf_step"] / each["sec_per_step"] - 1 for each in seconds]


def twins() -> list[str]:
    """The two bundled LoRAs at two guidances: value, interval, and in brackets what real images reach."""
    records = {kind: json.loads((RECORDS / f"{name}.json").read_text()) for kind, name in TWINS.items()}
    columns = [(kind, f"guidance {scale}") for scale in (4.5, 2.0) for kind in records]
    lines = []
    for name, title in OF_ONE_RUN.items():
        found = [records[kind][guidance][name] for kind, guidance in columns]
        spreads = [[number(figure[key]) for key in ("value", "low", "high")] for figure in found]
        cells = [f"{value} ({low} to {high})" for value, low, high in spreads]
        floor = f" [{number(found[0]['floor'])}]" if found[0]["floor"] is not None else ""
        lines.append([title + floor, *cells])
    return markdown(["", *(f"{kind} HLDF, {guidance}" for kind, guidance in columns)], lines)


def missing() -> list[str]:
    """The rows of the plan that have no figures."""
    absent = [str(row) for row in PLAN if not (RESULTS / f"{row}.json").exists()]
    return [f"Rows not finished: {', '.join(absent)}." if absent else f"All {len(PLAN)} rows are finished."]


CORE = list(ROWS)[:7]
TABLES: dict[str, Callable[[], list[str]]] = {
    "ablation-colour": lambda: levels(COLOUR, CORE),
    "ablation-colour-pairs": lambda: paired(COLOUR, CORE, list(FIGURES)),
    "ablation-xray": lambda: levels(XRAY, CORE),
    "ablation-xray-pairs": lambda: paired(XRAY, CORE, list(FIGURES)),
    "ablation-order": order,
    "ablation-captions": lambda: paired(COLOUR, ["empty-caption"], list(FIGURES), "simple-caption"),
    "ablation-loss": lambda: levels(COLOUR, ["without-hldf", "med-art", "unbiased"], ["fid", *COLOURS]),
    "ablation-loss-pairs": lambda: paired(COLOUR, ["unbiased", "without-hldf"], ["fid", *COLOURS]),
    "ablation-modes": modes,
    "ablation-modes-pairs": lambda: paired(COLOUR, ["last-k", "sparse", "one-step"], ["fid", *COLOURS]),
    "ablation-missing": missing,
    "twins": twins,
    "ablation-readme": lambda: levels(COLOUR, ["without-hldf", "med-art"], ["fid", *COLOURS]),
}


def documents() -> list[Path]:
    return [ROOT / "README.md", ROOT / "nano" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def rendered(text: str, source: str) -> str:
    """A document with its tables made anew. Raises UserError for a table that is not known."""

    def table(match: re.Match[str]) -> str:
        if match["name"] not in TABLES:
            raise UserError(f"{source} asks for the table {match['name']!r}; there are {', '.join(TABLES)}")
        return "\n".join([match[1], *TABLES[match["name"]](), "", match[3]])

    return MARKED.sub(table, text)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 2 if a table differs")
    options = parser.parse_args()
    for file in documents():
        before = file.read_text(encoding="utf-8")
        after = rendered(before, str(file))
        if after == before:
            continue
        if options.check:
            raise UserError(f"tables of {file} differ from results/; run make tables")
        file.write_text(after, encoding="utf-8")
        print(f"{file}: tables made anew")


if __name__ == "__main__":
    with exit_codes():
        main()

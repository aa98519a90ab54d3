"""Draw images from a LoRA of chest X-rays and evaluate them; what is there already is taken.

    python nano/assessment.py --lora nano/lora-chest-xray --out results/lora-chest-xray-evaluation

Options that it does not know go to evaluate.py.
"""

import sys
from pathlib import Path

from scripts import ROOT, call, named

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from medart_core import sources
from medart_core.errors import exit_codes
from medart_core.options import Parser

DATA = ROOT / "dataset" / "chest-xray"
LORA = ROOT / "nano" / "lora-chest-xray"
IMAGES = 200


def draw(lora: Path, folder: Path, images: int, column: str, *more: object) -> Path:
    """Images for the test split's captions, all classes alike; returns their folder."""
    prompts = ["--metadata", DATA / "test", "--caption-column", column, "--balanced"]
    call("sample_ddp.py", "--lora", lora, *prompts, "--num-fid-samples", images, "--sample-dir", folder, *more)
    return max(folder.glob("*.npz"), key=lambda file: file.stat().st_mtime).with_suffix("")


def evaluate(generated: Path, out: Path, *more: object) -> Path:
    """Returns the page to look at; FID's network is fetched if it can be, else the report says what is missing."""
    if not sources.INCEPTION_FILE.is_file():
        call("prepare.py", "inception", fine=(0, 2))
    judge = out.with_name("classifier.safetensors")
    if not judge.is_file():
        call("evaluate.py", "fit-extractor", "--train", DATA / "train", "--out", judge)
    if not (out / "report.json").is_file():
        sets = ["--generated", generated, "--real", DATA / "test", "--train", DATA / "train"]
        call("evaluate.py", *sets, "--extractor", judge, "--out", out, *more)
    return out / "report.html"


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--lora", type=Path, default=LORA, help="a run of medart.py (default: the bundled one)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the images and of the evaluation")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"to draw (default {IMAGES})")
    parser.add_argument("--caption-column", default="simple_text", help="of the test split (default simple_text)")
    parser.add_argument("--cfg-scale", type=float, default=4.5, help="guidance (default 4.5)")
    options, more = parser.parse_known_args()
    lora, out, scale = options.lora.resolve(), options.out.resolve(), ("--cfg-scale", options.cfg_scale)
    generated = draw(lora, out / "generated", options.images, options.caption_column, *scale)
    print(f"look at {named(evaluate(generated, out / 'evaluation', *more))}")


if __name__ == "__main__":
    with exit_codes():
        main()

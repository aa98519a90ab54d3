"""The paper's ablation at bundled scale: row by row train, draw 200 images, evaluate, and keep the figures as JSON.

    python nano/ablation.py                                  all rows, two at a time; hours on 2 cores
    python nano/ablation.py --only dermoscopy-patches/dora   the rows whose name begins so
    python nano/ablation.py --quick                          6 minutes, to see that all works

Every row is a run of the scripts as a user would call them, one thread each: medart.py (or train.py), sample_ddp.py,
evaluate.py. Its figures go to results/ablation/SET/ROW-seed-N.json, its run to results/ablation-runs/. A row whose
JSON is there is taken as it is, an interrupted one goes on, one that another process makes is left to it. Then
`make tables` puts the figures into the documents.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ablation_data import copy_evenly, digest, list_samples, step_seconds
from ablation_recipes import dit, lora
from ablation_rows import (
    BATCH,
    EPOCHS,
    IMAGES,
    PIXELS,
    PLAN,
    QUICK_IMAGES,
    QUICK_PLAN,
    QUICK_STEPS,
    SOLVER_STEPS,
    STEPS,
    Row,
)
from scripts import ROOT
from tqdm import tqdm

sys.path.insert(0, str(ROOT))
from medart_core.checkpoint import take, write_json
from medart_core.errors import UserError, exit_codes
from medart_core.options import Parser
from medart_core.sources import INCEPTION_FILE, sha256_of

RESULTS, RUNS, QUICK = (ROOT / "results" / name for name in ("ablation", "ablation-runs", "ablation-quick"))
FINISHED = "finished"
KEPT = ("value", "low", "high", "floor")  # of a figure


class Ablation:
    """The folders and the size of one ablation."""

    def __init__(self, results: Path, runs: Path, steps: int, images: int):
        self.results, self.runs, self.steps, self.images = results, runs, steps, images
        self.preparing = threading.Lock()

    def record(self, row: Row) -> Path:
        return self.results / f"{row}.json"

    def finished(self, row: Row) -> bool:
        """Whether the row's figures are there. Raises UserError if they are of other options."""
        if not self.record(row).exists():
            return False
        before, now = json.loads(self.record(row).read_text()), self.asked(row)
        if changed := [name for name in now if before.get(name) != now[name]]:
            raise UserError(f"{self.record(row)} has another {changed[0]}; move it away to make the row anew")
        return True

    def asked(self, row: Row) -> dict[str, Any]:
        """What a row is made with."""
        named = {"set": row.data, "row": row.name, "seed": row.seed, "pixels": PIXELS[row.data]}
        return named | {"steps": self.steps, "images": self.images, "options": row.options}

    # --- What all rows of a set share ---

    def prepare(self, data: str) -> None:
        """A copy of the training images and evenly spread test images, described by VSG.py; the domain's extractor.

        The copy keeps its captions, whatever becomes of those in dataset/.
        """
        folder = self.runs / "data" / data
        if (folder / "ready.json").exists():
            return
        take(folder, work="prepares images", remedy="wait until it has")
        if not (ROOT / "dataset" / data / "train" / "raw.csv").exists():
            call("prepare.py", data)
        for split, count in (("train", None), ("prompts", self.images)):
            if not (folder / split / "raw.csv").exists():
                copy_evenly(ROOT / "dataset" / data / ("test" if count else split), folder / split, count)
        if not all((folder / split / "metadata.csv").exists() for split in ("train", "prompts")):
            call("VSG.py", f"--data-dir={folder}", accepted=(0, 3))  # 3: a look at those that fell back is advised
        if not INCEPTION_FILE.is_file():
            call("prepare.py", "inception")
        extractor = self.runs / f"{data}.safetensors"
        if not extractor.exists():
            where = [f"--train={ROOT / 'dataset' / data / 'train'}", f"--out={extractor}", f"--epochs={EPOCHS}"]
            call("evaluate.py", "fit-extractor", *where)
        features = self.runs / f"{data}-features"
        if any(row.name == "dit" and row.data == data for row in PLAN) and not (features / "features.json").exists():
            size = f"--image-size={PIXELS[data]}"
            where = [f"--data-path={folder / 'train'}", f"--features-path={features}"]
            call("extract_features.py", *where, size, "--vae=nano", "--num-workers=0")
        write_json(folder / "ready.json", {})

    # --- A row ---

    def attempt(self, row: Row) -> tuple[Row, str]:
        """Make a row unless another process does; returns it with what came of it."""
        try:
            take(self.runs / str(row))
        except UserError:
            return row, "left to another process"
        if self.finished(row):
            return row, FINISHED
        try:
            with self.preparing:
                self.prepare(row.data)
            self.make(row)
        except UserError as error:
            return row, str(error)
        return row, FINISHED

    def make(self, row: Row) -> None:
        """Train, draw and evaluate; the row's JSON is written last."""
        run, data, seconds = self.runs / str(row), self.runs / "data" / row.data, {}
        if row.name == "dit":
            recipe = dit(row, run, data, self.runs / f"{row.data}-features", self.steps)
        else:
            recipe = lora(row, run, data, self.steps)
        samples, report = run / "samples", run / "evaluation" / "report.json"

        def stage(name: str, *command: str, done: Path) -> None:
            file = run / f"{name}.json"
            if not done.exists():
                write_json(file, call(*command, log=run / "output.txt"))
            seconds[name] = json.loads(file.read_text()) if file.exists() else None

        stage("train", *recipe.train, done=recipe.finished)
        how = [f"--num-fid-samples={max(recipe.numbers) + 1}", *recipe.draw, f"--global-seed={row.seed}"]
        how += [f"--num-sampling-steps={SOLVER_STEPS}", f"--per-proc-batch-size={BATCH}", "--precision=bf16"]
        how += [f"--image-size={PIXELS[row.data]}", f"--sample-dir={samples}"]
        stage("sample", "sample_ddp.py", *how, done=samples / "done.json")
        [pictures] = [path for path in samples.iterdir() if path.is_dir() and path.name[0] != "."]
        list_samples(pictures, recipe.numbers, recipe.labels)
        write_json(samples / "done.json", pictures.name)
        how = [f"--generated={pictures}", f"--real={ROOT / 'dataset' / row.data / 'test'}", "--utility-seeds=0"]
        how += [f"--extractor={self.runs / row.data}.safetensors", "--no-patients", f"--out={run / 'evaluation'}"]
        stage("evaluate", "evaluate.py", *how, done=report)

        figures = json.loads(report.read_text())
        facts = figures.pop("run")
        content = self.asked(row) | {"seconds": seconds, "commit": commit(), "torch": facts["torch"]}
        content["step_seconds"] = step_seconds(run / "lora" / "log.jsonl")
        content["figures"] = {name: {field: figure[field] for field in KEPT} for name, figure in figures.items()
                              if figure["value"] is not None}  # fmt: skip
        content["data_sha256"] = {split: digest(data / split) for split in ("train", "prompts")}
        content |= {"real_sha256": facts["real_sha256"], "base_sha256": digest(ROOT / "nano" / "pixart")}
        content["weights_sha256"] = {file.parent.name: sha256_of(file) for file in sorted(run.glob(recipe.weights))}
        self.record(row).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.record(row), content)


def call(script: str, *flags: str, log: Path | None = None, accepted: tuple[int, ...] = (0,)) -> dict[str, float]:
    """Run a script of the project on one thread; returns its wall-clock and CPU seconds.

    CPU seconds are what other work on the machine does not change. Raises UserError, naming the log, if it fails.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'diffusers'}:{ROOT / 'LLaVA-NeXT'}"}
    started = time.perf_counter()
    command = [sys.executable, str(ROOT / script), *flags]
    with open(log, "ab") if log else contextlib.nullcontext() as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in accepted:
        raise UserError(f"{script} failed with {process.returncode}; see {log or 'its message above'}")
    return {"wall": round(time.perf_counter() - started, 1), "cpu": round(cpu_seconds(usage), 1)}


def cpu_seconds(usage: resource.struct_rusage) -> float:
    """Of a process that has ended and of those that it has waited for."""
    return usage.ru_utime + usage.ru_stime


def commit() -> str:
    """The checkout's commit, with -dirty if its Python code differs from it; empty without git."""

    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno", "--", "*.py") else "")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--only", default="", metavar="ROW", help="rows whose SET/ROW-seed-N begins so")
    parser.add_argument("--workers", type=int, default=2, help="rows at a time, one thread each (default 2)")
    parser.add_argument("--quick", action="store_true", help="four rows of one seed; goes to results/ablation-quick")
    options = parser.parse_args()
    if options.quick:
        ablation = Ablation(QUICK / "rows", QUICK, QUICK_STEPS, QUICK_IMAGES)
    else:
        ablation = Ablation(RESULTS, RUNS, STEPS, IMAGES)
    plan = [row for row in (QUICK_PLAN if options.quick else PLAN) if str(row).startswith(options.only)]
    if not plan:
        raise UserError(f"no row begins with {options.only!r}; there are {', '.join(dict.fromkeys(map(str, PLAN)))}")
    missing = [row for row in plan if not ablation.finished(row)]
    print(f"{len(plan)} rows, {len(missing)} to make; runs, pictures and logs in {ablation.runs}", flush=True)
    failed = []
    with ThreadPoolExecutor(options.workers) as pool, tqdm(desc="ablation", unit="row", total=len(missing)) as bar:
        for row, outcome in pool.map(ablation.attempt, missing):
            bar.write(f"{row}: {outcome}")
            bar.update()
            failed += [row] if not ablation.finished(row) else []
    print(f"figures: {ablation.results}; make tables puts them into the documents")
    if failed:
        raise UserError(f"{len(failed)} rows are not finished, see above; run the same command again to go on")


if __name__ == "__main__":
    with exit_codes():
        main()

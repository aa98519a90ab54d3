"""Campaigns: resuming is exact in 24 cases, and 50 kills lose nothing; `make soak` runs all, `make test` a few.

The figures of a campaign are printed as one line of JSON.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked_runs import ROOT, TIMEOUT, medart_exit_codes
from safetensors.torch import load_file

from medart_core import checkpoint, trees

KILLS = 50  # inside the saving
TIMING = ("sec_per_step", "sec_per_hldf_step", "peak_mem_gb")


@pytest.fixture(scope="session")
def flags(tiny_pixart, x_rays) -> list[str]:
    """A run of the smallest model with random crops and dropped captions, an HLDF update every second step."""
    return [
        f"--pretrained_model_name_or_path={tiny_pixart}", f"--dataset_name={x_rays}", "--resolution=32",
        "--learning_rate=1e-2", "--lr_scheduler=cosine", "--lr_warmup_steps=2", "--random_flip",
        "--proportion_empty_prompts=0.3", "--N_steps=2", "--M_times=2", "--num_validation_images=1",
        "--validation_prompt=a chest", "--validation_steps=0", "--report_to=none", "--logging_steps=1",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def figures(request):
    """Collects the outcomes of a campaign's cases and prints their sum at its end."""
    outcomes: dict[str, list[bool]] = {}
    started = time.monotonic()
    yield outcomes
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for campaign, passed in outcomes.items():
            line = {"campaign": campaign, "cases": len(passed), "exact": sum(passed)}
            print("\n" + json.dumps(line | {"seconds": round(time.monotonic() - started)}), flush=True)


# --- Resuming is exact ---

# Twelve images in windows of three micro-batches with two images each, over all processes: an epoch is two steps.
WINDOW, STEPS = 3, 6
# When and how a run ends, as (disturbance, --checkpointing_steps, the checkpoint that it is resumed from).
INTERRUPTIONS = {
    "mid-epoch": (("SIGTERM", 2 * WINDOW + 1), 500, 3),  # of one process only; saved at the end of its step
    "epoch end": (("SIGKILL", 4 * WINDOW), 4, 4),
    "inside accumulation": (("SIGKILL", 4 * WINDOW + 1), 3, 3),
}
CASES = list(itertools.product(INTERRUPTIONS, (1, 2), (0, 2), ("AdamW", "8-bit Adam")))
QUICK = [
    ("mid-epoch", 2, 2, "8-bit Adam"),
    ("epoch end", 1, 2, "AdamW"),
    ("inside accumulation", 2, 0, "AdamW"),
]


def resume_flags(processes: int, optimizer: str) -> list[str]:
    # bitsandbytes keeps 8-bit moments of tensors above 4,096 elements only, hence the rank.
    adam = ["--use_8bit_adam", "--rank=512"] if optimizer == "8-bit Adam" else ["--rank=2"]
    sizes = [f"--train_batch_size={2 // processes}", f"--gradient_accumulation_steps={WINDOW}"]
    return [*adam, *sizes, f"--max_train_steps={STEPS}"]


def state_of(run_dir: Path) -> tuple[dict, list[dict]]:
    """Sums of all files of the last checkpoint (adapters, optimiser, schedule), and the log but for its timing."""
    newest = run_dir / f"checkpoint-{STEPS}"
    checkpoint.verify(newest)
    entries = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return json.loads((newest / checkpoint.MANIFEST).read_text()), [
        {name: value for name, value in entry.items() if name not in TIMING} for entry in entries
    ]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """State of a run that nothing happened to, with no loader processes; made once for each kind."""
    made: dict[tuple, tuple] = {}

    def get(processes: int, optimizer: str) -> tuple[dict, list[dict]]:
        if (processes, optimizer) not in made:
            folder = tmp_path_factory.mktemp("uninterrupted")
            arguments = [*flags, *resume_flags(processes, optimizer), f"--output_dir={folder / 'out'}"]
            assert medart_exit_codes(arguments, folder / "log", processes) == [0] * processes
            made[processes, optimizer] = state_of(folder / "out")
        return made[processes, optimizer]

    return get


@pytest.mark.parametrize(
    ("moment", "processes", "workers", "optimizer"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in CASES],
)
def test_resuming_is_exact(
    flags, uninterrupted, figures, tmp_path, moment: str, processes: int, workers: int, optimizer: str
) -> None:
    outcomes = figures.setdefault("resume", [])
    outcomes.append(False)
    out, log = tmp_path / "out", tmp_path / "log"
    disturbance, interval, saved = INTERRUPTIONS[moment]
    arguments = [*flags, *resume_flags(processes, optimizer), f"--output_dir={out}"]
    arguments += [f"--checkpointing_steps={interval}", f"--dataloader_num_workers={workers}"]
    code = 143 if "SIGTERM" in disturbance else -signal.SIGKILL
    last = processes - 1 if code == 143 else -1
    assert medart_exit_codes(arguments, log, processes, disturbance, last) == [code] * processes
    assert checkpoint.latest(out) == out / f"checkpoint-{saved}"
    tensors = load_file(out / f"checkpoint-{saved}" / "state.safetensors").values()
    assert any(tensor.dtype == torch.uint8 for tensor in tensors) == (optimizer == "8-bit Adam")

    assert medart_exit_codes(arguments, log, processes) == [0] * processes
    assert f"resuming from {out / f'checkpoint-{saved}'}" in Path(f"{log}.0").read_text()
    files, entries = state_of(out)
    whole_files, whole_entries = uninterrupted(processes, optimizer)
    assert entries == whole_entries and "loss_color" in entries[4]
    assert files == whole_files
    outcomes[-1] = True


# --- Kills while saving ---


class Trainer:
    """A real medart.py that saves after every step, in a folder where others may have been killed before."""

    def __init__(self, arguments: list[str], out: Path, log: Path):
        self.out = out
        options = out / checkpoint.OPTIONS
        before = options.stat().st_mtime_ns if options.exists() else 0
        command = [sys.executable, str(ROOT / "medart.py"), *arguments, f"--output_dir={out}"]
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
        self.wait_for(lambda: options.exists() and options.stat().st_mtime_ns != before)

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + TIMEOUT
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline
            time.sleep(0.0005)

    def unfinished(self) -> bool:
        return any(name.startswith(checkpoint.TEMPORARY) for name in os.listdir(self.out))

    def saving_seconds(self) -> float:
        """Wait for one saving from its beginning to its end."""
        self.wait_for(self.unfinished)
        started = time.monotonic()
        self.wait_for(lambda: not self.unfinished())
        return time.monotonic() - started

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(TIMEOUT)


def finished_steps(out: Path) -> int:
    """By the log, which is written before the checkpoint."""
    lines = [line for line in (out / "log.jsonl").read_text().splitlines() if line.endswith("}")]
    return json.loads(lines[-1])["step"] + 1


@pytest.mark.slow
def test_kills_while_saving_lose_at_most_one_interval(flags, tmp_path, capsys) -> None:
    started, draws, out = time.monotonic(), random.Random(0), tmp_path / "out"
    arguments = [*flags, "--no_hldf", "--rank=64", "--max_train_steps=100000", "--checkpointing_steps=1",
                 "--checkpoints_total_limit=3"]  # fmt: skip
    lost, inside = [], 0
    while inside < KILLS and len(lost) < 2 * KILLS:  # some come too late, after the last rename
        trainer = Trainer(arguments, out, tmp_path / "log")
        assert not trainer.unfinished()  # what the kill before has left is swept
        seconds = trainer.saving_seconds()
        trainer.wait_for(trainer.unfinished)
        time.sleep(draws.uniform(0, seconds))
        assert trainer.end(signal.SIGKILL) == -signal.SIGKILL
        inside += trainer.unfinished()
        saved = checkpoint.checkpoints(out)
        for _, folder in saved:
            checkpoint.verify(folder)
            trees.load_tree(folder / "state")
        lost.append(finished_steps(out) - saved[-1][0])
    trainer = Trainer(arguments, out, tmp_path / "log")
    trainer.saving_seconds()
    assert trainer.end(signal.SIGTERM) == 143 and not trainer.unfinished()
    line = {"campaign": "kill", "kills": len(lost), "inside": inside, "unloadable": 0, "most_steps_lost": max(lost)}
    with capsys.disabled():
        print("\n" + json.dumps(line | {"seconds": round(time.monotonic() - started)}), flush=True)
    assert max(lost) <= 1 and inside == KILLS

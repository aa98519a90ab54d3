"""Orderly stops: signals, launchers that die, and numbers that are not finite."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked_runs import medart_exit_codes

from medart_core import checkpoint, trees
from medart_core.data import CaptionDataset, ImageTransform, ShuffledBatches, load_examples
from medart_core.stopping import LAUNCHED, StopSignal

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_a_request(number: signal.Signals, code: int) -> None:
    handler = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.exit_code == code
    assert signal.getsignal(number) is handler


STOPPED = """
import os, sys, time
from medart_core import stopping
first, second, pause = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
stopping.ECHO_SECONDS = 0.2
with stopping.StopSignal() as stop:
    os.kill(os.getpid(), first)
    time.sleep(pause)
    os.kill(os.getpid(), second)
    sys.exit(7)
"""


@pytest.mark.parametrize(
    ("first", "second", "launched", "pause", "code"),
    [
        (signal.SIGTERM, signal.SIGTERM, False, 0, 143),
        (signal.SIGINT, signal.SIGINT, False, 0, 130),
        (signal.SIGTERM, signal.SIGINT, False, 0, 130),
        (signal.SIGINT, signal.SIGTERM, True, 0, 7),  # Ctrl-C, and the end of the launcher that it brought about
        (signal.SIGINT, signal.SIGINT, True, 0.3, 130),
    ],
)
def test_a_second_signal_ends_at_once_but_a_launchers_echo_does_not(first, second, launched, pause, code) -> None:
    command = [sys.executable, "-c", STOPPED, str(int(first)), str(int(second)), str(pause)]
    done = subprocess.run(command, env=environment(launched), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code
    assert done.stderr.strip() == f"{first.name}: saving after this step; once more stops at once"


def environment(launched: bool) -> dict[str, str]:
    bare = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    return bare | ({"LOCAL_RANK": "0"} if launched else {})


WORKER = """
import os, sys, time
from medart_core import stopping
sys.platform = sys.argv[2]
stopping.end_with_launcher()
os.write(int(sys.argv[1]), b"%d\\n" % os.getpid())
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys
pipe = int(sys.argv[1])
subprocess.run([sys.executable, "-c", sys.argv[3], *sys.argv[1:3]], pass_fds=[pipe])
"""


@pytest.mark.parametrize(
    ("launched", "platform", "ends"),
    [(True, "linux", True), (True, "other", True), (False, "linux", False)],
    ids=["linux", "elsewhere", "not launched"],
)
def test_a_worker_ends_with_its_launcher_and_a_plain_process_does_not(launched, platform, ends) -> None:
    reading, writing = os.pipe()
    command = [sys.executable, "-c", LAUNCHER, str(writing), platform, WORKER]
    launcher = subprocess.Popen(command, pass_fds=[writing], env=environment(launched), cwd=ROOT)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        worker = int(pipe.readline())
        launcher.kill()
        launcher.wait()
        closed, _, _ = select.select([pipe], [], [], 5 if ends else 2)  # readable at its end: all its writers are gone
        if not closed:
            os.kill(worker, signal.SIGKILL)
    assert bool(closed) == ends


# --- medart.py itself ---


@pytest.fixture
def flags(tiny_pixart, x_rays, tmp_path):
    """Eight steps of two micro-batches with two images each, a checkpoint after every one, HLDF at every third."""
    return [
        f"--pretrained_model_name_or_path={tiny_pixart}", f"--dataset_name={x_rays}", "--resolution=32", "--rank=2",
        f"--output_dir={tmp_path / 'out'}", "--train_batch_size=2", "--gradient_accumulation_steps=2", "--N_steps=3",
        "--M_times=2", "--max_train_steps=8", "--checkpointing_steps=1", "--num_validation_images=1",
        "--validation_prompt=a chest", "--report_to=none", "--logging_steps=1",
    ]  # fmt: skip


def steps(folder: Path) -> list[int]:
    """Of the checkpoints, all of them whole."""
    found = checkpoint.checkpoints(folder)
    for _, path in found:
        checkpoint.verify(path)
    return [step for step, _ in found]


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_saves_at_the_end_of_its_step(flags, tmp_path: Path, name: str, code: int) -> None:
    arguments = [*flags, "--checkpointing_steps=500", "--dataloader_num_workers=1"]
    assert medart_exit_codes(arguments, tmp_path / "log", disturbance=(name, 4)) == [code]
    assert steps(tmp_path / "out") == [3]
    said = (tmp_path / "log.0").read_text()
    assert f"{name}: saving after this step; once more stops at once\n" in said and "stopped at step 3" in said


def test_a_second_signal_does_not_save(flags, tmp_path: Path) -> None:
    assert medart_exit_codes(flags, tmp_path / "log", disturbance=("SIGTERM SIGTERM", 4)) == [143]
    assert steps(tmp_path / "out") == [1, 2]


def images_of(x_rays: Path, batches: list[int], size: int = 2) -> list[str]:
    """Paths of the images in some micro-batches of one process."""
    dataset = CaptionDataset(load_examples(str(x_rays), show_progress=False), ImageTransform(32), 0)
    stream = iter(ShuffledBatches(len(dataset), size, 0))
    drawn = [next(stream) for _ in range(max(batches) + 1)]
    return [dataset.examples[index].place for batch in batches for _, index in drawn[batch]]


@pytest.mark.parametrize(
    ("what", "micro_batch", "name", "batches", "extra"),
    [
        ("nan loss", 5, "noise loss", [5], []),
        ("inf gradient", 4, "gradient", [4, 5], ["--cache_latents", "--center_crop"]),
        ("nan colour loss", 6, "colour loss", [7], []),
    ],
)
def test_what_is_not_finite_stops_before_the_update(
    flags, tmp_path, x_rays, what: str, micro_batch: int, name: str, batches: list[int], extra: list[str]
) -> None:
    assert medart_exit_codes([*flags, *extra], tmp_path / "log", disturbance=(what, micro_batch)) == [2]
    said = (tmp_path / "log.0").read_text()
    [line] = [line for line in said.splitlines() if line.startswith("error:")]
    step = micro_batch // 2
    assert f"error: step {step}, process 0: the {name} is not finite" in line and "Traceback" not in said
    expected = images_of(x_rays, batches)[: 1 if name == "colour loss" else 4]
    assert line.count("('A chest X-ray") == len(expected) and all(place in line for place in expected)
    assert steps(tmp_path / "out") == list(range(1, step + 1)) and f"checkpoint-{step} is intact" in line


def test_a_learning_rate_that_explodes_is_met_before_it_is_saved(flags, tmp_path: Path) -> None:
    assert medart_exit_codes([*flags, "--learning_rate=1e20"], tmp_path / "log") == [2]
    assert "the noise loss is not finite" in (tmp_path / "log.0").read_text()
    state = trees.load_tree(checkpoint.checkpoints(tmp_path / "out")[-1][1] / "state")
    assert all(tensor.isfinite().all() for part in ("transformer", "text_encoder") for tensor in state[part].values())


def test_one_process_with_an_infinite_gradient_stops_all(flags, tmp_path: Path) -> None:
    arguments = [*flags, "--train_batch_size=1"]
    assert medart_exit_codes(arguments, tmp_path / "log", 2, ("inf gradient", 5), rank=1) == [2, 2]
    said = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert "error: step 2, process 1: the gradient is not finite" in said[1] and said[1].count("error:") == 1
    assert "error" not in said[0].lower() and "Traceback" not in said[0] + said[1]
    assert steps(tmp_path / "out") == [1, 2]


def test_a_full_disk_ends_a_run_in_one_line(flags, tmp_path: Path) -> None:
    assert medart_exit_codes(flags, tmp_path / "log", disturbance=("full disk", 4)) == [2]
    assert steps(tmp_path / "out") == [1, 2]
    assert not list((tmp_path / "out").glob(f"{checkpoint.TEMPORARY}*"))


def test_an_error_of_the_first_process_ends_all_without_a_traceback(tmp_path) -> None:
    log = tmp_path / "log"
    arguments = [f"--dataset_name={tmp_path / 'nowhere'}", f"--output_dir={tmp_path / 'out'}"]
    assert medart_exit_codes(arguments, log, processes=2) == [2, 2]
    first, second = (Path(f"{log}.{rank}").read_text() for rank in (0, 1))
    assert "error: the folder" in first and "error" not in second
    assert "Traceback" not in first + second

"""docs/seed-commands.md: every command runs with the flags that stand below it, or ends on the error that does."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from models import DiT_models

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "seed-commands.md"
LAUNCHERS = ("accelerate", "torchrun")
NOWHERE = "http://127.0.0.1:9"  # nothing listens there
QUICK = ("python VSG.py", "python sample.py --image-size 512")  # spawning each costs ten seconds


@dataclass
class Call:
    """A command of the page as it is run; `error` is the line it must end on, with ... for what may differ."""

    command: str
    flags: str = ""
    error: str | None = None

    @property
    def line(self) -> str:
        return re.sub(r"\bN\b", "2", f"{self.command.rstrip()} {self.flags}")

    @property
    def launched(self) -> bool:
        return any(f"{name} " in self.command for name in LAUNCHERS)


def read_calls(page: str) -> list[Call]:
    calls, command = [], ""
    for kind, content in re.findall(r"^```([\w ]+)\n(.*?)^```$", page, flags=re.MULTILINE | re.DOTALL):
        if kind == "bash":
            command = content
        elif kind == "bash extra":
            calls.append(Call(command, content.strip()))
        elif kind == "text":
            calls.append(Call(command, error=content.strip()))
        elif kind == "text extra":
            calls[-1].error = content.strip()
    return calls


CALLS = read_calls(PAGE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory, x_rays) -> Path:
    """The page's $TMP."""
    folder = tmp_path_factory.mktemp("seed commands")  # also a path with a space
    shutil.copytree(x_rays, folder / "x-rays")
    shutil.copy(x_rays / "metadata.csv", folder / "x-rays" / "raw.csv")
    for part in ("LLaVA-NeXT", "diffusers"):
        shutil.copytree(ROOT / part, folder / "medart" / part, ignore=shutil.ignore_patterns("*.egg-info", "build"))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in DiT_models["DiT-L/4"](input_size=32).state_dict().items()}
    # Views of one zero each: 1.8 GB of weights in a file of some kilobytes.
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, folder / "DiT-L-4.pt")
    return folder


def check(call: Call, scratch: Path) -> None:
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TMP": str(scratch), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "http_proxy": NOWHERE,
        "https_proxy": NOWHERE, "no_proxy": "127.0.0.1,localhost", "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    where = scratch if call.command.startswith("cd medart/") else ROOT
    line = re.sub(r"\$TMP(/[\w./-]+)?", r'"$TMP\1"', call.line)
    done = subprocess.run(
        ["bash", "-c", line], cwd=where, env=environment, capture_output=True, text=True, timeout=400
    )
    said = done.stdout + done.stderr
    if call.error is None:
        assert done.returncode == 0, f"{line}\n{said}"
        return
    assert done.returncode == (1 if call.launched else 2), f"{line}\n{said}"
    pattern = ".*".join(map(re.escape, call.error.split("...")))
    assert re.search(f"^{pattern}$", said, flags=re.MULTILINE), f"{line}\n{said}"
    if not call.launched:
        assert "Traceback" not in said


def test_the_page_has_every_command() -> None:
    words = ["VSG.py", "medart.py", "sample.py", "extract_features.py", "train.py", "sample_ddp.py", "pip install"]
    assert len(CALLS) == 15 and all(any(word in call.command for call in CALLS) for word in words)
    assert {call.command for call in CALLS if not call.flags} <= {call.command for call in CALLS if call.flags}
    one = read_calls("```bash\na --n N\n```\n\n```bash extra\n--b\n```\n\n```text extra\nerror: no\n```\n")
    assert one == [Call("a --n N\n", "--b", "error: no")] and one[0].line == "a --n 2 --b"


@pytest.mark.parametrize("command", QUICK)
def test_quick(command, scratch) -> None:
    [call] = [call for call in CALLS if call.command.startswith(command) and (call.error or "VSG" in command)]
    check(call, scratch)


@pytest.mark.slow
def test_all(scratch) -> None:
    """In the page's order: some use what others have made."""
    for call in CALLS:
        check(call, scratch)

"""Run the project's scripts as a user would: from its root, with the command shown."""

import os
import shlex
import subprocess
import sys
from collections.abc import Container
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def named(path: object) -> str:
    """A path, or an option with one, as a command in the project's root names it."""
    return str(path).replace(f"{ROOT}/", "")


def call(script: str, *arguments: object, processes: int = 1, fine: Container[int] = (0,)) -> None:
    """Run a script in a process of its own, or under torchrun in several; paths in it are named from there.

    Raises:
        SystemExit: with its exit code, unless that is `fine`.
    """
    words = [named(argument) for argument in arguments]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    shown = ["torchrun", launcher[-1]] if launcher else ["python"]
    print(f"\n$ {shlex.join([*shown, script, *words])}", flush=True)
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if processes > 1 else {})
    done = subprocess.run([sys.executable, *launcher, script, *words], cwd=ROOT, env=environment)
    if done.returncode not in fine:
        sys.exit(done.returncode)

"""Scripts in processes of their own without their eight seconds of imports: every run is forked from one server."""

import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["medart", "bitsandbytes", "train", "extract_features"])


def medart_exit_codes(
    arguments: list[str], log: Path, processes: int = 1, disturbance: tuple[str, int] | None = None, rank: int = -1
) -> list[int]:
    """`script_exit_codes` of medart.py with what happens (see `disturb`) at which micro-batch, counted from 0."""
    prepare = [(disturb, *disturbance)] if disturbance else []
    return script_exit_codes("medart", arguments, log, processes, prepare, rank)


def script_exit_codes(
    script: str,
    arguments: list[str],
    log: Path,
    processes: int = 1,
    prepare: Sequence[tuple[Any, ...]] = (),
    rank: int = -1,
) -> list[int]:
    """Run `script`.main() on the CPU in `processes` processes; rank r writes what it says to `<log>.<r>`.

    `prepare`: functions of the tests with their arguments, called before it in the process `rank` (-1: in all).
    Returns the exit codes by rank, minus the signal's number for a process that a signal killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for mine in range(processes):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if processes > 1:
            environment |= {"RANK": str(mine), "LOCAL_RANK": str(mine), "WORLD_SIZE": str(processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(processes)}
        own = [partial(*call) for call in prepare] if rank in (-1, mine) else []
        process = FORKS.Process(target=_run, args=(script, arguments, environment, f"{log}.{mine}", own))
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
            process.start()  # the first one starts the server, which needs our path to find the script
        started.append(process)
    for process in started:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def _run(script: str, arguments: list[str], environment: dict[str, str], log: str, prepare: list[Any]) -> None:
    from medart_core.errors import exit_codes

    multiprocessing.set_start_method(None, force=True)  # loaders start as they always do, not from the server
    os.setpgrp()
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    for call in prepare:
        call()
    sys.argv = [f"{script}.py", *arguments]
    with exit_codes():
        sys.exit(importlib.import_module(script).main())


def disturb(what: str, micro_batch: int, script: str = "medart", loss_name: str = "denoising_loss") -> None:
    """Let something happen once the loss of a micro-batch is computed: inside its accumulation window."""
    module: Any = importlib.import_module(script)
    real, counted = getattr(module, loss_name), itertools.count()

    def disturbed(*arguments, **options):
        loss = real(*arguments, **options)
        if next(counted) != micro_batch:
            return loss
        if what == "nan loss":
            return loss * float("nan")
        if what == "inf gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        elif what == "nan colour loss":
            module.color_distribution_loss = lambda generated, _: generated.sum() * float("nan")
        elif what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        else:
            for name in what.split():  # signals to the whole group, as from a terminal
                os.killpg(0, getattr(signal, name))
        return loss

    setattr(module, loss_name, disturbed)

"""Scripts in processes of their own without eight seconds of imports: every run is forked from one server."""

import importlib
import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["medart", "bitsandbytes", "VSG", "train", "extract_features", "sample_ddp"])


def start_ranks(target: Callable[..., None], log: Path, of_ranks: Sequence[tuple]) -> list[Any]:
    """Call `target(environment, file, *arguments)` in one process for each tuple of arguments, all at a time.

    `environment` is what torchrun would set, `file` is `<log>.<rank>`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, processes = [], str(len(of_ranks))
    for rank, arguments in enumerate(of_ranks):
        environment = {"ACCELERATE_USE_CPU": "true"}
        if len(of_ranks) > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": processes}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": processes}
        process = FORKS.Process(target=target, args=(environment, f"{log}.{rank}", *arguments))
        with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1"):
            process.start()  # the first one starts the server, which needs our path to find the scripts
        started.append(process)
    return started


def exit_codes(started: Sequence[Any]) -> list[int]:
    """Wait for processes, and kill those that take too long; minus the signal's number where a signal killed one."""
    for process in started:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def fork_ranks(target: Callable[..., None], log: Path, of_ranks: Sequence[tuple]) -> list[int]:
    """`start_ranks`, and their `exit_codes`."""
    return exit_codes(start_ranks(target, log, of_ranks))


def enter(environment: dict[str, str], file: str, argv: list[str]) -> None:
    """Make a forked process look like one that a launcher started, which writes what it says to `file`."""
    multiprocessing.set_start_method(None, force=True)  # loaders start as they always do, not from the server
    os.setpgrp()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and so we, may ignore it
    os.environ.update(environment)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = argv


def medart_exit_codes(
    arguments: list[str], log: Path, processes: int = 1, disturbance: tuple[str, int] | None = None, rank: int = -1
) -> list[int]:
    """`script_exit_codes` of medart.py with what happens (see `disturb`) at which micro-batch, counted from 0."""
    prepare = [(disturb, *disturbance)] if disturbance else []
    return script_exit_codes("medart", arguments, log, processes, prepare, rank)


def script_exit_codes(script: str, *arguments: Any, **options: Any) -> list[int]:
    """`start_script`, and the `exit_codes` of its processes."""
    return exit_codes(start_script(script, *arguments, **options))


def start_script(
    script: str,
    arguments: list[str],
    log: Path,
    processes: int = 1,
    prepare: Sequence[tuple[Any, ...]] = (),
    rank: int = -1,
) -> list[Any]:
    """Run `script`.main() on the CPU in `processes` processes; rank r writes what it says to `<log>.<r>`.

    `prepare`: functions of the tests with their arguments, called before it in the process `rank` (-1: in all).
    """
    own = [partial(*call) for call in prepare]
    ranks = [(script, arguments, own if rank in (-1, mine) else []) for mine in range(processes)]
    return start_ranks(_run, log, ranks)


def _run(environment: dict[str, str], file: str, script: str, arguments: list[str], prepare: list[Any]) -> None:
    from llava_next_captioner.engines import CaptionerError
    from medart_core.errors import exit_codes

    enter(environment, file, [f"{script}.py", *arguments])
    for call in prepare:
        call()
    with exit_codes(CaptionerError):
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
            module.COLOR_LOSSES = dict.fromkeys(
                module.COLOR_LOSSES, lambda generated, _: generated.sum() * float("nan")
            )
        elif what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        else:
            for name in what.split():  # signals to the whole group, as from a terminal
                os.killpg(0, getattr(signal, name))
        return loss

    setattr(module, loss_name, disturbed)

"""Scripts in processes of their own without eight seconds of imports: every run is forked from one server."""

import itertools
import multiprocessing
import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["medart", "sample_ddp", "bitsandbytes"])


def fork_ranks(target: Callable[..., None], log: Path, of_ranks: Sequence[tuple]) -> list[int]:
    """Call `target(environment, file, *arguments)` in one process for each tuple of arguments, all at a time.

    `environment` is what torchrun would set, `file` is `<log>.<rank>`. Returns the exit codes by rank, minus the
    signal's number for a process that a signal killed.
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
            process.start()  # the first one starts the server, which needs our path to find medart
        started.append(process)
    for process in started:
        process.join(TIMEOUT)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def enter(environment: dict[str, str], file: str, argv: list[str]) -> None:
    """Make a forked process look like one that a launcher started, which writes what it says to `file`."""
    multiprocessing.set_start_method(None, force=True)  # loaders start as they always do, not from the server
    os.setpgrp()
    os.environ.update(environment)
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = argv


def medart_exit_codes(
    arguments: list[str], log: Path, processes: int = 1, disturbance: tuple[str, int] | None = None, rank: int = -1
) -> list[int]:
    """Run medart.py on the CPU in `processes` processes; rank r writes what it says to `<log>.<r>`.

    `disturbance`: what happens (see `disturb`) at which micro-batch, counted from 0, of the process `rank` (-1: all).
    Returns the exit codes, see `fork_ranks`.
    """
    of_ranks = [(arguments, disturbance if rank in (-1, mine) else None) for mine in range(processes)]
    return fork_ranks(_medart, log, of_ranks)


def _medart(environment: dict[str, str], file: str, arguments: list[str], disturbance: tuple[str, int] | None) -> None:
    import medart
    from medart_core.errors import exit_codes

    enter(environment, file, ["medart.py", *arguments])
    if disturbance:
        disturb(*disturbance)
    with exit_codes():
        sys.exit(medart.main())


def disturb(what: str, micro_batch: int) -> None:
    """Let something happen once the loss of a micro-batch is computed: inside its accumulation window."""
    import medart

    real, counted = medart.denoising_loss, itertools.count()

    def disturbed(*arguments, **options):
        loss = real(*arguments, **options)
        if next(counted) != micro_batch:
            return loss
        if what == "nan loss":
            return loss * float("nan")
        if what == "inf gradient":
            loss.register_hook(lambda gradient: gradient * float("inf"))
        elif what == "nan colour loss":
            medart.color_distribution_loss = lambda generated, _: generated.sum() * float("nan")
        elif what == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        else:
            for name in what.split():  # signals to the whole group, as from a terminal
                os.killpg(0, getattr(signal, name))
        return loss

    medart.denoising_loss = disturbed

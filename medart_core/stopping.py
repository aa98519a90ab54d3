"""Orderly stops: signals that the loop meets after the step at hand, and processes that end with their launcher."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator

import torch

LAUNCHED = ("LOCAL_RANK", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by accelerate or torchrun
ECHO_SECONDS = 5.0


def launched() -> bool:
    """Whether accelerate's or torchrun's launcher started this process."""
    return any(name in os.environ for name in LAUNCHED)


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a request that the loop meets after the step at hand; a second one ends
    the process at once.

    A launcher repeats the Ctrl-C that the terminal has sent to everyone, and its own end is a signal as well
    (`end_with_launcher`); so under a launcher what comes within `ECHO_SECONDS` is taken for the first signal's echo.
    """

    def __init__(self, say: bool = True) -> None:
        self.say = say
        self.received: int | None = None

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame) -> None:
        if self.received is None:
            self.received, self.since = number, time.monotonic()
            if self.say:
                line = f"\n{signal.Signals(number).name}: saving after this step; once more stops at once\n"
                with contextlib.suppress(OSError):
                    os.write(2, line.encode())  # print may be interrupted by its own signal handler, this may not
        elif not launched() or time.monotonic() - self.since > ECHO_SECONDS:
            os._exit(128 + number)

    @property
    def requested(self) -> bool:
        return self.received is not None

    @property
    def exit_code(self) -> int:
        """128 plus the signal's number, as shells report it: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + (self.received or signal.SIGTERM)


@contextlib.contextmanager
def first_process_first(device: torch.device) -> Iterator[None]:
    """Let the first process do something before the others do; where it fails they end, too, and leave the word to it.

    (accelerate's `main_process_first` would leave them waiting, to fail with a traceback when the connection breaks.)
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    failed = torch.ones(1, device=device)
    if torch.distributed.get_rank():
        torch.distributed.broadcast(failed, 0)
        if failed.item():
            raise SystemExit(2)
        yield
        return
    try:
        yield
        failed.zero_()
    finally:
        torch.distributed.broadcast(failed, 0)


def from_first_process(device: torch.device, *values: int) -> list[int]:
    """The first process's values, on all of them."""
    told = torch.tensor(values, device=device)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.broadcast(told, 0)
    return told.tolist()


def wait_for_all(device: torch.device) -> None:
    """Wait until every process is here; where one has failed, which has said why, the others end with its code."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        try:
            torch.distributed.all_reduce(torch.zeros(1, device=device))
        except RuntimeError as error:  # its connections are closed
            raise SystemExit(2) from error


@contextlib.contextmanager
def together(device: torch.device) -> Iterator[None]:
    """Let every process do its part of something; where one fails, all end after it, and it has the word."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        yield
        return
    failed = torch.ones(1, device=device)
    try:
        yield
        failed.zero_()
    finally:
        try:
            torch.distributed.all_reduce(failed)
        except RuntimeError:  # its connections are closed: another one was ended from outside
            failed.fill_(1)
    if failed.item():
        raise SystemExit(2)


def leave_process_group(_worker: int) -> None:
    """For `DataLoader(worker_init_fn=)`: a Ctrl-C in the terminal shall not end the workers, which the step at hand
    still needs."""
    os.setpgrp()


def end_with_launcher() -> None:
    """Make a process of accelerate or torchrun stop, as by SIGTERM, when its launcher is gone."""
    if not launched():
        return
    launcher = os.getppid()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, see prctl(2)

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()

"""Orderly stops: signals, launchers that die, and numbers that are not finite."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

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

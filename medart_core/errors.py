"""The one error that is the user's to mend, and how a script ends on it.

Scripts import this module before all others: from then on a Ctrl-C while the libraries load, which takes seconds, is
told in one line as well.
"""

import contextlib
import errno
import sys
from collections.abc import Iterator
from types import TracebackType

DISK_FAULTS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EEXIST,
    errno.ENOTDIR, errno.ENAMETOOLONG,
}  # fmt: skip
NO_MEMORY = ("out of memory", "allocate memory")  # what torch says of a GPU's and of the computer's


class UserError(ValueError):
    """Something the user can put right; its message is one line: what is wrong, where, what to do."""


@contextlib.contextmanager
def exit_codes(*others: type[Exception]) -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2, Ctrl-C into 130, both without a traceback.

    `others` are errors of a package that is not ours to import, told in one line as well; so are memory that is too
    small and a disk that cannot be used, wherever in the work that is met.
    """
    try:
        yield
    except KeyboardInterrupt:
        _say_interrupted()
        sys.exit(130)
    except Exception as error:
        if isinstance(error, (UserError, *others)):
            # From a DataLoader's worker it comes with the worker's traceback in front of its own line.
            message = str(error).rpartition(f"{UserError.__name__}: ")[2].strip()
        elif (message := _of_the_machine(error)) is None:
            raise
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)


def _of_the_machine(error: Exception) -> str | None:
    """The line for memory or a disk that does not suffice; None for other errors, which are faults of the program."""
    said = str(error).partition(". GPU ")[0].partition("\n")[0]  # torch goes on with figures of its allocator
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(word in said for word in NO_MEMORY)):
        return (
            f"{said or 'out of memory'}; take a smaller batch size (medart.py: a --preset for the card), "
            "or end what else needs memory"
        )
    if isinstance(error, OSError) and error.errno in DISK_FAULTS:
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror}; make room or mend its permissions, or choose another place"
    return None


def _say_interrupted() -> None:
    print("\ninterrupted", file=sys.stderr, flush=True)


def _uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """As Python does it, but for a Ctrl-C, after which the process still ends as by SIGINT."""
    if issubclass(kind, KeyboardInterrupt):
        _say_interrupted()
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = _uncaught

"""The one error that is the user's to mend, and how a script ends on it."""

import contextlib
import sys
from collections.abc import Iterator


class UserError(ValueError):
    """Something the user can put right; its message is one line: what is wrong, where, what to do."""


@contextlib.contextmanager
def exit_codes(*others: type[Exception]) -> Iterator[None]:
    """Turn a `UserError` into one line on stderr and exit code 2, Ctrl-C into 130, both without a traceback.

    `others` are errors of a package that is not ours to import, told in one line as well.
    """
    try:
        yield
    except (UserError, *others) as error:
        # From a DataLoader's worker it comes with the worker's traceback in front of its own line.
        message = str(error).rpartition(f"{UserError.__name__}: ")[2].strip()
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        sys.exit(130)

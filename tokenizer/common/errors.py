"""What a user meets when something is wrong: one line, never a traceback."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong (file, key, value) and what to do."""


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and leave with its exit code.

    A UserError or a full disk prints one line and leaves with 2, Ctrl-C and SIGTERM (KeyboardInterrupt) with 130.
    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends a job as Ctrl-C does
        code = main() or 0
    except UserError as error:
        code = _say(f"error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt as stop:
        code = _say(str(stop) or "interrupted; what was finished is kept", EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in _FULL_DISK:
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        code = _say(f"error: the disk is full{where}; what was finished is kept, free some space", EXIT_USER_ERROR)
    sys.exit(code)


def _say(line: str, code: int) -> int:
    print(line, file=sys.stderr, flush=True)
    return code

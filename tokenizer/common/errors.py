"""User errors and how an entry point ends: one line and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Faults of a path or a mount, not of the code.
_BAD_PATH = (
    errno.ENOENT, errno.EEXIST, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR,
    errno.EISDIR, errno.EIO, errno.ESTALE,
)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: the mistake (file, key, value) and the way out."""


def one_line(error: BaseException, most: int = 200) -> str:
    """The text of an exception in a line, at most `most` characters; its type if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point and leave with its exit code.

    A UserError, a full disk and a path that cannot be used print one line and leave with 2; Ctrl-C and SIGTERM raise
    KeyboardInterrupt in `main` and leave with 130. Anything else is a defect of ours and keeps its traceback.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path that is not UTF-8 would end a finished job
    try:
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's notice ends a job as Ctrl-C does
        code = main() or 0
    except UserError as error:
        code = say_error(f"error: {error}", EXIT_USER_ERROR)
    except KeyboardInterrupt as stop:
        code = say_error(str(stop) or "interrupted; finished work is kept", EXIT_INTERRUPTED)
    except OSError as error:
        short_write = re.fullmatch(r"\d+ requested and \d+ written", str(error))  # by NumPy, which gives no errno
        if error.errno in FULL_DISK or short_write:
            where = f" while writing {error.filename}" if error.filename else ""
            code = say_error(f"error: the disk is full{where}; finished work is kept, free some space", EXIT_USER_ERROR)
        elif error.errno in _BAD_PATH and error.filename:
            path = str(error.filename)
            shown = path if len(path) <= 200 else f"{path[:100]}..{path[-80:]} ({len(path)} characters)"
            code = say_error(
                f"error: {shown}: {error.strerror}; check the path, its permissions and its mount", EXIT_USER_ERROR
            )
        else:
            raise
    except Exception as error:
        if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise
        cause = getattr(error, "inner_exception", error)
        reason = str(cause).strip().partition("\n")[0]
        line = f"error: a layer cannot be compiled here ({type(cause).__name__}: {reason}); go on without "
        code = say_error(f"{line}run.compile or --compile", EXIT_USER_ERROR)
    sys.exit(code)


def display_name(path: str | os.PathLike[str]) -> str:
    r"""A printable form of any text or file name: bytes that are not UTF-8 and control characters appear as \xNN.

    A line feed would break a one-line message, and an escape sequence would command the terminal.
    """
    text = re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", os.fspath(path))
    return re.sub("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", lambda found: ascii(found[0])[1:-1], text)


def say_error(line: str, code: int = EXIT_USER_ERROR) -> int:
    """Print the line of a mistake; returns the exit code. It may hold names of files, so it is made printable."""
    print(display_name(line), file=sys.stderr, flush=True)
    return code

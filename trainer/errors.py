"""User errors, and output streams that never break a command.

A closed terminal, a pipe without a reader or a log on a full disk does not stop a command. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import shlex
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

LOG_INTERVAL_SECONDS = 30  # time between two lines of a progress bar in a log file


class UserError(Exception):
    """A mistake that the user can fix: one or two lines, printed without a traceback."""

    exit_code = 2


class LostError(UserError):
    """Another process did not appear. The same command may succeed later."""

    exit_code = os.EX_TEMPFAIL


def one_line(error: BaseException) -> str:
    """Returns a library's error message on one line."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def visible(text: str) -> str:
    """The text with escapes for control characters, which data may hold and a terminal would obey."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda found: ascii(found[0])[1:-1], text)


def main_guard(main: Callable[[], int | None], result_on_stdout: bool = False) -> int:
    """Calls an entry point. Turns a `UserError` or an `OSError` into a message on stderr and an exit code.

    Only the first process of a machine prints the message, because all of them have the same error.
    """
    protect_streams(result_on_stdout)
    os.environ.pop("JSONARGPARSE_DEFAULT_ENV", None)  # which would take options from variables
    try:
        code = int(main() or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # before the signal handlers are installed, or a second Ctrl-C
        return 130
    except (UserError, OSError) as error:
        if is_first_on_machine():
            print(f"error: {visible(str(error))}", file=sys.stderr, flush=True)
        return getattr(error, "exit_code", UserError.exit_code)


def is_first_on_machine() -> bool:
    """Whether this process is the only one or the first of its run on this machine, so that it prints messages."""
    read = os.environ.get
    if read("WORLD_SIZE", "1") in {"", "0", "1"}:
        return True
    # with `srun ./launch.sh`, each task counts as a node, even if tasks share a machine
    is_later_task = read("GROUP_RANK") == read("SLURM_PROCID") and read("SLURM_LOCALID", "0") != "0"
    return read("LOCAL_RANK", "0") == "0" and not is_later_task


@cache
def print_once(line: str, quiet: bool) -> None:
    """Prints a line to stderr, once per machine."""
    if not quiet and is_first_on_machine():
        print(visible(line), file=sys.stderr)


def quote_path(path: str | Path) -> str:
    """Quotes a path for a shell, so that it can also follow an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


class _Stream(io.FileIO):
    """stdout or stderr; drops what cannot be written."""

    ignored_error: type[OSError] = OSError

    def write(self, data: Any) -> int:
        """Writes or drops the data. Raises the first error that is not an `ignored_error`."""
        try:
            written = super().write(data)
        except OSError as error:
            # a lost reader never returns, also for child processes; a full disk may get space again
            if error.errno != errno.ENOSPC or not isinstance(error, self.ignored_error):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, self.ignored_error):
                raise OSError(f"the result cannot be written to stdout: {error.strerror}") from None
            written = None
        return len(data) if written is None else written  # None: the descriptor would block


def protect_streams(result_on_stdout: bool) -> None:
    """Makes sure that no write to stdout or stderr fails.

    Args:
        result_on_stdout: stdout is the result. A reader may stop early, but other errors are raised.
    """
    for number in range(3):  # the next file that is opened would get the number of a closed stream
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # replaced, as in tests and notebooks
            continue
        raw = _Stream(number, "w", closefd=False)
        if result_on_stdout and number == 1:
            raw.ignored_error = BrokenPipeError
        encoding, errors = "utf-8", "backslashreplace"
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
            encoding, errors = stream.encoding, "backslashreplace" if stream.errors == "strict" else stream.errors
        is_line_buffered = number == 2 or raw.isatty()
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=is_line_buffered))


class _LogLines(io.TextIOBase):
    """stderr for a progress bar in a log file: each update is a line."""

    def write(self, text: str) -> int:
        """Writes a line unless it is blank."""
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")
        return len(text)

    def flush(self) -> None:
        """Flushes stderr."""
        sys.stderr.flush()


def bar_settings(log_seconds: float = LOG_INTERVAL_SECONDS) -> dict[str, Any]:
    """Returns settings of tqdm: a bar on a terminal, a line every `log_seconds` in a log file."""
    if sys.stderr.isatty():
        return {"file": sys.stderr, "dynamic_ncols": True, "mininterval": 0.2}
    return {"file": _LogLines(), "delay": log_seconds, "mininterval": log_seconds, "maxinterval": log_seconds}

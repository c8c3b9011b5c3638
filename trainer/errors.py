"""Mistakes a user can correct, and how every command tells them.

Always holds: a command never fails because nobody reads its messages: a closed terminal, a pipe whose reader has left,
a log on a full disk. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
from functools import cache
from pathlib import Path
from typing import Any

LOG_SECONDS = 30
"""between the lines of a progress bar in a log file"""


class UserError(Exception):
    """A mistake the user can mend: one or two lines, shown without a traceback; the program ends with exit code 2."""


def one_line(error: Exception) -> str:
    """What a library says of an error, in one line."""
    return " ".join(str(error).split())[:240] or type(error).__name__


def main_guard(main: Any, result_on_stdout: bool = False) -> int:
    """Calls an entry point; a `UserError`, or a disk's, becomes its lines on stderr and exit code 2.

    Only the first process of a machine prints, since all of them meet the same mistake.
    """
    keep_streams(result_on_stdout)
    try:
        code = int(main() or 0)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:  # before a run has its own way to stop, or a second Ctrl-C
        return 130
    except (UserError, OSError) as error:
        if speaks_for_its_machine():
            print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def speaks_for_its_machine() -> bool:
    """Whether this process is alone or the first of its run on this machine, so that its words are read once."""
    environment = os.environ
    if environment.get("WORLD_SIZE", "1") in {"", "0", "1"}:
        return True
    # each task of `srun ./launch.sh` is a node to torchrun, also where several share a machine
    joined = environment.get("GROUP_RANK") == environment.get("SLURM_PROCID")
    return {environment.get("LOCAL_RANK", "0"), environment.get("SLURM_LOCALID", "0") if joined else "0"} == {"0"}


@cache
def say_once(line: str, quiet: bool) -> None:
    """A line on stderr from the first process of a machine."""
    if not quiet and speaks_for_its_machine():
        print(line, file=sys.stderr)


def quoted(path: str | Path) -> str:
    """A path as it is typed in a shell, also behind an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


class _Stream(io.FileIO):
    """The raw end of stdout or stderr; what cannot be written is dropped."""

    forgiven: type[OSError] = OSError

    def write(self, data: Any) -> int:
        """Writes, or drops; other errors than the forgiven ones are raised once."""
        try:
            written = super().write(data)
        except OSError as error:
            # the reader is gone for good, also for child processes; room on a disk may come back
            if error.errno != errno.ENOSPC or not isinstance(error, self.forgiven):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if not isinstance(error, self.forgiven):
                raise OSError(f"the result cannot be written to stdout: {error.strerror}") from None
            written = None
        return len(data) if written is None else written  # None: the descriptor would have blocked


def keep_streams(result_on_stdout: bool) -> None:
    """From now on nothing fails because stdout or stderr cannot be written.

    Args:
        result_on_stdout: stdout holds what the user asked for: a reader may leave early, other errors are raised.
    """
    for number in range(3):  # a closed one would become the first file that is opened
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):  # somebody else's, as in tests and notebooks
            continue
        raw = _Stream(number, "w", closefd=False)
        if result_on_stdout and number == 1:
            raw.forgiven = BrokenPipeError
        encoding, errors = "utf-8", "backslashreplace"
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.flush()
            encoding, errors = stream.encoding, stream.errors
        lines = number == 2 or raw.isatty()
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), encoding, errors, line_buffering=lines))


class _Lines(io.TextIOBase):
    """stderr for a progress bar where it is no terminal: each state of the bar is a line of its own."""

    def write(self, text: str) -> int:
        """Writes a line unless it is blank."""
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")
        return len(text)

    def flush(self) -> None:
        """Flushes stderr."""
        sys.stderr.flush()


def bar_settings(log_seconds: float = LOG_SECONDS) -> dict[str, Any]:
    """Settings of tqdm: a moving bar on a terminal; elsewhere a line now and then, where it takes that long."""
    if sys.stderr.isatty():
        return {"file": sys.stderr, "dynamic_ncols": True, "mininterval": 0.2}
    return {"file": _Lines(), "delay": log_seconds, "mininterval": log_seconds, "maxinterval": log_seconds}

"""What a command tells: streams that nobody reads, progress bars in log files, paths in commands and in errors.

Always holds: a command never fails because its messages find no reader: a closed terminal, a pipe whose reader has
left, a log on a full disk. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LOG_SECONDS = 30
"""between the lines of a progress bar in a log file"""


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


def quoted(path: str | Path) -> str:
    """A path as it is typed in a shell, also behind an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Names the path in an error of the disk, which often tells only that no space is left.

    Raises:
        OSError: for every such error inside, also of libraries in Rust, which raise their own kinds.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None

"""Locks on folders that several processes, users and machines may share.

Always holds: one command at a time has a run folder, also where the file system knows no locks. The lock of a cache
only saves work: what is put there appears whole, so a process that gets no lock goes on without one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from trainer.config.schema import UserError, speaks_for_its_machine
from trainer.console import quoted

RUN_LOCKS = (".lock", ".lock-file")
"""in a run folder: the file that the system locks; the one that is a lock by being there, where it cannot"""
WITHOUT_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""what flock gives on file systems without locks: Lustre, NFS without its lock service"""
OTHERS_WRITE = 0o022
PROBE = 2**16
"""bytes that a disk must have room for"""
SOON = 10
PATIENCE = 600
"""seconds after which a wait for another process that fills the cache is told, and given up"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a run folder, which is made if it is not there and removed again if nothing was put into it.

    Raises:
        UserError: it is in use, or cannot be written.
    """
    place = folder / RUN_LOCKS[0]
    try:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        lock: BaseFileLock = FileLock(place, mode=_mode(folder), timeout=0, fallback_to_soft=False, on_acquired=_sign)
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            place = folder / RUN_LOCKS[1]
            lock = SoftFileLock(place, timeout=0)
            lock.acquire()
    except Timeout:
        raise UserError(_in_use(folder, place)) from None
    except OSError as error:
        raise UserError(f"run.output_dir: {folder} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        if made and not {path.name for path in folder.iterdir()} - set(RUN_LOCKS):
            (folder / RUN_LOCKS[0]).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # the first that is not empty
            for path in made:
                path.rmdir()


@contextlib.contextmanager
def taking_turns(path: Path, quiet: bool) -> Iterator[Path]:
    """Inside, one process at a time prepares `path`, a part of a cache; all at once where there are no locks.

    Gives the path to write it under before it is renamed: one that no other process writes.
    """
    lock = FileLock(f"{path}.lock", mode=_mode(path.parent), fallback_to_soft=False)
    with contextlib.suppress(OSError):  # no locks here, another user's file, or a holder that does not end
        try:
            lock.acquire(timeout=SOON)
        except Timeout:
            say_once(f"waiting for another process that prepares the same data (it holds {path}.lock)", quiet)
            lock.acquire(timeout=PATIENCE)
    try:
        yield path.with_suffix(".part" if lock.is_locked else f".{secrets.token_hex(8)}.part")
    finally:
        lock.release()


def share(path: Path) -> None:
    """Lets those who may write a folder use what was put into it, whatever the umask."""
    for part in (path, *path.rglob("*")):
        mode = part.parent.stat().st_mode
        if mode & OTHERS_WRITE:
            with contextlib.suppress(OSError):  # some network file systems have one mode for all
                part.chmod(mode & 0o2777 if part.is_dir() else mode & 0o666)


@cache
def say_once(line: str, quiet: bool) -> None:
    """A line on stderr from the first process of a machine."""
    if not quiet and speaks_for_its_machine():
        print(line, file=sys.stderr)


def _mode(folder: Path) -> int:
    """Of a lock file; -1: by the umask."""
    mode = folder.stat().st_mode
    return mode & 0o666 | 0o600 if mode & OTHERS_WRITE else -1


def _sign(descriptor: int) -> None:
    """Notes who holds a lock, as `SoftFileLock` does; fails on a full disk."""
    os.pwrite(descriptor, b"\n" * PROBE, 0)
    os.fsync(descriptor)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n{socket.gethostname()}\n".encode(), 0)


def _in_use(folder: Path, lock: Path) -> str:
    try:
        pid, host, *_ = lock.read_text(errors="replace").split()
        holder = f" (process {pid} on {host})"
    except (OSError, ValueError):
        holder = ""
    return (
        f"{folder} is in use by another running command{holder}; choose another --run.name\n"
        f"Should that machine or process be gone, this frees the folder: rm {quoted(lock)}"
    )

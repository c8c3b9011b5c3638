"""The one way to the disk: whole files, whole folders, and locks on folders that several processes share.

Always holds: a file or folder appears whole under its name, or not at all. It is written under another name, synced to
disk and renamed. One command at a time has a run folder, also where the file system has no locks. The lock of a cache
only saves work: a process that gets none goes on without it. Imports no torch.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from trainer.errors import UserError, quoted, say_once

UNFINISHED = ".unfinished-"
"""begins the name of what is still being written"""
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


def publish(unfinished: Path, target: Path) -> None:
    """Gives a finished file or folder its name, once all of it is on disk; replaces what had the name."""
    for path in (unfinished, *unfinished.rglob("*")):
        _sync(path)
    if target.is_dir():
        shutil.rmtree(target)
    unfinished.replace(target)
    _sync(target.parent)


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed writer left; call it while holding the run folder's lock."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(target: Path, files: dict[str, bytes]) -> None:
    """Puts a folder with these files in place, all or nothing, on disk when it returns.

    Raises:
        OSError: the disk is full or not writable; nothing was changed.
    """
    temporary = target.parent / f"{UNFINISHED}{target.name}"
    retired = target.parent / f"{UNFINISHED}old-{target.name}"
    try:
        for path in (temporary, retired):
            shutil.rmtree(path, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            _write_synced(temporary / name, data)
        for folder in {(temporary / name).parent for name in files} | {temporary}:
            _sync(folder)
        if target.exists():
            target.rename(retired)
        temporary.rename(target)
        _sync(target.parent)
        shutil.rmtree(retired, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise OSError(f"cannot save {target}: {error.strerror or error}; what was saved before is whole") from None


def write_atomic(path: Path, data: str | bytes) -> None:
    """Writes one file, all or nothing.

    Raises:
        OSError: the disk is full or not writable; the file that was there is unchanged.
    """
    temporary = path.with_name(f"{UNFINISHED}{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_synced(temporary, data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            temporary.replace(path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


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


def _write_synced(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Rows as csv."""
    lines: list[str] = []
    writer: Any = csv.writer(SimpleNamespace(write=lines.append))  # its line end, "\r\n", has a lone "\r" quoted
    writer.writerows(rows)
    return "".join(f"{line[:-2]}\n" for line in lines)

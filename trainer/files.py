"""The only way to disk: whole files, whole folders, and locks on folders that several processes share.

A file or folder appears complete or not at all: it is written under a temporary name, synced and renamed. Only one
command at a time uses a run folder, even if the file system has no locks. Imports no torch.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from trainer.errors import UserError, print_once, quote_path

UNFINISHED = ".unfinished-"  # prefix of a temporary name
RUN_LOCKS = (".lock", ".lock-file")
"""in a run folder: the file that the system locks; the file whose existence is the lock if the system cannot"""
NO_LOCK_ERRORS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""errors of flock on file systems without locks: Lustre, NFS without its lock service"""
WRITE_BY_OTHERS = 0o022
MESSAGE_SECONDS = 10  # time after which a process says that it waits for the cache lock of another
LOCK_TIMEOUT_SECONDS = 600  # time after which it prepares the data without the lock


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Adds the path to the message of a disk error, also of Rust libraries, which have their own error types."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise OSError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from None


def publish(unfinished: Path, target: Path) -> None:
    """Syncs a finished file or folder and gives it its name. Replaces what had the name."""
    for path in (unfinished, *unfinished.rglob("*")):
        _sync(path)
    retired = target.parent / f"{UNFINISHED}old-{target.name}"
    if target.is_dir():
        shutil.rmtree(retired, ignore_errors=True)
        target.rename(retired)
    try:
        unfinished.rename(target)
    except OSError:
        if retired.exists() and not target.exists():
            retired.rename(target)
        raise
    _sync(target.parent)
    shutil.rmtree(retired, ignore_errors=True)


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left. Hold the run folder's lock to call it."""
    for path in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(path, ignore_errors=True)


def replace_folder(target: Path, files: dict[str, bytes]) -> None:
    """Writes a folder with these files. If that raises an `OSError`, nothing has changed."""
    temporary = target.parent / f"{UNFINISHED}{target.name}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for name, data in files.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            write_synced(temporary / name, data)
        publish(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot save {target}: {error.strerror or error}; what was saved before is unchanged") from None


def write_atomic(path: Path, data: str | bytes, is_shared: bool = False) -> None:
    """Writes one file. If that raises an `OSError`, the old file is unchanged.

    Several processes may write a file that `is_shared`: the last one counts.
    """
    temporary = path.with_name(f"{UNFINISHED}{secrets.token_hex(8) if is_shared else path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_synced(temporary, data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
            temporary.replace(path)
            _sync(path.parent)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Formats rows as CSV. Lines end with a newline only."""
    lines: list[str] = []
    writer: Any = csv.writer(SimpleNamespace(write=lines.append))  # the default line end makes it quote a lone "\r"
    writer.writerows(rows)
    return "".join(f"{line[:-2]}\n" for line in lines)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads the records of metrics.jsonl. Skips damaged lines, which a killed run may leave."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            if isinstance(record["step"], int | float):
                records.append(record)
    return records


@contextlib.contextmanager
def hold_run_folder(folder: Path) -> Iterator[None]:
    """Locks a run folder. Creates it if needed, and removes it again if it stays empty."""
    path = folder / RUN_LOCKS[0]
    try:
        created = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        mode = _lock_mode(folder)
        lock: BaseFileLock = FileLock(path, mode=mode, timeout=0, fallback_to_soft=False, on_acquired=_record_holder)
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCK_ERRORS:
                raise
            path = folder / RUN_LOCKS[1]
            lock = SoftFileLock(path, timeout=0)
            lock.acquire()
    except Timeout:
        raise UserError(_describe_holder(folder, path)) from None
    except OSError as error:
        raise UserError(f"run.output_dir: {folder} cannot be written: {error.strerror or error}") from None
    try:
        yield
    finally:
        if created and not {path.name for path in folder.iterdir()} - set(RUN_LOCKS):
            (folder / RUN_LOCKS[0]).unlink(missing_ok=True)
        lock.release()
        with contextlib.suppress(OSError):  # stops at the first folder that is not empty
            for path in created:
                path.rmdir()


@contextlib.contextmanager
def lock_cache_entry(path: Path, quiet: bool) -> Iterator[Path]:
    """Lets one process at a time prepare `path`, an entry of a cache. Yields a temporary path that is only its own.

    The lock only saves work: without it, several processes prepare the same entry.
    """
    lock = FileLock(f"{path}.lock", mode=_lock_mode(path.parent), fallback_to_soft=False)
    with contextlib.suppress(OSError):  # no locks, another user's lock file, or a timeout
        try:
            lock.acquire(timeout=MESSAGE_SECONDS)
        except Timeout:
            print_once(f"waiting for another process that prepares the same data (it holds {path}.lock)", quiet)
            lock.acquire(timeout=LOCK_TIMEOUT_SECONDS)
    try:
        yield path.with_suffix(".part" if lock.is_locked else f".{secrets.token_hex(8)}.part")
    finally:
        lock.release()


def share(path: Path) -> None:
    """Gives all users who can write to a folder access to new files in it, whatever the umask."""
    for part in (path, *path.rglob("*")):
        mode = part.parent.stat().st_mode
        if mode & WRITE_BY_OTHERS:
            with contextlib.suppress(OSError):  # some network file systems have one fixed mode
                part.chmod(mode & 0o2777 if part.is_dir() else mode & 0o666)


def _lock_mode(folder: Path) -> int:
    """Returns the mode of a lock file; -1 = by the umask."""
    mode = folder.stat().st_mode
    return mode & 0o666 | 0o600 if mode & WRITE_BY_OTHERS else -1


def _record_holder(descriptor: int) -> None:
    """Writes process and host into a lock file, as `SoftFileLock` does."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n{socket.gethostname()}\n".encode(), 0)


def _describe_holder(folder: Path, lock: Path) -> str:
    try:
        pid, host, *_ = lock.read_text(errors="replace").split()
        holder = f" (process {pid} on {host})"
    except (OSError, ValueError):
        holder = ""
    return (
        f"{folder} is in use by another running command{holder}; choose another --run.name\n"
        f"If that process no longer exists, free the folder: rm {quote_path(lock)}"
    )


def write_synced(path: Path, data: bytes) -> None:
    """Writes a file and waits until its content is on disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

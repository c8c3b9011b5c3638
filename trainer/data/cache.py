"""The cache of prepared data: folders of files that are mapped into memory, not loaded.

Always holds: the name of an entry contains a hash of all that its content depends on, so changed data never meets an
old entry. An entry is used only if each file still has the hash that was stored with it. A cache that cannot be used
costs time, and stops no run. It lies in the cache folder of `datasets`.
"""

from __future__ import annotations

import json
import mmap
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import xxhash

from trainer.errors import print_once
from trainer.files import lock_cache_entry, publish, share, write_atomic

HASHES = "hashes.json"
HASHED_BYTES = 2**26
"""bytes that are hashed at a time"""


Files = dict[str, mmap.mmap]
"""the files of an entry, by name"""


def load_or_create(name: str, create: Callable[[Path], None], quiet: bool) -> Files | None:
    """Loads an entry of the cache, or creates it; None if the cache cannot be used, as in a read-only home.

    `create` writes the files into the folder it gets.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "isotrain"
    try:
        for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            path.mkdir(exist_ok=True)
            share(path)
        with lock_cache_entry(folder / name, quiet) as unfinished:
            return _load(folder / name) or _create(folder / name, unfinished, create)
    except OSError as error:
        print_once(f"note: continuing without the cache {folder} (HF_DATASETS_CACHE): {error.strerror or error}", quiet)
        return None


def release_memory(file: Any) -> None:
    """Gives the memory of a mapped file back to the system, which reads the file again on the next access."""
    if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)


def _load(path: Path) -> Files | None:
    """An entry; None if it is absent or damaged."""
    try:
        hashes = json.loads((path / HASHES).read_text(encoding="utf-8"))
        files = {name: _map(path / name) for name in hashes}
        return files if hashes == {name: _hash(file) for name, file in files.items()} else None
    except (OSError, ValueError, TypeError):
        return None


def _create(path: Path, unfinished: Path, create: Callable[[Path], None]) -> Files:
    shutil.rmtree(unfinished, ignore_errors=True)  # left by a process that was killed
    unfinished.mkdir()
    try:
        create(unfinished)
        files = {file.name: _map(file) for file in sorted(unfinished.iterdir())}
        write_atomic(unfinished / HASHES, json.dumps({name: _hash(file) for name, file in files.items()}))
        share(unfinished)
        publish(unfinished, path)
        return files
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _map(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _hash(content: mmap.mmap) -> str:
    digest = xxhash.xxh3_128()  # as fast as memory; it finds damage, and does not stop an attacker
    with memoryview(content) as view:
        for start in range(0, len(view), HASHED_BYTES):
            digest.update(view[start : start + HASHED_BYTES])
            release_memory(content)
    return str(digest.hexdigest())

"""Where a split is read from: files, folders of part files, or a hub data set.

Always holds: what is read is what the path names, in the order of the names. No other place is searched. A path that
does not exist is an error at once, and only `owner/name` is looked up on the hub.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.config.schema import ResolvedSource, Source
from trainer.data import formats
from trainer.data.formats import Chunk, Request, file_type
from trainer.errors import UserError, one_line

LFS_POINTER = b"version https://git-lfs.github.com"

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/\w[\w.-]*(/\w[^/\\:]*)?(:\w[\w.+-]*)?")
# a hub name like this needs its split: owner/name.abc:train
_FILE_NAME = re.compile(r".*\.([a-z]{3,7}|gz|pq)", re.IGNORECASE)
_PART = re.compile(r"part[-_.]?\d.*")  # written by Spark, Dask and others
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class Origin:
    """The files of a split. They exist; only the names of classes were read."""

    name: str
    """train, validation, test, or input when predicting"""
    source: ResolvedSource
    paths: list[str]
    """its files in order; for a hub data set those of its cache"""
    class_names: list[str] | None
    """names that the files store for their class numbers"""

    @property
    def option(self) -> str:
        """The option that named it."""
        return option_name(self.name)

    def hash_files(self) -> list[str]:
        """SHA-256 of each file."""
        hashes = []
        for path in self.paths:
            with open(path, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        return hashes

    def read_chunks(self, wanted: list[str]) -> Iterator[tuple[int, Chunk]]:
        """Reads all rows in order, each chunk with the position of its file in `paths`.

        Columns that are not wanted may be empty or absent, but are named once.
        """
        request = Request(self.source, wanted, option_prefix(self.name))
        first: tuple[str, set[str]] | None = None
        for index, path in enumerate(self.paths):
            columns: set[str] = set()
            with _refusals(self.option, path):
                may_lack_columns = file_type(path) in (".json", *formats.LINES)
                for count, chunk in formats.read_file(path, request):
                    columns.update(set(chunk) & set(wanted))
                    # also without rows: its header may be a row of a file without one
                    if chunk and not may_lack_columns:
                        first = first or (path, columns)
                        for column in sorted(columns ^ first[1]):
                            lacks, has = (path, first[0]) if column in first[1] else (first[0], path)
                            raise ValueError(f"column {column!r} is in {has}, and not in {lacks}")
                    yield index, (count, chunk)


def option_name(name: str) -> str:
    """The option that names a split's source."""
    return f"data.{name}" if name != "input" else "--input"


def option_prefix(name: str) -> str:
    """What a split's own options begin with."""
    return {"input": "--", "train": "--data."}.get(name, f"--data.{name}.")


def for_each(names: Iterable[str], work: Callable[[str], _Part]) -> dict[str, _Part]:
    """Returns {name: work(name)}. Raises the mistakes of all names together."""
    parts: dict[str, _Part] = {}
    problems: list[str] = []
    for name in names:
        try:
            parts[name] = work(name)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return parts


def is_hub_id(path: str) -> bool:
    """Whether a path is `owner/name[/config][:split]`, and no file or folder here has that name."""
    match = _HUB_ID.fullmatch(path)
    if match is None or os.path.exists(path) or os.path.exists(match[1]):
        return False
    return match[3] is not None or not _FILE_NAME.fullmatch(path)


def check_paths(sources: dict[str, str | Source | None]) -> None:
    """Refuses all paths that name no file; reads no rows and no hub."""
    paths = {name: source.path if isinstance(source, Source) else source or "" for name, source in sources.items()}
    for_each(
        [name for name, path in paths.items() if path and not is_hub_id(path)],
        lambda name: find_files(name, paths[name]),
    )


def list_files(path: str, name: str = "input") -> list[str]:
    """Lists the files that a path, a glob or a folder of part files names, in the order of their names."""
    if os.path.isdir(path):  # Path.is_dir raises if a name is too long
        return _files_in(Path(path), name)
    if os.path.isfile(path) or not glob.has_magic(path):  # a file may be called [a].csv
        return [path] if os.path.exists(path) else []
    found: list[str] = []
    for match in sorted(set(glob.glob(path, recursive=True))):
        if not Path(match).is_dir():
            if Path(match).suffix or not Path(match).name.startswith("_"):  # Spark writes _SUCCESS
                found.append(match)
        elif "**" not in path:  # ** matches the files in the folder too
            found += _files_in(Path(match), name)
    return found


def find_files(name: str, path: str) -> list[str]:
    """Lists the files that a split's path names, at least one. Refuses types that are not supported."""
    option = option_name(name)
    with _refusals(option):
        paths = list_files(path, name)
    if not paths:
        hint = f"; a hub data set of this name is written {path}:train" if _HUB_ID.fullmatch(path) else ""
        raise UserError(f"{option}: no file {path!r}{hint}")
    for file in paths:
        with _refusals(option, file):
            _check_file(file)
    return paths


def find_origin(name: str, source: ResolvedSource) -> Origin:
    """Finds the files of a source, and the class names in them."""
    paths = _fetch_hub(name, source.path) if is_hub_id(source.path) else find_files(name, source.path)
    label_column = None if source.label_columns else source.label_column
    stored: list[list[str] | None] = []
    for path in paths:
        with _refusals(option_name(name), path):
            stored.append(formats.read_class_names(path, label_column))
            if stored[-1] != stored[0]:
                raise ValueError(f"the stored class names of {label_column!r} are not those of {paths[0]}")
    return Origin(name, source, paths, stored[0])


def _check_file(file: str) -> None:
    if file_type(file) not in formats.FILE_TYPES:
        raise ValueError(f"has an unsupported type (supported: {', '.join((*formats.FILE_TYPES, *formats.PACKED))})")
    if not Path(file).is_file():
        raise ValueError("is not a file")
    with open(file, "rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError("is a Git LFS pointer, not the data; fetch it with git lfs pull")


def _files_in(folder: Path, name: str) -> list[str]:
    """Lists the files of a folder that holds one table: part files, or what `save_to_disk` wrote."""
    if (folder / "dataset_dict.json").is_file() and (folder / name).is_dir():
        folder = folder / name
    if (folder / "state.json").is_file():  # the folder may still hold files of an earlier `save_to_disk`
        with open(folder / "state.json", encoding="utf-8") as file:
            try:
                return [str(folder / part["filename"]) for part in json.load(file)["_data_files"]]
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{folder / 'state.json'} was not written by save_to_disk") from None
    entries = sorted(os.listdir(folder))
    if {"_delta_log", "_temporary"} & set(entries):
        raise ValueError(f"{folder} is a Delta table, or the output of an unfinished Spark job; export it as parquet")
    parts = [entry for entry in entries if not entry.startswith((".", "_"))]
    if not parts or not all(_PART.fullmatch(part) and (folder / part).is_file() for part in parts):
        raise ValueError(f"{folder} is a folder; name what belongs to this split, as '{folder}/*.csv'")
    return [str(folder / part) for part in parts]


@contextlib.contextmanager
def _refusals(option: str, path: str | None = None) -> Iterator[None]:
    """Names the option and the path in errors of files."""
    try:
        yield
    except formats.UNREADABLE as error:
        place = option if path is None else f"{option}: {path}"
        raise UserError(f"{place}: {one_line(error)}") from None


def _fetch_hub(name: str, path: str) -> list[str]:
    """Fetches `owner/name[/config][:split]` from the hub or its cache; returns the files of the cache."""
    import datasets  # this takes most of a second, and local files do not need it

    name_on_hub, _, split = path.partition(":")
    owner, repository, *settings = name_on_hub.split("/")
    try:
        table = datasets.load_dataset(f"{owner}/{repository}", *settings, split=split or name, keep_in_memory=False)
    except Exception as error:  # its loaders raise anything
        option, reason = option_name(name), one_line(error.__cause__ or error)[:160]
        raise UserError(
            f"{option}: {path!r} was not found as a local file, in the cache, or on the hub ({reason})\n"
            f"Use local files: --{option.removeprefix('--')} FILE.csv (csv, tsv, json, jsonl, parquet), "
            "or run once where the hub answers."
        ) from None
    return [file["filename"] for file in table.cache_files]

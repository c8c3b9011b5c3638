"""Where a split is read from: files, folders of part files, or a hub data set -> columns, a chunk of rows at a time.

Always holds: what is read is what the path names, in the order of the names. No other place is searched: a path that
does not exist is an error at once, and only `owner/name` is looked up on the hub.
"""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config.schema import Source
from trainer.data.formats import (
    CHUNK,
    FILE_TYPES,
    LINES,
    PACKED,
    UNREADABLE,
    Chunk,
    Request,
    arrow_chunks,
    kind_of,
    read_file,
    stored_class_names,
)  # fmt: skip
from trainer.errors import UserError

if TYPE_CHECKING:  # importing it takes most of a second, and files need none of it
    import datasets

PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".joblib")

LFS_POINTER = b"version https://git-lfs.github.com"

_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*)/\w[\w.-]*(/\w[^/\\:]*)?(:\w[\w.+-]*)?")
_FILE_NAME = re.compile(r".*\.[A-Za-z]{3,7}")  # a hub name of this form is written with its split: owner/name.abc:train
_PART = re.compile(r"part[-_.]?\d.*")  # of Spark, Dask and others


@dataclass(frozen=True)
class Origin:
    """Where a split is read from; its files are there, and nothing of them is read but the names of classes."""

    name: str
    source: Source
    paths: list[str]
    """its files in their order; of a hub data set those of its cache"""
    hub: datasets.Dataset | None = None
    class_names: list[str] | None = None
    """names that a data set stores for its class numbers"""

    @property
    def option(self) -> str:
        """The option that named it."""
        return option_name(self.name)

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(Path(path).stat().st_size for path in self.paths)

    def content(self) -> list[str]:
        """SHA-256 of each file."""
        return [_hash_of(path) for path in self.paths]

    def chunks(self, wanted: list[str]) -> Iterator[tuple[int, Chunk]]:
        """All rows in order, with the position of their file in `paths` (0 for a hub data set).

        Columns that are not wanted may be empty or absent, but are named once.

        Raises:
            UserError: what cannot be read.
        """
        if self.hub is None:
            yield from _file_chunks(self, wanted)
        else:
            yield from ((0, chunk) for chunk in _hub_chunks(self, wanted))


def option_name(name: str) -> str:
    """The option that names a split's source."""
    return f"data.{name}" if name != "input" else "--input"


def option_prefix(name: str) -> str:
    """What the options of a split's own source begin with."""
    return {"input": "--", "train": "--data."}.get(name, f"--data.{name}.")


def is_hub_id(path: str) -> bool:
    """Whether a `data` entry is `owner/name[/config][:split]`, and nothing here has that name."""
    match = _HUB_ID.fullmatch(path)
    if match is None or os.path.exists(path) or os.path.exists(match[1]):
        return False
    return match[3] is not None or not (_FILE_NAME.fullmatch(path) or _has_file_type(path))


def _has_file_type(path: str) -> bool:
    return Path(path).suffix.lower() in (*FILE_TYPES, *PACKED, *PICKLED)


def files_of(path: str, name: str = "input") -> list[str]:
    """The files that a path, a glob or a folder of part files names, in the order of their names; [] = none.

    Raises:
        ValueError: a folder that is no single table, or a file that is named twice.
    """
    if os.path.isdir(path):  # not Path's, which raises where a name is too long
        return _files_in(Path(path), name)
    if os.path.isfile(path) or not glob.has_magic(path):  # a file may really be called [a].csv
        return [path] if os.path.exists(path) else []
    found: list[str] = []
    for match in sorted(set(glob.glob(path, recursive=True))):
        if not Path(match).is_dir():
            if Path(match).suffix or not Path(match).name.startswith("_"):  # not _SUCCESS of Spark
                found.append(match)
        elif "**" not in path:  # ** has matched what is in the folder, too
            found += _files_in(Path(match), name)
    same = {os.path.realpath(file): file for file in found}
    if len(same) < len(found):
        twice = next(file for file in found if same[os.path.realpath(file)] != file)
        raise ValueError(f"{path!r} matches the same file as {twice} and {same[os.path.realpath(twice)]}")
    return found


def find_files(name: str, path: str) -> list[str]:
    """The files that a split's path names, all of types that can be read.

    Raises:
        UserError: there are none, or of no known type.
    """
    where = option_name(name)
    try:
        paths = files_of(path, name)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if not paths:
        if glob.has_magic(path):
            raise UserError(f"{where}: no file matches {path!r}")
        hub = f"owner/name, and with its split where the name ends like a file: {path}:train"
        hub = hub if _HUB_ID.fullmatch(path) and _FILE_NAME.fullmatch(path) else "owner/name"
        hint = "" if _has_file_type(path) or Path(path).is_absolute() else f"; a hub data set is written {hub}"
        raise UserError(f"{where}: no file {path!r}{hint}")
    for file in paths:
        if Path(file).suffix.lower() in PICKLED:
            raise UserError(f"{where}: {file} is a pickled file, which can run code when read; refused. Save it as csv")
        try:
            kind = kind_of(file)
        except UNREADABLE as error:
            raise UserError(f"{where}: {file}: {_one_line(error)}") from None
        if kind not in FILE_TYPES:
            raise UserError(f"{where}: {file} is of no known type ({', '.join((*FILE_TYPES, *PACKED))})")
        if not Path(file).is_file():
            raise UserError(f"{where}: {file} is not a file")
        with open(file, "rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{where}: {file} is a Git LFS pointer, not the data; fetch it with git lfs pull")
    return paths


def check_places(sources: dict[str, str | Source | None]) -> None:
    """Refuses paths that name no file, all of them at once; reads no rows and asks no hub."""
    problems = []
    for name, source in sources.items():
        path = source.path if isinstance(source, Source) else source
        try:
            if path and not is_hub_id(path):
                find_files(name, path)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))


def find_origin(name: str, source: Source) -> Origin:
    """The files or the hub data set that a source names.

    Raises:
        UserError: it is not there, or cannot be read.
    """
    if is_hub_id(source.path):
        return _find_hub(name, source)
    paths = find_files(name, source.path)
    origin = Origin(name, source, paths)
    names: list[str] | None = None
    for path in paths:
        with _refusals(origin, path):
            stored = stored_class_names(path, source.label_column or "")
            if path != paths[0] and stored != names:
                raise ValueError(f"the stored class names of {source.label_column!r} are not those of {paths[0]}")
            names = stored
    return dataclasses.replace(origin, class_names=names)


def _files_in(folder: Path, name: str) -> list[str]:
    """The files of a folder that one table was saved to: by `save_to_disk`, or as part files."""
    if (folder / "dataset_dict.json").is_file():
        splits = _saved_names(folder / "dataset_dict.json")
        if name not in splits:
            raise ValueError(f"{folder} holds the splits {', '.join(splits)}; name one, as {folder / splits[0]}")
        folder = folder / name
    if (folder / "state.json").is_file():
        return [str(folder / file) for file in _saved_names(folder / "state.json")]
    entries = sorted(os.listdir(folder))
    if {"_delta_log", "_temporary"} & set(entries):
        raise ValueError(f"{folder} is a Delta table, or what an unfinished Spark job left; export it as parquet")
    parts = [entry for entry in entries if not entry.startswith((".", "_"))]
    if not parts or not all(_PART.fullmatch(part) and (folder / part).is_file() for part in parts):
        raise ValueError(f"{folder} is a folder; name the files that belong to this split, as '{folder}/*.csv'")
    return [str(folder / part) for part in parts]


def _saved_names(path: Path) -> list[str]:
    """What `save_to_disk` notes in a file: the splits of a DatasetDict, or the files of a data set."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return [str(name) for name in saved.get("splits") or [file["filename"] for file in saved["_data_files"]]]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path} is not as save_to_disk writes it") from None


def _hash_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _refusals(origin: Origin, path: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        raise UserError(f"{origin.option}: {path}: {_one_line(error)}") from None


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _file_chunks(origin: Origin, wanted: list[str]) -> Iterator[tuple[int, Chunk]]:
    request = Request(origin.source, wanted, option_prefix(origin.name))
    first: tuple[str, set[str]] | None = None
    for index, path in enumerate(origin.paths):
        columns: set[str] = set()
        with _refusals(origin, path):
            may_lack = kind_of(path) in (".json", *LINES)
            for count, chunk in read_file(path, request):
                columns.update(set(chunk) & set(wanted))
                if chunk and not may_lack:  # also of a file without rows: its header may be a row of a headerless file
                    first = first or (path, columns)
                    for column in sorted(columns ^ first[1]):
                        lacks, has = (path, first[0]) if column in first[1] else (first[0], path)
                        raise ValueError(f"column {column!r} is in {has}, and not in {lacks}")
                yield index, (count, chunk)


def _find_hub(name: str, source: Source) -> Origin:
    """`owner/name[/config][:split]` from the hub or its cache."""
    import datasets

    path, _, split = source.path.partition(":")
    owner, repository, *settings = path.split("/")
    try:
        table = datasets.load_dataset(f"{owner}/{repository}", *settings, split=split or name)
    except Exception as error:  # as its loaders and builders raise them
        raise UserError(
            f"{option_name(name)}: {source.path!r} was not found as a local file, in the cache, or on the hub "
            f"({_one_line(error.__cause__ or error)[:160]})\n"
            f"Use local files: --{option_name(name).removeprefix('--')} FILE.csv (csv, tsv, json, jsonl, parquet), "
            "or run once where the hub answers."
        ) from None
    feature = table.features.get(source.label_column)
    files = [file["filename"] for file in table.cache_files]
    return Origin(name, source, files, table, feature.names if isinstance(feature, datasets.ClassLabel) else None)


def _hub_chunks(origin: Origin, wanted: list[str]) -> Iterator[Chunk]:
    assert origin.hub is not None
    yield 0, {name: [] for name in origin.hub.column_names}
    used = [name for name in origin.hub.column_names if name in wanted]
    with _refusals(origin, origin.source.path):
        yield from arrow_chunks(origin.hub.select_columns(used).with_format("arrow").iter(CHUNK), used)

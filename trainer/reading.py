"""Files and hub data sets -> columns, a chunk of rows at a time, before anything is made of them.

Always holds: every row of the source is there, in its order, as it stands (text stays text: "NA" and "null" too); what
cannot be read exactly is refused with file and line. Nothing pickled is opened. No more than a chunk is in memory, but
of a .json file, which is one value.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow as pa
import pyarrow.parquet

from trainer.config import Source, UserError

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".joblib")
CHUNK = 10_000  # rows

Chunk = tuple[int, dict[str, list[Any]]]
"""number of rows, and the columns that these rows have"""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Origin:
    """Where a split is read from; its files are there, and nothing of them is read."""

    name: str
    layout: Source
    paths: list[str]
    """its files in their order; of a hub data set those of its cache"""
    hub: datasets.Dataset | None = None
    class_names: list[str] | None = None
    """names a hub data set gives its class numbers"""

    @property
    def where(self) -> str:
        """The option that named it."""
        return option(self.name)

    @property
    def num_bytes(self) -> int:
        """Size of its files."""
        return sum(Path(path).stat().st_size for path in self.paths)

    def content(self) -> list[str]:
        """SHA-256 of each file."""
        return [_hash_of(path) for path in self.paths]

    def chunks(self, wanted: list[str]) -> Iterator[Chunk]:
        """All rows in order. Columns that are not wanted may be empty or absent, but are named once.

        Raises:
            UserError: what cannot be read.
        """
        return _file_chunks(self, wanted) if self.hub is None else _hub_chunks(self.hub, wanted)


def option(name: str) -> str:
    """The option that names a split's source."""
    return f"data.{name}" if name != "input" else "--input"


def is_local(path: str) -> bool:
    """Whether a `data` entry names files rather than a hub data set."""
    return Path(path).suffix.lower() in FILE_TYPES + PICKLED or glob.has_magic(path) or Path(path).exists()


def find_origin(name: str, layout: Source) -> Origin:
    """The files or the hub data set that a layout names.

    Raises:
        UserError: it is not there, or of no known type.
    """
    where = option(name)
    if not is_local(layout.path):
        return _find_hub(name, layout)
    paths = [layout.path]
    if glob.has_magic(layout.path) and not Path(layout.path).is_file():  # a file may really be called [a].csv
        paths = sorted(glob.glob(layout.path))
    if not paths:
        raise UserError(f"{where}: no file matches {layout.path!r}")
    for path in paths:
        kind = Path(path).suffix.lower()
        if kind in PICKLED:
            raise UserError(f"{where}: {path} is a pickled file, which can run code when read; refused. Save it as csv")
        if kind not in _READERS:
            raise UserError(f"{where}: {path} is of no known type ({', '.join(FILE_TYPES)})")
        if not Path(path).is_file():
            raise UserError(f"{where}: no file {path!r}")
    return Origin(name, layout, paths)


def _hash_of(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _file_chunks(origin: Origin, wanted: list[str]) -> Iterator[Chunk]:
    known: set[str] = set()
    for path in origin.paths:
        columns: set[str] = set()
        try:
            for count, chunk in _READERS[Path(path).suffix.lower()](path, origin.layout.column_names, wanted):
                columns.update(chunk)
                yield count, chunk
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            raise UserError(f"{origin.where}: {path}: {_reason(path, error)}") from None
        if known and columns != known:
            raise UserError(f"{origin.where}: {path} has other columns than {origin.paths[0]}")
        known = columns


def _reason(path: str, error: Exception) -> str:
    if not isinstance(error, UnicodeDecodeError):
        return " ".join(str(error).split())[:300]
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as here:
                bad = line[here.start : here.start + 1].hex()
                return f"line {number} has a byte that is not UTF-8 (0x{bad}, byte {here.start + 1}); save it as UTF-8"
    return "is not UTF-8"


def _in_chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


def _read_csv(path: str, column_names: list[str] | None, wanted: list[str]) -> Iterator[Chunk]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
        try:
            names = column_names or next((row for row in reader if row), [])
            if len(set(names)) < len(names):
                raise ValueError(f"two columns have the same name in {names}")
            yield 0, {name: [] for name in names}
            for chunk in _in_chunks(_whole_rows(reader, names)):
                yield len(chunk), dict(zip(names, map(list, zip(*chunk, strict=True)), strict=True))
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error} (a quote that is not closed or not doubled?)") from None


def _whole_rows(reader: Any, names: list[str]) -> Iterator[list[str]]:
    num_blank = 0
    for row in reader:
        if not row:
            num_blank += 1
            continue
        if len(names) == 1:  # a blank line before others is a cell that is empty
            yield from [[""]] * num_blank
        num_blank = 0
        if len(row) != len(names):
            raise ValueError(
                f"line {reader.line_num} has {len(row)} fields, expected {len(names)} ({', '.join(names)[:80]})"
            )
        yield row


def _read_json(path: str, column_names: list[str] | None, wanted: list[str]) -> Iterator[Chunk]:
    with open(path, encoding="utf-8-sig") as file:
        if path.lower().endswith(".jsonl"):
            records = _json_lines(file)
        else:
            try:
                records = json.load(file)
            except json.JSONDecodeError as error:
                hint = " (one object a line? call it .jsonl)" if error.msg == "Extra data" else ""
                raise ValueError(f"{error}{hint}") from None
        for chunk in _in_chunks(records if isinstance(records, Iterator | list) else [records]):
            if isinstance(records, dict) or not all(isinstance(record, dict) for record in chunk):
                raise ValueError("must hold objects: a list of them (.json) or one a line (.jsonl)")
            names = dict.fromkeys(name for record in chunk for name in record)
            yield len(chunk), {name: [record.get(name) for record in chunk] for name in names}


def _json_lines(file: Any) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _read_parquet(path: str, column_names: list[str] | None, wanted: list[str]) -> Iterator[Chunk]:
    # not read_table, which would make a column of a folder called label=1
    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise ValueError(f"two columns have the same name in {names}")
        yield 0, {name: [] for name in names}
        for batch in file.iter_batches(CHUNK, columns=[name for name in names if name in wanted]):
            yield batch.num_rows, batch.to_pydict()


_READERS: dict[str, Callable[[str, list[str] | None, list[str]], Iterator[Chunk]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def _find_hub(name: str, layout: Source) -> Origin:
    """`owner/name[/config][:split]` from the hub or its cache."""
    path, _, split = layout.path.partition(":")
    parts = path.split("/")
    repository, settings = ("/".join(parts[:2]), "/".join(parts[2:]) or None) if len(parts) > 1 else (path, None)
    try:
        table = datasets.load_dataset(repository, settings, split=split or name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # as its loaders raise them
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{option(name)}: {layout.path!r} is no local file, and as a hub data set it is neither cached nor "
            f"reachable ({reason})\n"
            f"Use local files: --{option(name).removeprefix('--')} FILE.csv (csv, tsv, json, jsonl, parquet), or run "
            "once where the hub answers."
        ) from None
    feature = table.features.get(layout.label_column)
    files = [file["filename"] for file in table.cache_files]
    return Origin(name, layout, files, table, feature.names if isinstance(feature, datasets.ClassLabel) else None)


def _hub_chunks(table: datasets.Dataset, wanted: list[str]) -> Iterator[Chunk]:
    yield 0, {name: [] for name in table.column_names}
    present = [name for name in table.column_names if name in wanted]
    for chunk in table.select_columns(present).iter(CHUNK) if present else ():
        yield len(chunk[present[0]]), chunk

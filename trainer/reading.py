"""Files and hub data sets -> columns, before anything is made of them.

Always holds: every row of the source is there, in its order, as it stands (text stays text: "NA" and "null" too); what
cannot be read exactly is refused with file and line. Nothing pickled is opened.
"""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet

from trainer.config import DataConfig, Source, UserError

FILE_TYPES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
PICKLED = (".pkl", ".pickle", ".pt", ".pth", ".bin", ".npy", ".joblib")


@dataclass(frozen=True)
class Table:
    """Columns as they stand in the source."""

    name: str
    source: str
    layout: Source
    columns: dict[str, list[Any]]
    class_names: list[str] | None = None
    """names a hub data set gives its class numbers"""
    has_labels: bool = True

    @property
    def where(self) -> str:
        """The option that named this table."""
        return f"data.{self.name}" if self.name != "input" else "--input"


def completed(source: str | Source, config: DataConfig) -> Source:
    """A split's own layout, filled up from the data group's."""
    split = source if isinstance(source, Source) else Source(path=source)

    def own(value: Any, default: Any) -> Any:
        return default if value is None else value

    return Source(
        path=split.path,
        column_names=own(split.column_names, config.column_names),
        text_columns=own(split.text_columns, config.text_columns),
        text_pair_columns=own(split.text_pair_columns, config.text_pair_columns),
        label_column=own(split.label_column, config.label_column),
        label_names=own(split.label_names, config.label_names),
    )


def is_local(path: str) -> bool:
    """Whether a `data` entry names files rather than a hub data set."""
    return Path(path).suffix.lower() in FILE_TYPES + PICKLED or glob.has_magic(path) or Path(path).exists()


def read_table(name: str, layout: Source, labels_required: bool = True, extra: str | None = None) -> Table:
    """All rows of a source, with only the columns its layout names and `extra`."""
    where = f"data.{name}" if name != "input" else "--input"
    class_names = None
    if is_local(layout.path):
        columns = _read_files(where, layout)
    else:
        columns, class_names = _read_hub(where, name, layout.path)
    if not columns or not len(next(iter(columns.values()))):
        raise UserError(f"{where}: {layout.path} has no rows")
    texts = [*(layout.text_columns or []), *(layout.text_pair_columns or [])]
    has_labels = layout.label_column in columns
    wanted = texts + ([layout.label_column] if labels_required or has_labels else []) + ([extra] if extra else [])
    missing = [column for column in wanted if column not in columns]
    if missing:
        option = "data.label_column" if missing == [layout.label_column] else "data.text_columns"
        hint = "" if layout.column_names else "; for a file without a header name its columns in data.column_names"
        raise UserError(
            f"{where}: {layout.path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(repr(column[:40]) for column in list(columns)[:12])} (see {option}{hint})"
        )
    return Table(name, layout.path, layout, {key: columns[key] for key in wanted if key}, class_names, has_labels)


def _read_files(where: str, layout: Source) -> dict[str, list[Any]]:
    paths = [layout.path]
    if glob.has_magic(layout.path) and not Path(layout.path).is_file():  # a file may really be called [a].csv
        paths = sorted(glob.glob(layout.path))
    if not paths:
        raise UserError(f"{where}: no file matches {layout.path!r}")
    columns: dict[str, list[Any]] = {}
    for path in paths:
        kind = Path(path).suffix.lower()
        if kind in PICKLED:
            raise UserError(f"{where}: {path} is a pickled file, which can run code when read; refused. Save it as csv")
        if kind not in _READERS:
            raise UserError(f"{where}: {path} is of no known type ({', '.join(FILE_TYPES)})")
        if not Path(path).is_file():
            raise UserError(f"{where}: no file {path!r}")
        try:
            part = _READERS[kind](path, layout.column_names)
        except (OSError, ValueError, RecursionError, pa.ArrowException) as error:
            raise UserError(f"{where}: {path}: {_reason(path, error)}") from None
        if columns and set(part) != set(columns):
            raise UserError(f"{where}: {path} has other columns than {paths[0]}")
        for column, values in part.items():
            columns.setdefault(column, []).extend(values)
    return columns


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


def _read_csv(path: str, column_names: list[str] | None) -> dict[str, list[Any]]:
    csv.field_size_limit(2**31 - 1)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter="\t" if path.lower().endswith(".tsv") else ",", strict=True)
        try:
            rows = (row for row in reader if row)
            names = column_names or next(rows, [])
            if len(set(names)) < len(names):
                raise ValueError(f"two columns have the same name in {names}")
            columns: dict[str, list[Any]] = {name: [] for name in names}
            for row in rows:
                if len(row) != len(names):
                    raise ValueError(
                        f"line {reader.line_num} has {len(row)} fields, expected {len(names)} ({', '.join(names)[:80]})"
                    )
                for name, value in zip(names, row, strict=True):
                    columns[name].append(value)
        except csv.Error as error:
            raise ValueError(f"line {reader.line_num}: {error} (a quote that is not closed or not doubled?)") from None
    return columns


def _read_json(path: str, column_names: list[str] | None) -> dict[str, list[Any]]:
    with open(path, encoding="utf-8-sig") as file:
        if path.lower().endswith(".jsonl"):
            records = list(_json_lines(file))
        else:
            try:
                records = json.load(file)
            except json.JSONDecodeError as error:
                hint = " (one object a line? call it .jsonl)" if error.msg == "Extra data" else ""
                raise ValueError(f"{error}{hint}") from None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ValueError("must hold objects: a list of them (.json) or one a line (.jsonl)")
    names = list(dict.fromkeys(name for record in records for name in record))
    return {name: [record.get(name) for record in records] for name in names}


def _json_lines(file: Any) -> Iterator[Any]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None


def _read_parquet(path: str, column_names: list[str] | None) -> dict[str, list[Any]]:
    # not read_table, which would make a column of a folder called label=1
    table = pyarrow.parquet.ParquetFile(path).read()
    if len(set(table.column_names)) < table.num_columns:
        raise ValueError(f"two columns have the same name in {table.column_names}")
    return dict(table.to_pydict())


_READERS: dict[str, Callable[[str, list[str] | None], dict[str, list[Any]]]] = {
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".parquet": _read_parquet,
}


def _read_hub(where: str, split_name: str, spec: str) -> tuple[dict[str, list[Any]], list[str] | None]:
    """`owner/name[/config][:split]` from the hub or its cache. Returns columns and the names of its classes."""
    path, _, split = spec.partition(":")
    parts = path.split("/")
    name, settings = ("/".join(parts[:2]), "/".join(parts[2:]) or None) if len(parts) > 1 else (path, None)
    try:
        table = datasets.load_dataset(name, settings, split=split or split_name)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:  # as its loaders raise them
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{where}: {spec!r} is no local file, and as a hub data set it is neither cached nor reachable ({reason})\n"
            f"Use local files: --{where} FILE.csv (csv, tsv, json, jsonl, parquet), or run once where the hub answers."
        ) from None
    classes = [list(feature.names) for feature in table.features.values() if isinstance(feature, datasets.ClassLabel)]
    return {column: list(table[column]) for column in table.column_names}, classes[0] if len(classes) == 1 else None

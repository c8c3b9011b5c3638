"""The columns of a source -> checked texts, labels and digests, in Arrow.

Always holds: every text is a string, and every label is present. No text is empty unless `data.empty_text` keeps it. An
example knows its row in the source. The rows of a large source are cached under a hash of its content and of the
options that read it. Cached rows are mapped into memory, not loaded.
"""

from __future__ import annotations

import functools
import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from trainer.config.labels import describe_look_alikes, label_text
from trainer.config.schema import ResolvedSource
from trainer.data.cache import load_or_create, release_memory
from trainer.data.formats import TRAILING_TEXT, Columns, file_type
from trainer.data.sources import Origin, find_origin, option_prefix
from trainer.errors import UserError, bar_settings, is_first_on_machine
from trainer.tasks.task import LabelColumn

MAX_SHOWN_ROWS = 5
"""rows that a message names"""
MIN_CACHED_BYTES = 2**26
"""size of a source from which on its rows are cached"""
ROWS_FORMAT = 8
"""version of the cached rows; a new number makes every start read them again"""
ROWS_FILE, FACTS_FILE = "rows.arrow", "facts.json"
TEXT_ROLES = ("text", "text_pair")
NO_TEXT = (dict, bytes, list)
"""types of values that are no text"""


@dataclass(frozen=True, eq=False)
class Texts(Sequence[str]):
    """The texts of N examples of a source with M rows, each read when it is used."""

    column: pa.ChunkedArray
    """all texts of the source, [M]"""
    rows: np.ndarray
    """row of each example, int64 [N]"""
    file: mmap.mmap | None = None
    """the mapped file that holds the column"""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return str(self.column[int(self.rows[index])])
        rows = self.rows[index]
        if len(rows) == 0:
            return []
        first = int(rows.min())
        near = self.column.slice(first, int(rows.max()) + 1 - first)
        texts: list[str] = near.take(pa.array(rows - first)).to_pylist()
        release_memory(self.file)
        return texts


@dataclass
class Reading:
    """A source, and what was found in it so far."""

    origin: Origin
    roles: dict[str, list[str]]
    """{column of the table: columns of the source that it is made of}"""
    file_rows: list[int]
    """number of rows of each file"""
    columns: list[str]
    """names of the source's columns"""
    separator: str | None = None
    """what separates the labels in a text; None = a text is one label"""

    def describe_rows(self, rows: Sequence[int]) -> str:
        """Names rows, counted from 1: "row 3, 5", or "row 3, 5 of a.csv; row 1 of b.csv"."""
        if len(self.file_rows) == 1:
            return f"row {', '.join(str(row + 1) for row in rows)}"
        starts = np.cumsum([0, *self.file_rows])
        numbers: dict[str, list[str]] = {}
        for row, file in zip(rows, np.searchsorted(starts, rows, side="right") - 1, strict=True):
            numbers.setdefault(self.origin.paths[file], []).append(str(row - int(starts[file]) + 1))
        return "; ".join(f"row {', '.join(some)} of {path}" for path, some in numbers.items())


@dataclass(frozen=True)
class TextSplit:
    """One split: N texts or pairs, with the targets of a task."""

    name: str
    """train, validation, test, or input when predicting"""
    path: str
    """where it was read"""
    texts: Texts
    """[N]"""
    text_pairs: Texts | None
    """[N], or None for single texts"""
    targets: np.ndarray | None
    """of the task, [N] or [N, C]; None for an unlabelled file"""
    digests: np.ndarray
    """128 bits of hash of each text or pair, uint64 [N, 2]"""

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def rows(self) -> np.ndarray:
        """Row of each example in its source, counted from 0, int64 [N]."""
        return self.texts.rows

    @property
    def known_targets(self) -> np.ndarray:
        """The targets of a split that must have them."""
        assert self.targets is not None
        return self.targets

    def take(self, name: str, positions: np.ndarray) -> TextSplit:
        """Makes a split of the examples at some positions."""
        rows = self.rows[positions]
        return replace(
            self,
            name=name,
            texts=replace(self.texts, rows=rows),
            text_pairs=self.text_pairs and replace(self.text_pairs, rows=rows),
            targets=self.known_targets[positions],
            digests=self.digests[positions],
        )


@dataclass(frozen=True)
class Table:
    """The N examples of a source: all of its rows, or those with a text where empty ones are skipped."""

    split: TextSplit
    """without targets"""
    labels: LabelColumn | None
    """None for an unlabelled source"""
    ids: list[str] | None
    """[N], if a column of ids was requested"""
    describe_row: Callable[[int], str]
    """example -> its row, for messages: "row 12", or "row 12 of b.csv" if there are several files"""
    warnings: list[str]
    """what the user should know, a line each"""


def read_table(
    name: str,
    source: ResolvedSource,
    labels_required: bool = True,
    id_column: str | None = None,
    quiet: bool = False,
    separator: str | None = None,
) -> Table:
    """Reads all rows of a source, from the cache if it is large and was read before.

    `separator` cuts a text label into a list. Refuses a source without a requested column, and rows without a text,
    label or id.
    """
    origin = find_origin(name, source)
    roles = {"text": source.text_columns, "text_pair": source.text_pair_columns}
    roles = {role: columns for role, columns in roles.items() if columns}
    roles["label"] = source.label_columns or ([source.label_column] if source.label_column is not None else [])
    roles |= {"id": [id_column]} if id_column is not None else {}
    if sum(Path(path).stat().st_size for path in origin.paths) >= MIN_CACHED_BYTES:
        contents = origin.hash_files()
        entry = load_or_create(
            _cache_name(origin, roles, contents, separator),
            lambda folder: _write(folder, Reading(origin, roles, [], [], separator), contents, quiet),
            quiet,
        )
        if entry is not None:
            file, facts = entry[ROWS_FILE], json.loads(entry[FACTS_FILE][:])
            rows = pa.ipc.open_file(pa.py_buffer(file)).read_all()
            return _make_table(Reading(origin, roles, **facts, separator=separator), rows, file, labels_required)
    reading = Reading(origin, roles, [], [], separator)
    rows = pa.Table.from_batches(_read_batches(reading, quiet), _schema(roles))
    return _make_table(reading, rows, None, labels_required)


def progress_bar(name: str, unit: str, total: int | None, quiet: bool) -> Any:
    """A progress bar of the first process of a machine; in a log file a line a minute."""
    looks = {"unit": f" {unit}", "unit_scale": True, "leave": False, **bar_settings(60)}
    return tqdm(desc=name, total=total, disable=quiet or not is_first_on_machine(), **looks)


def hash_texts(texts: Sequence[str], pairs: Sequence[str] | None) -> np.ndarray:
    """Hashes each text or pair to 128 bits, uint64 [N, 2]."""
    joined = b"".join(
        # the length tells the pairs (a, b\0c) and (a\0b, c) apart
        hashlib.blake2b(f"{len(text)}\0{text}{pair}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for text, pair in zip(texts, [""] * len(texts) if pairs is None else pairs, strict=True)
    )
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)


def _schema(roles: dict[str, list[str]]) -> pa.Schema:
    texts = [(role, pa.large_string()) for role in roles]
    return pa.schema([*texts, ("digest", pa.binary(16)), (TRAILING_TEXT, pa.bool_())])


def _cache_name(origin: Origin, roles: dict[str, list[str]], contents: list[str], separator: str | None) -> str:
    settings = asdict(replace(origin.source, path="", label_names=None))
    key = [ROWS_FORMAT, settings, list(map(file_type, origin.paths)), roles, contents, separator]
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode("utf-8", "surrogatepass"))
    return f"{digest.hexdigest()[:32]}.rows"


def _write(folder: Path, reading: Reading, contents: list[str], quiet: bool) -> None:
    """Reads a source into files for the cache."""
    origin = reading.origin
    with pa.OSFile(str(folder / ROWS_FILE), "wb") as sink, pa.ipc.new_file(sink, _schema(reading.roles)) as writer:
        for batch in _read_batches(reading, quiet):
            writer.write_batch(batch)
    if origin.hash_files() != contents:
        raise UserError(f"{origin.option}: {origin.source.path} was changed while it was read")
    (folder / FACTS_FILE).write_text(json.dumps({"file_rows": reading.file_rows, "columns": reading.columns}))


def _make_table(reading: Reading, rows: pa.Table, file: mmap.mmap | None, labels_required: bool) -> Table:
    _refuse_incomplete(reading, labels_required)
    source, roles = reading.origin.source, reading.roles
    if reading.separator is not None and len(roles["label"]) == 1 and roles["label"][0] in reading.columns:
        place = rows.schema.get_field_index("label")
        rows = rows.set_column(place, "label", pc.fill_null(rows["label"], "[]"))  # an empty cell: no labels
    texts = {role: rows[role] for role in TEXT_ROLES if role in roles}
    missing = {role: pc.fill_null(pc.equal(rows[role], ""), True).to_numpy() for role in roles}
    has_text = ~np.any([missing[role] for role in texts], axis=0)
    if source.empty_text == "skip":
        missing["label"] = missing["label"] & has_text  # a skipped row needs no label
    _refuse_missing(reading, missing)
    words = [np.frombuffer(part.buffers()[1], np.uint64, 2 * len(part)) for part in rows["digest"].chunks]
    hashes = np.concatenate(words).reshape(-1, 2)
    kept, others = np.arange(rows.num_rows), rows.select([role for role in ("label", "id") if role in roles])
    if source.empty_text == "skip" and not has_text.all():
        kept, others, hashes = np.flatnonzero(has_text), others.filter(pa.array(has_text)), hashes[has_text]
        if not len(kept):
            raise UserError(f"{reading.origin.option}: {source.path} has no row with a text")

    def describe_row(position: int) -> str:
        return reading.describe_rows([int(kept[position])])

    pairs = Texts(texts["text_pair"], kept, file) if "text_pair" in texts else None
    table = Table(
        split=TextSplit(reading.origin.name, source.path, Texts(texts["text"], kept, file), pairs, None, hashes),
        labels=_make_labels(reading, others["label"], describe_row),
        ids=others["id"].to_pylist() if "id" in roles else None,
        describe_row=describe_row,
        warnings=_warnings(reading, {**missing, TRAILING_TEXT: rows[TRAILING_TEXT].to_numpy()}),
    )
    release_memory(file)
    return table


def _make_labels(reading: Reading, column: pa.ChunkedArray, describe_row: Callable[[int], str]) -> LabelColumn | None:
    labels, source = column.dictionary_encode().combine_chunks(), reading.origin.source
    if labels.null_count:
        return None
    return LabelColumn(
        option=reading.origin.option,
        path=source.path,
        columns=reading.roles["label"],
        values=list(map(json.loads, labels.dictionary.to_pylist())),
        codes=labels.indices.to_numpy().astype(np.int64),
        given_names=source.label_names,
        stored_names=reading.origin.class_names,
        describe_row=describe_row,
    )


# --- reading ----------------------------------------------------------------------------------------------------------


def _read_batches(reading: Reading, quiet: bool) -> Iterator[pa.RecordBatch]:
    wanted = [column for columns in reading.roles.values() for column in columns]
    reading.file_rows[:] = [0] * len(reading.origin.paths)
    with progress_bar(f"reading {reading.origin.name}", "rows", None, quiet) as bar:
        for file, (count, columns) in reading.origin.read_chunks(wanted):
            trailing = columns.pop(TRAILING_TEXT, [False] * count)
            reading.columns += [column for column in columns if column not in reading.columns]
            reading.file_rows[file] += count
            if count:
                yield _make_batch(count, columns, trailing, reading)
            bar.update(count)


def _make_batch(count: int, columns: Columns, trailing: list[bool], reading: Reading) -> pa.RecordBatch:
    """Makes the texts, labels, ids and digests of the last rows that were read."""
    values: dict[str, list[Any]] = {}
    for role, used in reading.roles.items():
        cells = [columns.get(column) or [None] * count for column in used]
        for column, part in zip(used, cells, strict=True):
            _refuse_other_types(part, column, (dict, bytes) if role == "label" else NO_TEXT, reading)
        if role in TEXT_ROLES:
            values[role] = _join_texts(cells)
        elif role == "label":
            rows = zip(*cells, strict=True) if cells else [(None,)] * count
            values[role] = [_encode_label(row, reading.separator) for row in rows]
        else:
            values[role] = ["" if value is None else str(value) for value in cells[0]]
    hashes = pa.py_buffer(hash_texts(values["text"], values.get("text_pair")))
    arrays = [pa.array(column, pa.large_string()) for column in values.values()]
    arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), count, [None, hashes]))
    return pa.RecordBatch.from_arrays([*arrays, pa.array(trailing)], schema=_schema(reading.roles))


def _encode_label(cells: tuple[Any, ...], separator: str | None = None) -> str | None:
    """The label of a row as JSON; None if it is missing.

    It is a text, or a list of texts: of a list in one column, of a text with separators, or of several columns. The
    task decides what it takes.
    """
    if len(cells) > 1:
        texts = list(map(label_text, cells))
        return json.dumps(texts) if any(texts) else None
    if isinstance(cells[0], list):
        return json.dumps(list(map(label_text, cells[0])))
    return _encode_text(cells[0], separator)


@functools.lru_cache(typed=True)  # few labels in many rows
def _encode_text(value: Any, separator: str | None) -> str | None:
    text = label_text(value)
    if text is None or separator is None:
        return text and json.dumps(text)
    return json.dumps([label_text(part) for part in text.split(separator) if part.strip()])


def _join_texts(columns: list[list[Any]]) -> list[str]:
    """Joins the columns of a text with spaces, without what is empty."""
    parts = [["" if v is None or v != v else str(v).strip() for v in values] for values in columns]
    return parts[0] if len(parts) == 1 else [" ".join(filter(None, row)) for row in zip(*parts, strict=True)]


def _refuse_other_types(values: list[Any], column: str, types: tuple[type, ...], reading: Reading) -> None:
    """Refuses values of these types, lists with such values, and text that cannot be stored."""
    origin = reading.origin
    for row, value in enumerate(values, start=sum(reading.file_rows) - len(values)):
        kind = _find_type_fault(value, types)
        if kind is not None:
            place = f"{origin.option}: {origin.source.path}: {reading.describe_rows([row])}"
            raise UserError(f"{place}: column {column!r} holds {kind}")


def _find_type_fault(value: Any, types: tuple[type, ...]) -> str | None:
    if isinstance(value, str):
        is_whole = value.isascii() or not re.search("[\ud800-\udfff]", value)
        return None if is_whole else "half a character (a lone surrogate such as \\ud83d)"
    if isinstance(value, types):
        return f"a {type(value).__name__}, not text"
    if isinstance(value, list):
        faults = (_find_type_fault(item, NO_TEXT) for item in value)
        return next((f"a list with {fault}" for fault in faults if fault), None)
    return None


# --- messages ---------------------------------------------------------------------------------------------------------


def _refuse_incomplete(reading: Reading, labels_required: bool) -> None:
    """Refuses a source without rows, or without a column that must be there."""
    source, option, columns = reading.origin.source, reading.origin.option, reading.columns
    needed = [(role, column) for role, used in reading.roles.items() for column in used]
    missing = [pair for pair in needed if pair[1] not in columns and (pair[0] != "label" or labels_required)]
    if missing and (columns or any(reading.file_rows)):
        group = "--" if reading.origin.name == "input" else "data."
        of_labels = "label_columns" if source.label_columns else "label_column"
        kinds = {role for role, _ in missing}
        setting = {"label": of_labels, "id": "id_column"}.get(missing[0][0]) if len(kinds) == 1 else None
        hint = "" if source.column_names else f"; if the file has no header, name its columns in {group}column_names"
        alike = "".join(describe_look_alikes(column, columns) for _, column in missing)
        found = ", ".join(repr(column[:40]) for column in columns[:12]) or "none"
        raise UserError(
            f"{option}: {source.path} has no column {', '.join(repr(column) for _, column in missing)}; it has "
            f"{found}{alike} (see {group}{setting or 'text_columns'}{hint})"
        )
    if not any(reading.file_rows):
        raise UserError(f"{option}: {source.path} has no rows")


def _refuse_missing(reading: Reading, missing: dict[str, np.ndarray]) -> None:
    """Refuses rows without a text, a label or an id, unless the options accept them."""
    origin = reading.origin
    fixes = dict.fromkeys(TEXT_ROLES, f"; {option_prefix(origin.name)}empty_text skip skips them")
    if origin.name == "input":
        fixes |= {"label": "; --ignore_labels true ignores labels", "id": "; --id_column '' uses row numbers"}
    for role, columns in reading.roles.items():
        is_unlabelled = role == "label" and not set(columns) & set(reading.columns)
        is_accepted = role in TEXT_ROLES and origin.source.empty_text != "refuse"
        if missing[role].any() and not is_unlabelled and not is_accepted:
            raise UserError(_describe_missing(reading, role, missing[role]) + fixes.get(role, ""))


def _warnings(reading: Reading, missing: dict[str, np.ndarray]) -> list[str]:
    """Warns of empty texts that are accepted, and of text in columns without a name."""
    origin = reading.origin
    results = dict.fromkeys(TEXT_ROLES, f"they are {'skipped' if origin.source.empty_text == 'skip' else 'kept'}")
    results[TRAILING_TEXT] = (
        "it is ignored; quote such texts, or name the columns in the header and list them in "
        f"{option_prefix(origin.name)}text_columns"
    )
    found = {what: missing[what] for what in results if what in missing and missing[what].any()}
    return [f"{_describe_missing(reading, what, rows)}; {results[what]}" for what, rows in found.items()]


def _describe_missing(reading: Reading, what: str, is_missing: np.ndarray) -> str:
    found = np.flatnonzero(is_missing)
    columns = f" ({', '.join(reading.roles[what])})" if what in TEXT_ROLES else ""
    text = what if what == TRAILING_TEXT else f"an empty or missing {what.removesuffix('_pair')}{columns}"
    rows = reading.describe_rows(found[:MAX_SHOWN_ROWS].tolist()) + (", ..." if len(found) > MAX_SHOWN_ROWS else "")
    has = "row has" if len(found) == 1 else "rows have"
    return f"{reading.origin.option}: {reading.origin.source.path}: {len(found)} {has} {text}: {rows}"

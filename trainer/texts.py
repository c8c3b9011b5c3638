"""The rows of a source -> checked texts, labels and digests, in Arrow.

Always holds: a table without a problem has no empty text, no missing label and nothing that is no text; row i of it is
row i of the source. The rows of a large source are kept in the cache of `datasets` as an Arrow file under a hash of the
source's content and the layout, so a changed source can never meet old rows; they are mapped into memory, not loaded.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import mmap
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow as pa
from tqdm import tqdm

from trainer.config import Source, UserError, speaks_for_its_machine
from trainer.console import bar_settings
from trainer.labels import label_text
from trainer.locks import say_once, share, taking_turns
from trainer.reading import Chunk, Origin, find_origin

SHOWN = 5  # how many rows an error names
LARGE = 2**26  # bytes of a source from which on its rows are kept in the cache
LAYOUT = 3  # of the kept rows; another number makes them anew


@dataclass(frozen=True, eq=False)
class Texts(Sequence[str]):
    """One text an example, read where it is asked for: N examples of a source of M rows."""

    column: pa.ChunkedArray
    """all texts of the source, [M]"""
    rows: np.ndarray
    """row of each example, int64 [N]"""
    file: mmap.mmap | None = None
    """the mapped file that holds the column"""

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if not isinstance(index, slice):
            return str(self.column[int(self.rows[index])])
        rows = self.rows[index]
        if len(rows) == 0:
            return []
        first = int(rows.min())
        near = self.column.slice(first, int(rows.max()) + 1 - first)
        texts: list[str] = near.take(pa.array(rows - first)).to_pylist()
        forget(self.file)
        return texts

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)


@dataclass(frozen=True)
class Table:
    """A source's rows, N."""

    origin: Origin
    texts: Texts
    text_pairs: Texts | None
    label_values: list[str]
    """the labels that occur, each once, as text"""
    label_codes: np.ndarray | None
    """position of each row's label in `label_values`, int64 [N]; None for an unlabelled source"""
    digests: np.ndarray
    """128 bits of hash of each row's text and pair, uint64 [N, 2]"""
    ids: list[str] | None
    """[N], where a column of them was asked for"""
    problem: str | None
    """what is wrong with the rows; label_codes and digests mean nothing then"""


@dataclass
class _Seen:
    """What a pass over the rows has met so far."""

    num_rows: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    no_text: dict[str, str] = field(default_factory=dict)
    """column -> its first row that holds no text, and what it holds"""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """what is missing -> in how many rows, and the first of them"""


def read_table(
    name: str, layout: Source, labels_required: bool = True, extra: str | None = None, quiet: bool = False
) -> Table:
    """All rows of a source, with only the columns its layout names and `extra`, the ids.

    Raises:
        UserError: no such source, or one that cannot be read.
    """
    origin = find_origin(name, layout)
    folder = cache_folder(quiet) if origin.num_bytes >= LARGE else None
    if folder is not None:
        try:
            return _kept_table(folder, origin, labels_required, extra, quiet)
        except OSError as error:  # of the cache; those of the source are a UserError
            say_without_cache(folder, error, quiet)
    seen = _Seen()
    rows = pa.Table.from_batches(_batches(origin, extra, seen, True), _schema(layout, extra))
    _refuse_incomplete(origin, seen, labels_required, extra)
    return _table(origin, rows, None, _problem(origin, extra, seen))


def cache_folder(quiet: bool) -> Path | None:
    """Where results are kept for the next start; None where nothing can be written, as in a read-only home."""
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "isotrain"
    try:
        for path in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
            path.mkdir(exist_ok=True)
            share(path)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        say_without_cache(folder, error, quiet)
        return None
    return folder


def say_without_cache(folder: Path, error: OSError, quiet: bool) -> None:
    """Says once that there is no cache: everything works, and the next start prepares the data again."""
    say_once(f"note: going on without the cache {folder} (HF_DATASETS_CACHE): {error.strerror or error}", quiet)


def progress(name: str, unit: str, total: int | None, quiet: bool) -> Any:
    """A bar on a terminal; elsewhere a line a minute, where it takes that long. Of the first process of a machine."""
    return tqdm(
        desc=name,
        unit=f" {unit}",
        unit_scale=True,
        total=total,
        disable=quiet or not speaks_for_its_machine(),
        leave=False,
        **bar_settings(60),
    )


def forget(file: mmap.mmap | None) -> None:
    """Gives the memory of a mapped file back; what is touched again is read again."""
    if file is not None and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)


def digests(texts: Sequence[str], pairs: Sequence[str] | None) -> np.ndarray:
    """128 bits of hash of each text or pair, uint64 [N, 2]: equal where they are."""
    joined = b"".join(
        # with its length, so that no text that holds a \0 reads like another pair
        hashlib.blake2b(f"{len(text)}\0{text}{pair}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
        for text, pair in zip(texts, [""] * len(texts) if pairs is None else pairs, strict=True)
    )
    return np.frombuffer(joined, dtype=np.uint64).reshape(-1, 2)


# --- kept rows --------------------------------------------------------------------------------------------------------


def _kept_table(folder: Path, origin: Origin, labels_required: bool, extra: str | None, quiet: bool) -> Table:
    """The rows as an earlier run kept them; else they are read, and kept where nothing is wrong with them."""
    content = origin.content()
    layout = dataclasses.asdict(dataclasses.replace(origin.layout, label_names=None))
    path = layout.pop("path")
    place = [Path(path).suffix.lower() for path in origin.paths] if origin.hub is None else path
    key = json.dumps([LAYOUT, layout, place, extra, content], sort_keys=True)
    path = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.rows"
    with taking_turns(path, quiet) as part:
        found = _opened(path)
        if found is not None and (not labels_required or found[0]["label"].null_count == 0):
            return _table(origin, *found, None)
        seen = _Seen()
        try:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, _schema(origin.layout, extra)) as writer:
                for batch in _batches(origin, extra, seen, quiet):
                    writer.write_batch(batch)
            _refuse_incomplete(origin, seen, labels_required, extra)
            if origin.content() != content:
                raise UserError(f"{origin.where}: {origin.layout.path} was changed while it was read")
            problem = _problem(origin, extra, seen)
            found = _opened(part)
            if found is None:
                raise OSError("a file in it cannot be mapped")
            if problem is None:
                sync(part)
                share(part)
                part.rename(path)
            return _table(origin, *found, problem)
        finally:
            part.unlink(missing_ok=True)


def _opened(path: Path) -> tuple[pa.Table, mmap.mmap] | None:
    """The rows of a file, mapped; None where it is absent or not whole."""
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all(), mapped
    except (OSError, ValueError):  # an ArrowInvalid is a ValueError
        return None


def sync(path: Path) -> None:
    """Waits until a file is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _table(origin: Origin, rows: pa.Table, file: mmap.mmap | None, problem: str | None) -> Table:
    order = np.arange(rows.num_rows)
    column = rows["label"].dictionary_encode().combine_chunks()
    codes = None
    if rows["label"].null_count == 0:
        codes = column.indices.to_numpy().astype(np.int64)
    words = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint64, count=2 * len(chunk)) for chunk in rows["digest"].chunks
    ]
    table = Table(
        origin=origin,
        texts=Texts(rows["text"], order, file),
        text_pairs=Texts(rows["text_pair"], order, file) if "text_pair" in rows.column_names else None,
        label_values=column.dictionary.to_pylist(),
        label_codes=codes,
        digests=np.concatenate(words).reshape(-1, 2),
        ids=rows["id"].to_pylist() if "id" in rows.column_names else None,
        problem=problem,
    )
    forget(file)
    return table


# --- a pass over the rows ---------------------------------------------------------------------------------------------


def _schema(layout: Source, extra: str | None) -> pa.Schema:
    present = {"text": True, "text_pair": layout.text_pair_columns, "label": True, "id": extra is not None}
    return pa.schema([*((name, pa.large_string()) for name in present if present[name]), ("digest", pa.binary(16))])


def _batches(origin: Origin, extra: str | None, seen: _Seen, quiet: bool) -> Iterator[pa.RecordBatch]:
    layout = origin.layout
    wanted = [*(layout.text_columns or []), *(layout.text_pair_columns or []), layout.label_column or "", extra or ""]
    with progress(f"reading {origin.name}", "rows", None, quiet) as bar:
        for count, chunk in origin.chunks(wanted):
            seen.columns.update(dict.fromkeys(chunk))
            if count:
                yield _batch((count, chunk), layout, extra, seen)
            seen.num_rows += count
            bar.update(count)


def _batch(chunk: Chunk, layout: Source, extra: str | None, seen: _Seen) -> pa.RecordBatch:
    texts = _joined(chunk, layout.text_columns or [], seen)
    pairs = _joined(chunk, layout.text_pair_columns, seen) if layout.text_pair_columns else None
    labels = [label_text(value) for value in _checked(chunk, layout.label_column or "", seen)]
    _note_missing(seen, "label", [label is None for label in labels])
    ids = _checked_ids(chunk, extra, seen) if extra is not None else None
    columns: list[Any] = [column for column in (texts, pairs, labels, ids) if column is not None]
    if seen.no_text:  # refused at the end; until then half a character would stop us
        columns = [[v and v.encode("utf-8", "replace").decode() for v in column] for column in columns]
    schema, hashes = _schema(layout, extra), pa.py_buffer(digests(texts, pairs))
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types[:-1], strict=True)]
    arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), chunk[0], [None, hashes]))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _values(chunk: Chunk, column: str) -> list[Any]:
    count, columns = chunk
    return columns[column] if column in columns else [None] * count


def _joined(chunk: Chunk, columns: Sequence[str], seen: _Seen) -> list[str]:
    parts = [["" if v is None or v != v else str(v).strip() for v in _checked(chunk, c, seen)] for c in columns]
    texts = parts[0] if len(parts) == 1 else [" ".join(filter(None, row)) for row in zip(*parts, strict=True)]
    _note_missing(seen, _named(columns), [not text for text in texts])
    return texts


def _named(text_columns: Sequence[str]) -> str:
    return f"text ({', '.join(text_columns)})"


def _checked(chunk: Chunk, column: str, seen: _Seen) -> list[Any]:
    """The values of a column, and a note of the first that is no text."""
    values = _values(chunk, column)
    if column not in seen.no_text:
        for index, value in enumerate(values):
            if isinstance(value, str):
                if value.isascii() or not re.search("[\ud800-\udfff]", value):
                    continue
                kind = "half a character (a lone surrogate such as \\ud83d)"
            elif isinstance(value, list | dict | bytes):
                kind = f"a {type(value).__name__}, no text"
            else:
                continue
            seen.no_text[column] = f"row {seen.num_rows + index + 1}: column {column!r} holds {kind}"
            break
    return values


def _checked_ids(chunk: Chunk, column: str, seen: _Seen) -> list[str]:
    ids = ["" if value is None else str(value) for value in _values(chunk, column)]
    _note_missing(seen, "id", [not text for text in ids])
    return _checked((chunk[0], {column: ids}), column, seen)


def _note_missing(seen: _Seen, what: str, missing: list[bool]) -> None:
    if any(missing):
        rows = [seen.num_rows + index for index, absent in enumerate(missing) if absent]
        count, *first = seen.missing.get(what, [0])
        seen.missing[what] = [count + len(rows), *[*first, *rows][:SHOWN]]


def _refuse_incomplete(origin: Origin, seen: _Seen, labels_required: bool, extra: str | None) -> None:
    layout = origin.layout
    if not seen.num_rows or not seen.columns:
        raise UserError(f"{origin.where}: {layout.path} has no rows")
    label = layout.label_column or ""
    wanted = [*(layout.text_columns or []), *(layout.text_pair_columns or [])]
    wanted += ([label] if labels_required else []) + ([extra] if extra else [])
    missing = [column for column in wanted if column not in seen.columns]
    if missing:
        group = "--" if origin.name == "input" else "data."
        named = "label_column" if missing == [label] else "id_column" if missing == [extra] else "text_columns"
        hint = "" if layout.column_names else f"; for a file without a header name its columns in {group}column_names"
        raise UserError(
            f"{origin.where}: {layout.path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(repr(column[:40]) for column in list(seen.columns)[:12])} (see {group}{named}{hint})"
        )


def _problem(origin: Origin, extra: str | None, seen: _Seen) -> str | None:
    """What is wrong with the rows, the first that is found."""
    layout, label = origin.layout, origin.layout.label_column or ""
    groups = {_named(columns): columns for columns in (layout.text_columns, layout.text_pair_columns) if columns}
    if label in seen.columns:
        groups["label"] = [label]
    if extra is not None:
        groups["id"] = [extra]
    for what, columns in groups.items():
        wrong = [seen.no_text[column] for column in columns if column in seen.no_text]
        if wrong:
            return f"{origin.where}: {layout.path}: {wrong[0]}"
        if what in seen.missing:
            count, *first = seen.missing[what]
            rows = ", ".join(str(row + 1) for row in first) + (", ..." if count > SHOWN else "")
            has = "row has" if count == 1 else "rows have"
            hint = "; --ignore_labels true reads none" if (what, origin.name) == ("label", "input") else ""
            return f"{origin.where}: {layout.path}: {count} {has} an empty or missing {what}: row {rows}{hint}"
    return None

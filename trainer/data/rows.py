"""The rows of a source -> checked texts, labels and digests, in Arrow.

Always holds: in a table without a problem every label is present, every text is a string, and no text is empty unless
`data.empty_text` keeps it. An example knows its row in the source. The rows of a large source are cached in the
folder of `datasets` as an Arrow file under a hash of the source's content and the source, so a changed source can never
meet old rows. A second file holds the hash of the first. Cached rows are mapped into memory, not loaded.
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
import pyarrow.compute as pc
import xxhash
from tqdm import tqdm

from trainer.config.labels import describe_look_alikes, label_text
from trainer.config.schema import NO_COLUMN, Source
from trainer.data.formats import SPILLED, Chunk, kind_of
from trainer.data.sources import Origin, find_origin, option_prefix
from trainer.errors import UserError, bar_settings, is_first_on_machine, print_once
from trainer.files import lock_cache_entry, publish, share

SHOWN = 5  # how many rows an error names
LARGE = 2**26  # bytes of a source from which on its rows are kept in the cache
BLOCK = 2**26  # bytes that are hashed at a time
LAYOUT = 6  # version of the cached rows; a new number makes every start read them again


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
    """The N examples of a source of M rows: all of them, or those with a text where empty ones are skipped."""

    origin: Origin
    file_rows: list[int]
    """number of rows of each file of the origin"""
    texts: Texts
    text_pairs: Texts | None
    label_values: list[str]
    """the labels that occur, each once, as text"""
    label_codes: np.ndarray | None
    """position of each example's label in `label_values`, int64 [N]; None for an unlabelled source"""
    digests: np.ndarray
    """128 bits of hash of each example's text and pair, uint64 [N, 2]"""
    ids: list[str] | None
    """[N], where a column of them was asked for"""
    problem: str | None
    """what is wrong with the rows; label_codes and digests mean nothing then"""
    warnings: list[str]
    """what the user should know, a line each"""

    def describe_row(self, position: int) -> str:
        """The row of an example as a message names it: "row 12", or "row 12 of b.csv" where there are several files."""
        return _places(self.origin, self.file_rows, [int(self.texts.rows[position])])


@dataclass
class _Seen:
    """What a pass over the rows has met so far."""

    file_rows: list[int]
    """number of rows of each file, so far"""
    num_rows: int = 0
    columns: dict[str, None] = field(default_factory=dict)
    no_text: dict[str, tuple[int, str]] = field(default_factory=dict)
    """column -> its first row that holds no text, and what it holds"""
    missing: dict[str, list[int]] = field(default_factory=dict)
    """what is missing or ignored -> in how many rows, and the first of them"""


def read_table(
    name: str, source: Source, labels_required: bool = True, extra: str | None = None, quiet: bool = False
) -> Table:
    """All rows of a source, with only the columns its source names and `extra`, the ids.

    Raises:
        UserError: no such source, or one that cannot be read.
    """
    origin = find_origin(name, source)
    folder = cache_folder(quiet) if origin.num_bytes >= LARGE else None
    if folder is not None:
        try:
            return _kept_table(folder, origin, labels_required, extra, quiet)
        except OSError as error:  # of the cache; those of the source are a UserError
            say_without_cache(folder, error, quiet)
    seen = _Seen([0] * (1 if origin.hub is not None else len(origin.paths)))
    rows = pa.Table.from_batches(_batches(origin, extra, seen, True), _schema(source, extra))
    _refuse_incomplete(origin, seen, labels_required, extra)
    return _table(origin, rows, None, seen.file_rows, seen.missing, _problem(origin, extra, seen))


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
    print_once(f"note: going on without the cache {folder} (HF_DATASETS_CACHE): {error.strerror or error}", quiet)


def progress(name: str, unit: str, total: int | None, quiet: bool) -> Any:
    """A bar on a terminal; elsewhere a line a minute, where it takes that long. Of the first process of a machine."""
    return tqdm(
        desc=name,
        unit=f" {unit}",
        unit_scale=True,
        total=total,
        disable=quiet or not is_first_on_machine(),
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
    source = dataclasses.asdict(dataclasses.replace(origin.source, label_names=None))
    path = source.pop("path")
    place = list(map(kind_of, origin.paths)) if origin.hub is None else path
    key = json.dumps([LAYOUT, source, place, extra, content], sort_keys=True)
    path = folder / f"{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.rows"
    with lock_cache_entry(path, quiet) as part:
        found = _opened(path)
        if found is not None:
            table = _table(origin, *found, None)
            if not labels_required or table.label_codes is not None:
                return table
        seen = _Seen([0] * (1 if origin.hub is not None else len(origin.paths)))
        try:
            with pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, _schema(origin.source, extra)) as writer:
                for batch in _batches(origin, extra, seen, quiet):
                    writer.write_batch(batch)
            _refuse_incomplete(origin, seen, labels_required, extra)
            if origin.content() != content:
                raise UserError(f"{origin.option}: {origin.source.path} was changed while it was read")
            rows, mapped = _mapped(part)
            problem = _problem(origin, extra, seen)
            if problem is None:
                about = {"hash": _hash_of(mapped), "file_rows": seen.file_rows, "missing": seen.missing}
                _beside(path).write_text(json.dumps(about), encoding="utf-8")
                share(_beside(path))
                share(part)
                publish(part, path)
            return _table(origin, rows, mapped, seen.file_rows, seen.missing, problem)
        finally:
            part.unlink(missing_ok=True)


def _opened(path: Path) -> tuple[pa.Table, mmap.mmap, list[int], dict[str, list[int]]] | None:
    """The rows of a file, mapped, and what is known of them; None where the file is absent or not as it was written."""
    try:
        about = json.loads(_beside(path).read_text(encoding="utf-8"))
        rows, mapped = _mapped(path)
        if _hash_of(mapped) == about["hash"]:
            return rows, mapped, about["file_rows"], about["missing"]
    except (OSError, ValueError, KeyError, TypeError):  # an ArrowInvalid is a ValueError
        pass
    return None


def _beside(path: Path) -> Path:
    return path.with_suffix(".json")


def _mapped(path: Path) -> tuple[pa.Table, mmap.mmap]:
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return pa.ipc.open_file(pa.py_buffer(mapped)).read_all(), mapped


def _hash_of(mapped: mmap.mmap) -> str:
    digest = xxhash.xxh3_128()  # as fast as memory; against damage, not against an attacker
    with memoryview(mapped) as content:
        for start in range(0, len(content), BLOCK):
            digest.update(content[start : start + BLOCK])
            forget(mapped)
    return str(digest.hexdigest())


def _table(
    origin: Origin,
    rows: pa.Table,
    file: mmap.mmap | None,
    file_rows: list[int],
    missing: dict[str, list[int]],
    problem: str | None,
) -> Table:
    kept, others = (
        np.arange(rows.num_rows),
        rows.select([name for name in ("label", "id") if name in rows.column_names]),
    )
    texts = [name for name in ("text", "text_pair") if name in rows.column_names]
    words = [
        np.frombuffer(chunk.buffers()[1], dtype=np.uint64, count=2 * len(chunk)) for chunk in rows["digest"].chunks
    ]
    hashes = np.concatenate(words).reshape(-1, 2)
    if origin.source.empty_text == "skip" and missing and problem is None:
        has_text = np.all([pc.not_equal(rows[name], "").to_numpy() for name in texts], axis=0)
        kept, others, hashes = np.flatnonzero(has_text), others.filter(pa.array(has_text)), hashes[has_text]
        if not len(kept):
            raise UserError(f"{origin.option}: {origin.source.path} has no row with a text")
    column = others["label"].dictionary_encode().combine_chunks()
    columns = [Texts(rows[name], kept, file) for name in texts]
    table = Table(
        origin=origin,
        file_rows=file_rows,
        texts=columns[0],
        text_pairs=columns[1] if len(columns) > 1 else None,
        label_values=column.dictionary.to_pylist(),
        label_codes=column.indices.to_numpy().astype(np.int64) if column.null_count == 0 else None,
        digests=hashes,
        ids=others["id"].to_pylist() if "id" in others.column_names else None,
        problem=problem,
        warnings=_warnings(origin, missing, file_rows) if problem is None else [],
    )
    forget(file)
    return table


# --- a pass over the rows ---------------------------------------------------------------------------------------------


def _schema(source: Source, extra: str | None) -> pa.Schema:
    present = {"text": True, "text_pair": source.text_pair_columns, "label": True, "id": extra is not None}
    return pa.schema([*((name, pa.large_string()) for name in present if present[name]), ("digest", pa.binary(16))])


def _batches(origin: Origin, extra: str | None, seen: _Seen, quiet: bool) -> Iterator[pa.RecordBatch]:
    source = origin.source
    wanted = [*(source.text_columns or []), *(source.text_pair_columns or []), source.label_column or NO_COLUMN]
    wanted += [extra] if extra is not None else []
    with progress(f"reading {origin.name}", "rows", None, quiet) as bar:
        for file, (count, chunk) in origin.chunks(wanted):
            _note_missing(seen, SPILLED, chunk.pop(SPILLED, []))
            seen.columns.update(dict.fromkeys(chunk))
            if count:
                yield _batch((count, chunk), source, extra, seen)
            seen.num_rows += count
            seen.file_rows[file] += count
            bar.update(count)


def _batch(chunk: Chunk, source: Source, extra: str | None, seen: _Seen) -> pa.RecordBatch:
    texts = _joined(chunk, source.text_columns or [], seen)
    pairs = _joined(chunk, source.text_pair_columns, seen) if source.text_pair_columns else None
    labels = [label_text(value) for value in _checked(chunk, source.label_column or "", seen)]
    needed = [(text and pair) or source.empty_text != "skip" for text, pair in zip(texts, pairs or texts, strict=True)]
    _note_missing(seen, "label", [label is None and bool(need) for label, need in zip(labels, needed, strict=True)])
    ids = _checked_ids(chunk, extra, seen) if extra is not None else None
    columns: list[Any] = [column for column in (texts, pairs, labels, ids) if column is not None]
    if seen.no_text:  # refused at the end; until then half a character would stop us
        columns = [[v and v.encode("utf-8", "replace").decode() for v in column] for column in columns]
    schema, hashes = _schema(source, extra), pa.py_buffer(digests(texts, pairs))
    arrays = [pa.array(column, kind) for column, kind in zip(columns, schema.types[:-1], strict=True)]
    arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), chunk[0], [None, hashes]))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _values(chunk: Chunk, column: str) -> list[Any]:
    count, columns = chunk
    return columns[column] if column in columns else [None] * count


def _joined(chunk: Chunk, columns: Sequence[str], seen: _Seen) -> list[str]:
    parts = [["" if v is None or v != v else str(v).strip() for v in _checked(chunk, c, seen)] for c in columns]
    texts = parts[0] if len(parts) == 1 else [" ".join(filter(None, row)) for row in zip(*parts, strict=True)]
    _note_missing(seen, f"text ({', '.join(columns)})", [not text for text in texts])
    return texts


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
            seen.no_text[column] = seen.num_rows + index, f"column {column!r} holds {kind}"
            break
    return values


def _checked_ids(chunk: Chunk, column: str, seen: _Seen) -> list[str]:
    ids = ["" if value is None else str(value) for value in _checked(chunk, column, seen)]
    _note_missing(seen, "id", [not text for text in ids])
    return ids


def _note_missing(seen: _Seen, what: str, missing: list[bool]) -> None:
    if any(missing):
        rows = [seen.num_rows + index for index, absent in enumerate(missing) if absent]
        count, *first = seen.missing.get(what, [0])
        seen.missing[what] = [count + len(rows), *[*first, *rows][:SHOWN]]


def _refuse_incomplete(origin: Origin, seen: _Seen, labels_required: bool, extra: str | None) -> None:
    source = origin.source
    if not seen.columns:
        raise UserError(f"{origin.option}: {source.path} has no rows")
    label = source.label_column or ""
    wanted = [*(source.text_columns or []), *(source.text_pair_columns or [])]
    wanted += ([label] if labels_required else []) + ([extra] if extra is not None else [])
    missing = [column for column in wanted if column not in seen.columns]
    if missing:
        group = "--" if origin.name == "input" else "data."
        named = "label_column" if missing == [label] else "id_column" if missing == [extra] else "text_columns"
        alike = "".join(describe_look_alikes(column, seen.columns) for column in missing)
        hint = "" if source.column_names else f"; for a file without a header name its columns in {group}column_names"
        raise UserError(
            f"{origin.option}: {source.path} has no column {', '.join(map(repr, missing))}; it has "
            f"{', '.join(repr(column[:40]) for column in list(seen.columns)[:12])}{alike} (see {group}{named}{hint})"
        )
    if not seen.num_rows:
        raise UserError(f"{origin.option}: {source.path} has no rows")


def _problem(origin: Origin, extra: str | None, seen: _Seen) -> str | None:
    """What is wrong with the rows, the first that is found."""
    source, label = origin.source, origin.source.label_column or ""
    groups = _text_groups(source)
    fixes = dict.fromkeys(groups, f"; {option_prefix(origin.name)}empty_text skip leaves them out")
    if label in seen.columns:
        groups["label"] = [label]
    if extra is not None:
        groups["id"] = [extra]
    if origin.name == "input":
        fixes |= {"label": "; --ignore_labels true reads none", "id": "; --id_column '' takes the row's number"}
    for what, columns in groups.items():
        for row, told in (seen.no_text[column] for column in columns if column in seen.no_text):
            return f"{origin.option}: {source.path}: {_places(origin, seen.file_rows, [row])}: {told}"
        if what in seen.missing and (what not in _text_groups(source) or source.empty_text in (None, "refuse")):
            return f"{_told_missing(origin, seen.missing, seen.file_rows, what)}{fixes.get(what, '')}"
    return None


def _warnings(origin: Origin, missing: dict[str, list[int]], file_rows: list[int]) -> list[str]:
    """Warns of empty texts that are not refused, and of texts that spill into columns without a name."""
    done = {"skip": "they are skipped", "keep": "they are kept"}.get(origin.source.empty_text or "", "")
    told = dict.fromkeys(_text_groups(origin.source), done)
    columns = f"{option_prefix(origin.name)}text_columns"
    told[SPILLED] = f"it is ignored; quote such texts, or name the columns in the header and list them in {columns}"
    return [f"{_told_missing(origin, missing, file_rows, what)}; {told[what]}" for what in told if what in missing]


def _text_groups(source: Source) -> dict[str, list[str]]:
    groups = (source.text_columns, source.text_pair_columns)
    return {f"text ({', '.join(columns)})": columns for columns in groups if columns}


def _told_missing(origin: Origin, missing: dict[str, list[int]], file_rows: list[int], what: str) -> str:
    count, *first = missing[what]
    places = _places(origin, file_rows, first) + (", ..." if count > SHOWN else "")
    has = "row has" if count == 1 else "rows have"
    told = what if what == SPILLED else f"an empty or missing {what}"
    return f"{origin.option}: {origin.source.path}: {count} {has} {told}: {places}"


def _places(origin: Origin, file_rows: list[int], rows: list[int]) -> str:
    """Rows as messages name them, counted from 1: "row 3, 5", or "row 3, 5 of a.csv; row 1 of b.csv"."""
    if len(file_rows) == 1:
        return f"row {', '.join(str(row + 1) for row in rows)}"
    ends = np.cumsum(file_rows)
    numbers: dict[str, list[str]] = {}
    for row, file in zip(rows, np.searchsorted(ends, rows, side="right"), strict=True):
        numbers.setdefault(origin.paths[file], []).append(str(row - int(ends[file]) + file_rows[file] + 1))
    return "; ".join(f"row {', '.join(some)} of {path}" for path, some in numbers.items())

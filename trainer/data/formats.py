"""A file of any known type -> its columns, a chunk of rows at a time.

Always holds: each record of the file is one row, in order, and its text is unchanged ("NA" and "null" too). What cannot
be read exactly is refused. In a message a "line" is a line of the file, and a "row" is a row of data. Both count from
1, and rows do not count the header. Only a chunk is in memory, except of a .json file and of a pickle.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet

from trainer.config.schema import ResolvedSource
from trainer.data.pickles import read_pickled_dataset

LINES = (".jsonl", ".ndjson")
TEXT_TYPES = (".csv", ".tsv", ".json", *LINES)
PARQUET, ARROW, PICKLES = (".parquet", ".pq"), (".arrow", ".feather"), (".pkl", ".pickle")
FILE_TYPES = (*TEXT_TYPES, *PARQUET, *ARROW, ".xlsx", *PICKLES)
PACKED = (".gz", ".zip")
CHUNK = 10_000
"""rows read at a time"""
HEAD_BYTES = 2**16
"""bytes of a file that are searched for signs of its type and encoding"""
BAD_BYTE = "\ud800"
"""marks a byte that has no meaning in an encoding: half a character, which no text holds"""
DELIMITERS = ",;|\t"
TRAILING_TEXT = "text behind the last named column"
"""key in the columns of a chunk: whether each row has such text"""
EXACT_BELOW = {pa.float16(): 2**11, pa.float32(): 2**24}
"""whole numbers below are exact in these types"""
AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary()}
"""by type of text: the type with the same offsets whose bytes may be any"""
UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, pa.ArrowException),
)
"""what libraries raise for damaged files (RuntimeError: an archive that needs a newer program)"""

_UNNAMED = re.compile(r"\s*|Unnamed: \d+")  # pandas writes the second for a column without a name
# files that are not text, by their first bytes
_SIGNATURES = {
    b"\x1f\x8b": "is compressed with gzip; add .gz to its name",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; name it .zip or .xlsx",
    b"PAR1": "is a parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; name it .arrow",
}

csv.field_size_limit(2**31 - 1)

Columns = dict[str, list[Any]]
Chunk = tuple[int, Columns]
"""number of rows, and the values of their columns"""
Record = tuple[int, list[Any]]
"""number of the line where a record begins, and its fields; a blank line has none"""


@dataclass(frozen=True)
class Request:
    """What is read from a file, and how."""

    source: ResolvedSource
    wanted: list[str]
    """columns to read; of others only the names are read"""
    prefix: str
    """begins the options of this split in messages"""


def file_type(path: str) -> str:
    """Returns the type of a file by its name: .csv for x.csv, for X.CSV.gz, and for a zip that holds x.csv."""
    outer = Path(path).suffix.lower()
    if outer not in PACKED:
        return outer
    name = path[: -len(outer)]
    if outer == ".zip":
        with zipfile.ZipFile(path) as archive:
            name = _only_member(archive).filename
    kind = Path(name).suffix.lower()
    if kind not in TEXT_TYPES:
        raise ValueError(f"a compressed file must hold one of {', '.join(TEXT_TYPES)}, not {kind or name!r}")
    return kind


def read_file(path: str, request: Request) -> Iterator[Chunk]:
    """Reads all rows of a file in order. The names of its columns come even if it has no rows.

    Raises:
        ValueError: what is wrong, and where. Libraries raise others of UNREADABLE.
    """
    return _READERS[file_type(path)](path, request)


def read_class_names(path: str, label_column: str | None) -> list[str] | None:
    """Reads the names that `datasets` stored in a parquet or Arrow file for class numbers, or lists of them."""
    kind = file_type(path)
    if kind in PARQUET:
        schema = pyarrow.parquet.read_schema(path)
    elif kind in ARROW:
        with _open_arrow(path) as reader:
            schema = reader.schema
    else:
        return None
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label_column]
        feature = feature.get("feature") or feature  # of a list
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def _refuse_repeated(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have the same name {max(names, key=names.count)!r}")
    return names


def _in_chunks(items: Iterable[Any]) -> Iterator[list[Any]]:
    remaining = iter(items)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


# --- text and archives ------------------------------------------------------------------------------------------------


def _lines(path: str, request: Request) -> Iterator[str]:
    r"""Reads the lines of a text file with their ends: \n, or \r in a file without \n."""
    encoding, prefix = request.source.encoding, request.prefix
    with _open_binary(path) as file:
        _check_head(file.peek(), encoding, prefix)
        text = io.TextIOWrapper(file, encoding, "isotrain-mark", newline="\n")
        first = text.readline().removeprefix("\ufeff")
        lines = [first] if first.endswith("\n") else [f"{line}\n" for line in first.split("\r")]
        for number, line in enumerate(chain(lines, text), start=1):
            if BAD_BYTE in line:
                before, _, byte = line.partition(BAD_BYTE)
                raise ValueError(
                    f"line {number} has a byte that is not {encoding.upper()} (0x{ord(byte[0]):02x}, character "
                    f"{len(before) + 1}); set the file's encoding, as {prefix}encoding cp1252, or save it as UTF-8"
                )
            yield line


def _mark_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return BAD_BYTE + chr(error.object[error.start]), error.end


codecs.register_error("isotrain-mark", _mark_byte)


def _check_head(head: bytes, encoding: str, prefix: str) -> None:
    """Refuses a file that is visibly of another type or encoding, and would be read as other words."""
    for signature, reason in _SIGNATURES.items():
        if head.startswith(signature):
            raise ValueError(reason)
    name = codecs.lookup(encoding).name.removesuffix("-sig")
    is_wide = name.startswith(("utf-16", "utf-32"))
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        fits, likely = is_wide, "utf-16"
    elif head.count(0) > len(head) // 5:
        fits, likely = is_wide and name != "utf-16", "utf-16-le (or utf-16-be)"
    else:
        fits, likely = name == "utf-8" or not _is_utf8(head) or (head.isascii() and not is_wide), "utf-8"
    if head and not fits:
        raise ValueError(f"does not look like {encoding}: {prefix}encoding {likely}")


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True


@contextlib.contextmanager
def _open_binary(path: str) -> Iterator[Any]:
    """Opens a file, or the content of an archive."""
    kind = Path(path).suffix.lower()
    if kind == ".gz":
        with gzip.open(path) as packed:
            yield io.BufferedReader(cast(Any, packed), HEAD_BYTES)
    elif kind == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(_only_member(archive)) as member:
            yield io.BufferedReader(cast(Any, member), HEAD_BYTES)
    else:
        with open(path, "rb", HEAD_BYTES) as plain:
            yield plain


def _only_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        names = ", ".join(member.filename for member in members[:3]) + (", ..." if len(members) > 3 else "")
        raise ValueError(f"holds {len(members)} files ({names}); unpack it and give the path of one file")
    return members[0]


# --- csv, tsv and xlsx ------------------------------------------------------------------------------------------------


def _read_csv(path: str, request: Request) -> Iterator[Chunk]:
    delimiter = request.source.delimiter or ("\t" if file_type(path) == ".tsv" else ",")
    delimiter = delimiter.replace("\\t", "\t")
    _check_delimiter(next(filter(str.strip, _lines(path, request)), ""), delimiter, request)
    return _read_records(_csv_records(_lines(path, request), delimiter, request), "", request)


def _csv_records(lines: Iterator[str], delimiter: str, request: Request) -> Iterator[Record]:
    may_span, prefix, start = request.source.quoting == "multi_line", request.prefix, 1

    def check(lines: Iterator[str]) -> Iterator[str]:
        """Refuses a line that continues a record, unless records may span lines."""
        for number, line in enumerate(lines, start=1):
            if not may_span:
                if number > start:  # csv.reader reads on to find the closing quote
                    raise csv.Error("unexpected end")
                if line.find("\r", 0, -2) >= 0 and "\r" in line.rstrip("\r\n"):
                    raise ValueError(
                        f"line {number} has a carriage return (\\r) inside, which would split a row in other programs; "
                        f"remove it, or, inside quotes, allow it with {prefix}quoting multi_line"
                    )
            yield line

    quoting: Any = csv.QUOTE_NONE if request.source.quoting == "none" else csv.QUOTE_MINIMAL
    reader = csv.reader(check(lines), delimiter=delimiter, quoting=quoting, strict=True)
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        reason = str(error)
        if reason.startswith("new-line"):
            raise ValueError(f"line {reader.line_num} has a carriage return (\\r) outside quotes") from None
        if reason.startswith("unexpected end"):
            reason = "a quote opens here and does not close"
            reason += "" if may_span else f" in this line; if texts may span lines: {prefix}quoting multi_line"
        elif "expected after" in reason:
            reason = "text follows a quote that closes; write a quote inside quotes twice"
        raise ValueError(f"line {start}: {reason}; if quotes are plain characters: {prefix}quoting none") from None


def _check_delimiter(line: str, delimiter: str, request: Request) -> None:
    """Refuses a first line that fits another delimiter than the one it is read with."""
    names = request.source.column_names
    texts = {*request.source.text_columns, *request.source.text_pair_columns}

    def split_by(separator: str) -> list[str]:
        return [field.strip() for field in next(csv.reader([line.replace("\r", "")], delimiter=separator), [])]

    def fits(fields: list[str]) -> bool:
        return len(fields) == len(names) if names else texts <= set(fields)

    own = split_by(delimiter)
    if fits(own):
        return
    for other in DELIMITERS:
        fields = split_by(other)
        if len(fields) > 1 and other != delimiter and (fits(fields) or (not names and len(own) == 1)):
            fix = f"{request.prefix}delimiter {other!r}"
            raise ValueError(f"its first line is separated by {other!r}, not by {delimiter!r}: {fix}")


def _read_xlsx(path: str, request: Request) -> Iterator[Chunk]:
    """Reads the only sheet with cells."""
    import pandas

    try:
        frames = pandas.read_excel(path, sheet_name=None, header=None, dtype=object, na_filter=False, engine="openpyxl")
    except ImportError:
        raise ValueError("reading .xlsx needs openpyxl: pip install openpyxl (or save the sheet as csv)") from None
    except Exception as error:  # a damaged book makes openpyxl or its XML parser raise anything
        raise ValueError(f"cannot be read: {error}") from None
    sheets = {name: frame.values.tolist() for name, frame in frames.items() if frame.size}
    if len(sheets) > 1:
        names = ", ".join(map(repr, list(sheets)[:4]))
        raise ValueError(f"has {len(sheets)} sheets with cells ({names}); save the one you mean as csv")
    rows: list[list[Any]] = next(iter(sheets.values()), [])
    missing = [""] * (len(request.source.column_names or []) - len(rows[0])) if rows else []
    records = ((i, row + missing if any(cell != "" for cell in row) else []) for i, row in enumerate(rows, start=1))
    return _read_records(records, " of the sheet", request)


def _read_records(records: Iterator[Record], place: str, request: Request) -> Iterator[Chunk]:
    """Makes columns of records. The first is the header, unless the columns were named.

    `place` follows the number of a line in messages.
    """
    header = request.source.column_names or next((fields for _, fields in records if fields), [])
    names = list(map(str, header))
    used = _refuse_repeated([name for name in names if name in request.wanted])
    index = {name: names.index(name) for name in used}
    yield 0, {name: [] for name in names if name.strip() or name in used}
    end = max((i for i, name in enumerate(names, 1) if name in used or not _UNNAMED.fullmatch(name)), default=0)
    for chunk in _in_chunks(_checked_rows(records, names, place, request)):
        columns: Columns = {name: [row[i] for row in chunk] for name, i in index.items()}
        if end < len(names):
            columns[TRAILING_TEXT] = [any(str(cell).strip() for cell in row[end:]) for row in chunk]
        yield len(chunk), columns


def _checked_rows(records: Iterator[Record], names: list[str], place: str, request: Request) -> Iterator[list[Any]]:
    num_blank, may_be_header = 0, request.source.column_names is not None
    for number, row in records:
        if not row:
            num_blank += 1
            continue
        if num_blank and len(names) == 1:  # in one column, a blank line before others is an empty cell
            yield from [[""]] * num_blank
        num_blank = 0
        if len(row) != len(names):
            expected = f"expected {len(names)} ({', '.join(names)[:80]})"
            raise ValueError(f"line {number}{place} has {len(row)} fields, {expected}")
        if may_be_header:
            _refuse_header(row, names, f"line {number}{place}", request.prefix)
            may_be_header = False
        if row[-1] == names[-1] and len(names) > 1 and [str(cell).removeprefix("\ufeff") for cell in row] == names:
            raise ValueError(f"line {number}{place} repeats the names of the columns; remove it")
        yield row


def _refuse_header(row: list[Any], names: list[str], place: str, prefix: str) -> None:
    """Refuses a first row if at least half of its cells are names of columns."""
    known = {name.strip().casefold() for name in names}
    if 2 * sum(str(cell).strip().casefold() in known for cell in row) >= len(names):
        raise ValueError(
            f"{place} is a header ({', '.join(map(str, row))[:80]}), and column_names is for files without one: "
            f"{prefix}column_names [] (if it is a row, give the columns other names)"
        )


# --- json -------------------------------------------------------------------------------------------------------------


def _read_json(path: str, request: Request) -> Iterator[Chunk]:
    """Reads one object a line, or in a .json file also a list of objects."""
    lines: Iterable[str] = _lines(path, request)
    text = "".join(lines) if file_type(path) == ".json" else ""
    records = _parse_lines(text.split("\n") if text else lines)
    if text.lstrip().startswith("["):
        records = (_checked_object(item, f"row {row}") for row, item in enumerate(_parse_list(text), start=1))
    for chunk in _in_chunks(records):
        names = dict.fromkeys(name for record in chunk for name in record)
        yield len(chunk), {n: [r.get(n) for r in chunk] if n in request.wanted else [] for n in names}


def _parse_list(text: str) -> list[Any]:
    items: list[Any] = json.loads(text, object_pairs_hook=_make_object)
    return items


def _make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(made := dict(pairs)) < len(pairs):
        _refuse_repeated([name for name, _ in pairs])
    return made


def _parse_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = json.loads(line, object_pairs_hook=_make_object)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} (character {error.pos + 1})") from None
            except ValueError as error:  # a number with too many digits
                raise ValueError(f"line {number}: {error}") from None
            yield _checked_object(value, f"line {number}")


def _checked_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a {type(value).__name__}, not an object")
    return value


# --- arrow ------------------------------------------------------------------------------------------------------------


def _read_parquet(path: str, request: Request) -> Iterator[Chunk]:
    # not read_table, which would make a column of a folder called label=1
    with pyarrow.parquet.ParquetFile(path) as file:
        used = _refuse_repeated([name for name in file.schema_arrow.names if name in request.wanted])
        yield from _read_batches(file.schema_arrow.names, used, file.iter_batches(CHUNK, columns=used))


def _read_arrow(path: str, request: Request) -> Iterator[Chunk]:
    def checked(batch: pa.RecordBatch) -> pa.RecordBatch:
        batch = batch.select(used)
        for column in batch.columns:  # a wrong offset would read foreign memory; `_values` names rows that are no text
            column.cast(AS_BYTES.get(column.type, column.type)).validate(full=True)
        return batch

    with _open_arrow(path) as reader:
        is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        used = _refuse_repeated([name for name in reader.schema.names if name in request.wanted])
        yield from _read_batches(reader.schema.names, used, map(checked, batches))


def _read_pickle(path: str, request: Request) -> Iterator[Chunk]:
    names, table = read_pickled_dataset(path, request.wanted)
    return _read_batches(names, table.column_names, table.to_batches())


def _read_batches(names: list[str], used: list[str], batches: Iterable[pa.RecordBatch]) -> Iterator[Chunk]:
    """Reads the columns `used` of batches that have the columns `names`."""
    yield 0, {name: [] for name in names}
    first = 0
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK):
            part = batch.slice(start, CHUNK)
            yield part.num_rows, {name: _values(part.column(name), name, first + start) for name in used}
        first += batch.num_rows


@contextlib.contextmanager
def _open_arrow(path: str) -> Iterator[Any]:
    """Opens an Arrow file, or an Arrow stream, which `datasets` writes under the same suffix."""
    with pa.memory_map(path) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
        with reader:
            yield reader


def _values(column: Any, name: str, first: int) -> list[Any]:
    """Converts a column whose first value is that of row `first`, counted from 0."""
    try:
        values: list[Any] = column.to_pylist()
        limit = EXACT_BELOW.get(column.type)
        for row, value in enumerate(values if limit else (), start=first + 1):
            if value is not None and abs(value) >= limit and value.is_integer():
                reason = f"is {column.type}, in which {value:.0f} may have lost digits"
                raise ValueError(f"row {row}: column {name!r} {reason}")
        return values
    except UnicodeDecodeError:
        for row, value in enumerate(column, start=first + 1):
            try:
                value.as_py()
            except UnicodeDecodeError as error:
                bad = error.object[error.start : error.start + 1].hex()
                raise ValueError(f"row {row}: column {name!r} has a byte that is not UTF-8 (0x{bad})") from None
        raise


_READERS: dict[str, Callable[[str, Request], Iterator[Chunk]]] = {
    **dict.fromkeys((".csv", ".tsv"), _read_csv),
    **dict.fromkeys((".json", *LINES), _read_json),
    **dict.fromkeys(PARQUET, _read_parquet),
    **dict.fromkeys(ARROW, _read_arrow),
    ".xlsx": _read_xlsx,
    **dict.fromkeys(PICKLES, _read_pickle),
}

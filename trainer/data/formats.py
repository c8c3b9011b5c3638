"""A file of any known type -> its columns, a chunk of rows at a time.

Always holds: each record of the file is one row, in order, and its text is unchanged ("NA" and "null" too). What cannot
be read exactly is refused. In a message a "line" is a line of the file, and a "row" is a row of data. Both count from
1, and rows do not count the header. Nothing pickled is opened. Only a chunk is in memory, except of a .json file.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow as pa
import pyarrow.parquet

from trainer.config.schema import ResolvedSource

LINES = (".jsonl", ".ndjson")
TEXT_TYPES = (".csv", ".tsv", ".json", *LINES)
PARQUET, ARROW = (".parquet", ".pq"), (".arrow", ".feather")
FILE_TYPES = (*TEXT_TYPES, *PARQUET, *ARROW, ".xlsx")
PACKED = (".gz", ".zip")
CHUNK = 10_000
"""rows read at a time"""
HEAD_BYTES = 2**16
"""bytes of a file that are searched for signs of its type and encoding"""
MAX_UNPACKED_BYTES, MAX_GROWTH = 2**28, 100
"""limits of an archive's content: its size, or how many times the archive's size"""
DELIMITERS = {",": ",", ";": ";", "|": "|", "\t": "\\t"}
"""{delimiter: how it is typed}"""
TRAILING_TEXT = "text behind the last named column"
"""key in the columns of a chunk: whether each row has such text"""
EXACT_BELOW = {pa.float16(): 2**11, pa.float32(): 2**24}
"""whole numbers below are exact in these types"""
UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError),
    *(zlib.error, zipfile.BadZipFile, pa.ArrowException),
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
    """Returns the type of a file by its name: .csv for x.csv, for X.CSV.gz, and for a zip that holds x.csv.

    Raises:
        ValueError: an archive that is not supported.
    """
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


def read_batches(
    names: list[str], wanted: list[str], batches_of: Callable[[list[str]], Iterable[Any]]
) -> Iterator[Chunk]:
    """Reads the wanted columns of Arrow batches or tables.

    Args:
        names: of all columns.
        wanted: columns to read.
        batches_of: the wanted columns that exist -> batches that hold them.
    """
    used = _refuse_repeated([name for name in names if name in wanted])
    yield 0, {name: [] for name in names}
    first = 0
    for batch in batches_of(used):
        for start in range(0, batch.num_rows, CHUNK):
            part = batch.slice(start, CHUNK)
            yield part.num_rows, {name: _values(part.column(name), name, first + start) for name in used}
        first += batch.num_rows


def read_class_names(path: str, label_column: str | None) -> list[str] | None:
    """Reads the names that `datasets` stored in a parquet or Arrow file for the numbers of a ClassLabel column."""
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
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (TypeError, KeyError, ValueError):
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
    encoding = request.source.encoding
    try:
        with _open_text(path, encoding, request.prefix) as file:
            first = file.readline().removeprefix("\ufeff")
            yield from [first] if first.endswith("\n") else [f"{line}\n" for line in first.split("\r")]
            yield from file
    except UnicodeDecodeError:
        raise ValueError(_describe_undecodable(path, encoding, request.prefix)) from None


@contextlib.contextmanager
def _open_text(path: str, encoding: str, prefix: str, errors: str = "strict") -> Iterator[TextIO]:
    with _open_unpacked(path) as file, io.BufferedReader(file, HEAD_BYTES) as buffered:
        _check_head(buffered.peek(), encoding, prefix)
        yield io.TextIOWrapper(buffered, encoding, errors, newline="\n")


def _check_head(head: bytes, encoding: str, prefix: str) -> None:
    """Refuses a file that is visibly of another type or encoding, and would be read as other words."""
    for signature, reason in _SIGNATURES.items():
        if head.startswith(signature):
            raise ValueError(reason)
    name = codecs.lookup(encoding).name.removesuffix("-sig")
    is_marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if name.startswith(("utf-16", "utf-32")):
        if head and b"\0" not in head and _is_utf8(head):
            raise ValueError(f"is UTF-8, not {encoding}: {prefix}encoding utf-8")
        if head and name == "utf-16" and not is_marked:
            raise ValueError(f"has no byte order mark: {prefix}encoding utf-16-le (or utf-16-be)")
    elif is_marked:
        raise ValueError(f"is UTF-16: {prefix}encoding utf-16")
    elif head.count(0) > len(head) // 5:
        raise ValueError(f"has a NUL in place of every other letter: {prefix}encoding utf-16-le (or utf-16-be)")
    elif name != "utf-8" and not head.isascii() and _is_utf8(head):
        raise ValueError(f"is UTF-8, not {encoding}: {prefix}encoding utf-8")


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return True


def _describe_undecodable(path: str, encoding: str, prefix: str) -> str:
    """Finds the first byte that has no meaning in an encoding."""
    bad: list[str] = []

    def mark(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        bad.append(error.object[error.start : error.start + 1].hex())
        return "\ud800", error.end  # no text holds half a character

    codecs.register_error("isotrain-mark", mark)
    with _open_text(path, encoding, prefix, "isotrain-mark") as file:
        for number, line in enumerate(file, start=1):
            if "\ud800" in line:
                place = f"0x{bad[0]}, character {line.index(chr(0xD800)) + 1}"
                fix = f"set the file's encoding, as {prefix}encoding cp1252, or save it as UTF-8"
                return f"line {number} has a byte that is not {encoding.upper()} ({place}); {fix}"
    return f"is not {encoding.upper()}"


class _Unpacked(io.RawIOBase):
    """The content of an archive; refuses a small archive that becomes far larger."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, packed_bytes: int):
        self._file, self._packed_bytes, self._num_bytes = file, packed_bytes, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._num_bytes += len(data)
        _check_growth(self._packed_bytes, self._num_bytes)
        buffer[: len(data)] = data
        return len(data)


def _check_growth(packed_bytes: int, unpacked_bytes: int) -> None:
    if unpacked_bytes > max(MAX_UNPACKED_BYTES, MAX_GROWTH * packed_bytes):
        raise ValueError(f"unpacks to more than {MAX_GROWTH} times its size; unpack it yourself if you trust it")


@contextlib.contextmanager
def _open_unpacked(path: str) -> Iterator[io.RawIOBase]:
    kind = Path(path).suffix.lower()
    if kind == ".gz":
        with gzip.open(path) as file:
            yield _Unpacked(file, Path(path).stat().st_size)
    elif kind == ".zip":
        with zipfile.ZipFile(path) as archive, archive.open(_only_member(archive)) as member:
            yield _Unpacked(member, Path(path).stat().st_size)
    else:
        with open(path, "rb", buffering=0) as plain:
            yield plain


def _only_member(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        names = ", ".join(member.filename for member in members[:3]) + (", ..." if len(members) > 3 else "")
        raise ValueError(f"holds {len(members)} files ({names}); unpack it and give the path of one file")
    if members[0].flag_bits & 1:
        raise ValueError("is encrypted; unpack it")
    return members[0]


# --- csv, tsv and xlsx ------------------------------------------------------------------------------------------------


def _read_csv(path: str, request: Request) -> Iterator[Chunk]:
    lines = filter(str.strip, _lines(path, request))
    first = next(lines, "")
    excel = re.fullmatch(r'("?)sep=(.)\1', first.rstrip("\r\n"))  # Excel's note of the delimiter
    excel = excel if len(request.source.column_names or ()) != 1 else None  # there it may be a text
    delimiter = request.source.delimiter or (excel and excel[2]) or ("\t" if file_type(path) == ".tsv" else ",")
    delimiter = "\t" if delimiter == "\\t" else delimiter
    _check_delimiter(next(lines, "") if excel else first, delimiter, request)
    records = _csv_records(_lines(path, request), delimiter, request)
    if excel:
        next(fields for _, fields in records if fields)
    return _read_records(records, "", request)


def _csv_records(lines: Iterator[str], delimiter: str, request: Request) -> Iterator[Record]:
    quoting, prefix, start = request.source.quoting, request.prefix, 1
    no_quotes = f"if quotes are plain characters: {prefix}quoting none"

    def describe_open_quote() -> str:
        if quoting == "multi_line":
            return f"line {start}: the row that begins here has a quote that never closes; {no_quotes}"
        reason = (
            f"a quote opens here and does not close in this line; if texts may span lines: {prefix}quoting multi_line"
        )
        return f"line {start}: {reason}; {no_quotes}"

    def check(lines: Iterator[str]) -> Iterator[str]:
        """Refuses a line that continues a record, unless records may span lines."""
        for number, line in enumerate(lines, start=1):
            if quoting != "multi_line":
                if number > start:  # csv.reader reads on to find the closing quote
                    raise ValueError(describe_open_quote())
                if line.find("\r", 0, -2) >= 0 and "\r" in line.rstrip("\r\n"):
                    raise ValueError(
                        f"line {number} has a carriage return (\\r) inside, which would split a row in other programs; "
                        f"remove it, or, inside quotes, allow it with {prefix}quoting multi_line"
                    )
            yield line

    csv_quoting: Any = csv.QUOTE_NONE if quoting == "none" else csv.QUOTE_MINIMAL
    reader = csv.reader(check(lines), delimiter=delimiter, quoting=csv_quoting, strict=True)
    try:
        for fields in reader:
            yield start, fields
            start = reader.line_num + 1
    except csv.Error as error:
        reason = str(error)
        if reason.startswith("unexpected end"):
            raise ValueError(describe_open_quote()) from None
        if reason.startswith("new-line"):
            raise ValueError(f"line {reader.line_num} has a carriage return (\\r) outside quotes") from None
        if "expected after" in reason:
            reason = "text follows a quote that closes; write a quote inside quotes twice"
        raise ValueError(f"line {start}: {reason}; {no_quotes}") from None


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
    for other, typed in DELIMITERS.items():
        fields = split_by(other)
        if len(fields) > 1 and other != delimiter and (fits(fields) or (not names and len(own) == 1)):
            shown, fix = DELIMITERS.get(delimiter, delimiter), f"{request.prefix}delimiter '{typed}'"
            raise ValueError(f"its first line is separated by '{typed}', not by '{shown}': {fix}")


def _read_xlsx(path: str, request: Request) -> Iterator[Chunk]:
    """Reads the only sheet with cells."""
    try:
        import openpyxl
    except ImportError:
        raise ValueError("reading .xlsx needs openpyxl: pip install openpyxl (or save the sheet as csv)") from None
    with zipfile.ZipFile(path) as archive:
        _check_growth(Path(path).stat().st_size, sum(part.file_size for part in archive.infolist()))
    try:
        with warnings.catch_warnings(action="ignore"):  # about what a sheet has beside its cells
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        with contextlib.closing(book):
            width = len(request.source.column_names or [])
            sheets = [sheet for sheet in book.worksheets if any(cells for _, cells in _sheet_records(sheet, width))]
            if len(sheets) > 1:
                names = ", ".join(repr(sheet.title) for sheet in sheets[:4])
                raise ValueError(f"has {len(sheets)} sheets with cells ({names}); save the one you mean as csv")
            for sheet in sheets:
                yield from _read_records(_sheet_records(sheet, width), " of the sheet", request)
    except UNREADABLE:
        raise
    except Exception as error:  # a damaged book makes openpyxl or its XML parser raise anything
        raise ValueError(f"cannot be read: {error}") from None


def _sheet_records(sheet: Any, width: int) -> Iterator[Record]:
    """Cuts empty cells behind the columns, and fills up short rows. Without a width, the first row sets it."""
    sheet.reset_dimensions()  # some programs write a smaller one than the sheet has
    for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):
        cells = list(row)
        while len(cells) > width and cells[-1] is None:
            cells.pop()
        width = width or len(cells)
        yield number, [] if all(cell is None for cell in cells) else cells + [None] * (width - len(cells))


def _read_records(records: Iterator[Record], place: str, request: Request) -> Iterator[Chunk]:
    """Makes columns of records. The first is the header, unless the columns were named.

    Args:
        records: all records of a file.
        place: follows the number of a line in messages.
        request: what to read.
    """
    header = request.source.column_names or next((fields for _, fields in records if fields), [])
    names = [str(name) if name is not None else "" for name in header]
    used = _refuse_repeated([name for name in names if name in request.wanted])
    index = {name: names.index(name) for name in used}
    yield 0, {name: [] for name in names if name.strip() or name in used}
    end = max((i for i, name in enumerate(names, 1) if name in used or not _UNNAMED.fullmatch(name)), default=0)
    for chunk in _in_chunks(_checked_rows(records, names, place, request)):
        columns: Columns = {name: [row[i] for row in chunk] for name, i in index.items()}
        if end < len(names):
            columns[TRAILING_TEXT] = [any(c is not None and str(c).strip() for c in row[end:]) for row in chunk]
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
    parse = json.JSONDecoder(object_pairs_hook=partial(_make_object, request.wanted)).decode
    if file_type(path) in LINES:
        records = _parse_lines(lines, parse)
    else:
        text = "".join(lines)
        try:
            value = parse(text) if text.strip() else []
            if isinstance(value, dict) and set(value) & set(request.wanted):
                value = [value]  # a file of one line
            if not isinstance(value, list):
                raise ValueError("must hold a list of objects, or one object on each line")
            records = (_checked_object(item, f"row {row}") for row, item in enumerate(value, start=1))
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
            records = _parse_lines(text.split("\n"), parse)  # Spark and others write one object a line
    for chunk in _in_chunks(records):
        names = dict.fromkeys(name for record in chunk for name in record)
        yield len(chunk), {n: [r.get(n) for r in chunk] if n in request.wanted else [] for n in names}


def _parse_lines(lines: Iterable[str], parse: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = parse(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} (character {error.pos + 1})") from None
            except ValueError as error:  # a number with too many digits, or a repeated name
                raise ValueError(f"line {number}: {error}") from None
            yield _checked_object(value, f"line {number}")


def _checked_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} is a {type(value).__name__}, not an object")
    return value


def _make_object(wanted: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        _refuse_repeated([name for name, _ in pairs if name in wanted])
    return made


# --- arrow ------------------------------------------------------------------------------------------------------------


def _read_parquet(path: str, request: Request) -> Iterator[Chunk]:
    # not read_table, which would make a column of a folder called label=1
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from read_batches(
            file.schema_arrow.names, request.wanted, lambda used: file.iter_batches(CHUNK, columns=used)
        )


def _read_arrow(path: str, request: Request) -> Iterator[Chunk]:
    with _open_arrow(path) as reader:
        is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from read_batches(reader.schema.names, request.wanted, lambda _: batches)


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
                raise ValueError(
                    f"row {row}: column {name!r} is {column.type}, in which {value:.0f} may have lost digits"
                )
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
}

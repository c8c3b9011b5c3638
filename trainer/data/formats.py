"""One file of a known type -> its columns, a chunk of rows at a time.

Always holds: each record of the file is one row, in its order, and its text stays as it is ("NA" and "null" too). What
cannot be read exactly is refused. A message says "line" for a line of the file, and "row" for a data row; both count
from 1, and a header is no row. Nothing pickled is opened. No more than a chunk is in memory, except of a .json file.
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
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, TextIO, TypeVar

import pyarrow as pa
import pyarrow.parquet

from trainer.config.schema import Source

LINES = (".jsonl", ".ndjson")
TEXT_TYPES = (".csv", ".tsv", ".json", *LINES)
PARQUET, ARROW = (".parquet", ".pq"), (".arrow", ".feather")
FILE_TYPES = (*TEXT_TYPES, *PARQUET, *ARROW, ".xlsx")
PACKED = (".gz", ".zip")
CHUNK = 10_000  # rows
HEAD = 2**16  # bytes that tell an encoding
MOST_UNPACKED, MOST_GROWTH = 2**28, 100  # bytes, and how many times the archive's size
DELIMITERS = {",": ",", ";": ";", "|": "|", "\t": "\\t"}  # and how they are typed

SPILLED = "text behind the last named column"  # beside the columns of a chunk: whether each row has it
_UNNAMED = re.compile(r"\s*|Unnamed: \d+")  # the second is how pandas names a column without a name

# Files that are not text, by their first bytes.
_SIGNS = {
    b"\x1f\x8b": "is packed by gzip; add .gz to its name",
    b"PK\x03\x04": "is a zip archive or a spreadsheet; name it .zip or .xlsx",
    b"PAR1": "is a parquet file; name it .parquet",
    b"ARROW1": "is an Arrow file; name it .arrow",
}

csv.field_size_limit(2**31 - 1)

Chunk = tuple[int, dict[str, list[Any]]]
"""number of rows, and the columns that these rows have"""
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class Request:
    """What is read of a file, and how."""

    source: Source
    wanted: list[str]
    """columns; others are named, and have no values"""
    prefix: str
    """what the options of this split begin with, for messages"""


# What the readers raise for a file that is not as it should be (RuntimeError: an archive that needs more than we have).
UNREADABLE = (
    *(OSError, ValueError, EOFError, RuntimeError, OverflowError),
    *(zlib.error, zipfile.BadZipFile, pa.ArrowException),
)


def kind_of(path: str) -> str:
    """The type of a file by its name, in lower case: .csv of x.csv, of x.csv.gz, and of a zip with x.csv in it.

    Raises:
        ValueError: an archive that is not read.
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
        raise ValueError(f"packed files are read where they hold {', '.join(TEXT_TYPES)}, not {kind or name!r}")
    return kind


def read_file(path: str, request: Request) -> Iterator[Chunk]:
    """All rows of a file in their order; its columns are named also where it has no rows.

    Raises:
        ValueError: what is wrong, and where. Libraries raise others of UNREADABLE.
    """
    return _READERS[kind_of(path)](path, request)


def stored_class_names(path: str, label_column: str) -> list[str] | None:
    """The names that `datasets` has stored with a parquet or Arrow file for the numbers of a ClassLabel column."""
    kind = kind_of(path)
    if kind in PARQUET:
        schema = pyarrow.parquet.read_schema(path)
    elif kind in ARROW:
        with _arrow_reader(path) as reader:
            schema = reader.schema
    else:
        return None
    try:
        feature = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label_column]
        return [str(name) for name in feature["names"]] if feature["_type"] == "ClassLabel" else None
    except (TypeError, KeyError, ValueError):
        return None


def in_chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    """The items in lists of CHUNK."""
    remaining = iter(items)
    while chunk := list(islice(remaining, CHUNK)):
        yield chunk


# --- text -------------------------------------------------------------------------------------------------------------


def _lines(path: str, request: Request) -> Iterator[str]:
    r"""The lines of a text file with their ends. They end with \n, or with \r in a file that has no \n."""
    encoding = request.source.encoding or "utf-8"
    try:
        with _opened(path, encoding, request.prefix) as file:
            first = file.readline().removeprefix("\ufeff")
            yield from [first] if first.endswith("\n") else [f"{line}\n" for line in first.split("\r")]
            yield from file
    except UnicodeDecodeError:
        raise ValueError(_undecodable(path, encoding, request.prefix)) from None


@contextlib.contextmanager
def _opened(path: str, encoding: str, prefix: str, errors: str = "strict") -> Iterator[TextIO]:
    with _unpacked(path) as file, io.BufferedReader(file, HEAD) as buffered:
        _check_head(buffered.peek(), encoding, prefix)
        yield io.TextIOWrapper(buffered, encoding, errors, newline="\n")


def _check_head(head: bytes, encoding: str, prefix: str) -> None:
    """Refuses a file that is visibly of another type or encoding, which would be read as other words."""
    for sign, told in _SIGNS.items():
        if head.startswith(sign):
            raise ValueError(told)
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
        codecs.getincrementaldecoder("utf-8")().decode(head)  # a character may be cut off at the end
    except UnicodeDecodeError:
        return False
    return True


def _undecodable(path: str, encoding: str, prefix: str) -> str:
    """Where the first byte is that has no meaning in an encoding."""
    bad: list[str] = []

    def mark(error: UnicodeError) -> tuple[str, int]:
        assert isinstance(error, UnicodeDecodeError)
        bad.append(error.object[error.start : error.start + 1].hex())
        return "\ud800", error.end  # no text holds half a character

    codecs.register_error("isotrain-mark", mark)
    with _opened(path, encoding, prefix, "isotrain-mark") as file:
        for number, line in enumerate(file, start=1):
            if "\ud800" in line:
                place = f"0x{bad[0]}, character {line.index(chr(0xD800)) + 1}"
                fix = f"name the file's encoding, as {prefix}encoding cp1252, or save it as UTF-8"
                return f"line {number} has a byte that is not {encoding.upper()} ({place}); {fix}"
    return f"is not {encoding.upper()}"


# --- archives ---------------------------------------------------------------------------------------------------------


class _Unpacked(io.RawIOBase):
    """The content of an archive. A small one that becomes far larger is refused."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile, packed: int):
        self._file, self._packed, self._unpacked = file, packed, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._unpacked += len(data)
        _check_growth(self._packed, self._unpacked)
        buffer[: len(data)] = data
        return len(data)


def _check_growth(packed: int, unpacked: int) -> None:
    if unpacked > max(MOST_UNPACKED, MOST_GROWTH * packed):
        raise ValueError(f"unpacks to more than {MOST_GROWTH} times its size; unpack it yourself if that is right")


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[io.RawIOBase]:
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
    members = [
        member for member in archive.infolist() if not member.is_dir() and not member.filename.startswith("__MACOSX/")
    ]
    if len(members) != 1:
        names = ", ".join(member.filename for member in members[:3]) + (", ..." if len(members) > 3 else "")
        raise ValueError(f"holds {len(members)} files ({names}); unpack it and name the one that is meant")
    if members[0].flag_bits & 1:
        raise ValueError("is encrypted; unpack it")
    return members[0]


# --- tables -----------------------------------------------------------------------------------------------------------


class _Records:
    """The records of a csv or tsv file, each as a list of fields; a blank line is an empty list."""

    def __init__(self, lines: Iterator[str], delimiter: str, request: Request):
        self.line = 1
        """line in which the record begins that was read last"""
        self._prefix, self._quoting = request.prefix, request.source.quoting
        self._plain = f"if quotes are plain characters: {request.prefix}quoting none"
        quoting: Any = csv.QUOTE_NONE if self._quoting == "none" else csv.QUOTE_MINIMAL
        self._reader = csv.reader(self._checked(lines), delimiter=delimiter, quoting=quoting, strict=True)

    def _checked(self, lines: Iterator[str]) -> Iterator[str]:
        """The lines, until one would continue a record that may not: csv.reader asks for it to close a quote."""
        one_line = self._quoting != "multi_line"
        for number, line in enumerate(lines, start=1):
            if one_line:
                if number > self.line:
                    raise ValueError(self._open_quote())
                if line.find("\r", 0, -2) >= 0 and "\r" in line.rstrip("\r\n"):
                    raise ValueError(
                        f"line {number} has a carriage return (\\r) inside, which would split a row in other programs; "
                        f"remove it, or, where it lies in quotes, {self._prefix}quoting multi_line"
                    )
            yield line

    def __iter__(self) -> Iterator[list[str]]:
        try:
            for fields in self._reader:
                yield fields
                self.line = self._reader.line_num + 1
        except csv.Error as error:
            if str(error).startswith("unexpected end"):
                raise ValueError(self._open_quote()) from None
            if str(error).startswith("new-line"):
                raise ValueError(f"line {self._reader.line_num} has a carriage return (\\r) outside quotes") from None
            told = "text follows a quote that closes; a quote inside quotes is doubled"
            told = told if "expected after" in str(error) else str(error)
            raise ValueError(f"line {self.line}: {told}; {self._plain}") from None

    def _open_quote(self) -> str:
        if self._quoting == "multi_line":
            return f"line {self.line}: the row that begins here has a quote that never closes; {self._plain}"
        return (
            f"line {self.line}: a quote opens here and does not close in this line; if texts may span lines: "
            f"{self._prefix}quoting multi_line; {self._plain}"
        )


def _read_csv(path: str, request: Request) -> Iterator[Chunk]:
    lines = filter(str.strip, _lines(path, request))
    first = next(lines, "")
    noted = re.fullmatch(r'("?)sep=(.)\1', first.rstrip("\r\n"))  # a line for Excel
    noted = noted if len(request.source.column_names or ()) != 1 else None  # where it may be a text
    delimiter = request.source.delimiter or (noted and noted[2]) or ("\t" if kind_of(path) == ".tsv" else ",")
    delimiter = {typed: meant for meant, typed in DELIMITERS.items()}.get(delimiter, delimiter)
    _check_delimiter(next(lines, "") if noted else first, delimiter, request)
    records = _Records(_lines(path, request), delimiter, request)
    rows = iter(records)
    if noted:
        next(filter(None, rows))
    return _table(rows, lambda: f"line {records.line}", request)


def _read_xlsx(path: str, request: Request) -> Iterator[Chunk]:
    """The only sheet that holds something."""
    try:
        import openpyxl
    except ImportError:
        raise ValueError("reading .xlsx needs openpyxl: pip install openpyxl (or save the sheet as csv)") from None
    with zipfile.ZipFile(path) as archive:
        _check_growth(Path(path).stat().st_size, sum(part.file_size for part in archive.infolist()))
    number = 0

    def rows(sheet: Any) -> Iterator[list[Any]]:
        nonlocal number
        width = len(request.source.column_names or [])
        sheet.reset_dimensions()  # some programs write a smaller one than the sheet has
        for number, row in enumerate(sheet.iter_rows(values_only=True), start=1):  # noqa: B007
            cells = list(row)
            while len(cells) > width and cells[-1] is None:
                cells.pop()
            width = width or len(cells)
            yield [] if all(cell is None for cell in cells) else cells + [None] * (width - len(cells))

    try:
        with warnings.catch_warnings(action="ignore"):  # of what a sheet has beside its cells
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        with contextlib.closing(book):
            sheets = [sheet for sheet in book.worksheets if any(rows(sheet))]
            if len(sheets) > 1:
                names = ", ".join(repr(sheet.title) for sheet in sheets[:4])
                raise ValueError(f"has {len(sheets)} sheets with cells ({names}); save the one you mean as csv")
            for sheet in sheets:
                yield from _table(rows(sheet), lambda: f"line {number} of the sheet", request)
    except UNREADABLE:
        raise
    except Exception as error:  # whatever a damaged book makes openpyxl or its XML parser raise
        raise ValueError(f"cannot be read: {error}") from None


def _table(records: Iterable[list[Any]], place: Callable[[], str], request: Request) -> Iterator[Chunk]:
    rows, source = iter(records), request.source
    header = source.column_names or next(filter(None, rows), [])
    names = [str(name) if name is not None else "" for name in header]
    used = {name: i for i, name in enumerate(names) if name in request.wanted}
    repeated = [name for name in used if names.count(name) > 1]
    if repeated:
        raise ValueError(f"two columns have the same name {repeated[0]!r}")
    yield 0, {name: [] for name in names if name.strip() or name in used}
    named = [i for i, name in enumerate(names, start=1) if name in used or not _UNNAMED.fullmatch(name)]
    end = max(named, default=0)
    for chunk in in_chunks(_whole_rows(rows, names, place, request)):
        columns = {name: [row[i] for row in chunk] for name, i in used.items()}
        if end < len(names):
            columns[SPILLED] = [any(c is not None and str(c).strip() for c in row[end:]) for row in chunk]
        yield len(chunk), columns


def _whole_rows(
    rows: Iterator[list[Any]], names: list[str], place: Callable[[], str], request: Request
) -> Iterator[list[Any]]:
    num_blank, may_be_header = 0, bool(request.source.column_names)
    for row in rows:
        if not row:
            num_blank += 1
            continue
        if num_blank and len(names) == 1:  # a blank line before others is a cell that is empty
            yield from [[""]] * num_blank
        num_blank = 0
        if len(row) != len(names):
            raise ValueError(f"{place()} has {len(row)} fields, expected {len(names)} ({', '.join(names)[:80]})")
        if may_be_header:
            _refuse_header(row, names, place(), request.prefix)
            may_be_header = False
        if row[-1] == names[-1] and len(names) > 1 and [str(cell).removeprefix("\ufeff") for cell in row] == names:
            raise ValueError(f"{place()} repeats the names of the columns; remove it")
        yield row


def _refuse_header(row: list[Any], names: list[str], where: str, prefix: str) -> None:
    """Refuses a first row of which half of the cells or more are names of columns."""
    known = {name.strip().casefold() for name in names}
    if 2 * sum(str(cell).strip().casefold() in known for cell in row) >= len(names):
        shown = ", ".join(map(str, row))[:80]
        raise ValueError(
            f"{where} is a header ({shown}), and column_names is for files without one: {prefix}column_names "
            f"{'[]' if prefix != '--data.' else 'null'} (if it is a row, give the columns other names)"
        )


def _check_delimiter(line: str, delimiter: str, request: Request) -> None:
    """Refuses a first line that fits with another delimiter than the one it is read with."""
    names = request.source.column_names
    texts = {*(request.source.text_columns or []), *(request.source.text_pair_columns or [])}

    def fields(separator: str) -> list[str]:
        return [field.strip() for field in next(csv.reader([line.replace("\r", "")], delimiter=separator), [])]

    def fits(found: list[str]) -> bool:
        return len(found) == len(names) if names else texts <= set(found)

    own = fields(delimiter)
    if fits(own):
        return
    for other, typed in DELIMITERS.items():
        found = fields(other)
        if len(found) > 1 and other != delimiter and (fits(found) or (not names and len(own) == 1)):
            shown, fix = DELIMITERS.get(delimiter, delimiter), f"{request.prefix}delimiter '{typed}'"
            raise ValueError(f"its first line is separated by '{typed}', not by '{shown}': {fix}")


# --- json -------------------------------------------------------------------------------------------------------------


def _read_json(path: str, request: Request) -> Iterator[Chunk]:
    lines: Iterable[str] = _lines(path, request)
    records: Iterable[Any]
    parse = json.JSONDecoder(object_pairs_hook=partial(_object, request.wanted)).decode
    if kind_of(path) in LINES:
        records = _json_lines(lines, parse)
    else:
        text = "".join(lines)
        try:
            value = parse(text) if text.strip() else []
            if isinstance(value, dict) and set(value) & set(request.wanted):
                value = [value]  # a shard of one line
            if not isinstance(value, list):
                raise ValueError("must hold objects: a list of them, or one a line")
            records = _objects(value)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":
                raise
            records = _json_lines(text.split("\n"), parse)  # one object a line, as Spark and others write it
    for chunk in in_chunks(records):
        names = dict.fromkeys(name for record in chunk for name in record)
        yield len(chunk), {n: [r.get(n) for r in chunk] if n in request.wanted else [] for n in names}


def _objects(values: list[Any]) -> Iterator[dict[str, Any]]:
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise ValueError(f"row {number} is a {type(value).__name__}, not an object")
        yield value


def _object(wanted: list[str], pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        for name in wanted:
            if names.count(name) > 1:
                raise ValueError(f"two values have the same name {name!r}")
    return found


def _json_lines(lines: Iterable[str], parse: Callable[[str], Any]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                value = parse(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error.msg} (character {error.pos + 1})") from None
            except ValueError as error:  # a number of too many digits
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(value, dict):
                raise ValueError(f"line {number} is a {type(value).__name__}, not an object")
            yield value


# --- arrow ------------------------------------------------------------------------------------------------------------


def _read_parquet(path: str, request: Request) -> Iterator[Chunk]:
    # not read_table, which would make a column of a folder called label=1
    with pyarrow.parquet.ParquetFile(path) as file:
        used = yield from _named(file.schema_arrow.names, request)
        yield from arrow_chunks(file.iter_batches(CHUNK, columns=used), used)


def _read_arrow(path: str, request: Request) -> Iterator[Chunk]:
    with _arrow_reader(path) as reader:
        used = yield from _named(reader.schema.names, request)
        if isinstance(reader, pa.ipc.RecordBatchFileReader):
            yield from arrow_chunks(map(reader.get_batch, range(reader.num_record_batches)), used)
        else:
            yield from arrow_chunks(reader, used)


@contextlib.contextmanager
def _arrow_reader(path: str) -> Iterator[Any]:
    """A reader of an Arrow file, or of an Arrow stream, which `datasets` writes under the same suffix."""
    with pa.memory_map(path) as source:
        try:
            reader = pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            source.seek(0)
            reader = pa.ipc.open_stream(source)
        with reader:
            yield reader


def _named(names: list[str], request: Request) -> Generator[Chunk, None, list[str]]:
    """Names all columns; returns those that are wanted."""
    used = [name for name in names if name in request.wanted]
    if len(set(used)) < len(used):
        raise ValueError(f"two columns have the same name {max(used, key=used.count)!r}")
    yield 0, {name: [] for name in names}
    return used


def arrow_chunks(batches: Iterable[Any], used: list[str]) -> Iterator[Chunk]:
    """The used columns of Arrow batches or tables."""
    first = 0
    for batch in batches:
        for start in range(0, batch.num_rows, CHUNK):
            part = batch.slice(start, CHUNK)
            yield part.num_rows, {name: _values(part.column(name), name, first + start) for name in used}
        first += batch.num_rows


WHOLE_UP_TO = {pa.float16(): 2**11, pa.float32(): 2**24}  # whole numbers below are exact


def _values(column: Any, name: str, first: int) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
        exact = WHOLE_UP_TO.get(column.type)
        for row, value in enumerate(values if exact else (), start=first + 1):
            if value is not None and abs(value) >= exact and value.is_integer():
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

"""A pickled `datasets.Dataset` -> its columns. Nothing in the file is run.

Always holds: a pickle is read as data. `pickletools` splits it into operations, and a call that it asks for becomes a
`Call` with a name and arguments. No object of a library is made, so none of its code runs. Names that are not in
`GLOBALS` and operations that are not known below are refused. Only pyarrow sees the buffers, and checks each length.

The format is that of pickle.py and pickletools.py of Python, protocols 4 and 5.
"""

from __future__ import annotations

import os
import pickletools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from trainer.errors import one_line

MAX_BYTES = 2**30
"""of a file, and of a column in memory: a small file can repeat a large chunk"""
MAX_OPERATIONS = 1_000_000
"""of a file; a dataset has a hundred for each column and chunk"""
GLOBALS = {
    "builtins": {"bytearray"},
    "datasets.arrow_dataset": {"Dataset"},
    "datasets.features.features": {"Features", "Value"},
    "datasets.info": {"DatasetInfo"},
    "datasets.table": {"ConcatenationTable", "InMemoryTable"},
    "numpy": {"dtype", "ndarray"},
    "numpy._core.multiarray": {"_reconstruct"},
    "numpy.core.multiarray": {"_reconstruct"},  # before numpy 2
    "pyarrow.lib": {
        *("_reconstruct_record_batch", "_reconstruct_table", "_restore_array", "chunked_array"),
        *("field", "py_buffer", "schema", "type_for_alias"),
    },
}
"""by module: the names that a file may use"""
INTEGERS = (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
TYPES = {str(kind): kind for kind in (pa.string(), pa.large_string(), pa.float32(), pa.float64(), *INTEGERS)}
"""by pyarrow's name: the types of columns that can be read"""

_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_FIX = "write the data as parquet where it was made: dataset.to_parquet('FILE.parquet')"


class Refusal(ValueError):
    """Why a file is not read."""


@dataclass(frozen=True)
class Global:
    """The name of a class or function that a pickle would import."""

    name: str


@dataclass(eq=False)
class Call:
    """An object that a pickle would make."""

    name: str
    """of the class or function"""
    arguments: tuple[Any, ...]
    state: Any = None
    """what its __setstate__ would get"""


def read_pickled_dataset(path: str, wanted: Iterable[str]) -> tuple[list[str], pa.Table]:
    """Returns the names of all columns, and the wanted ones of them, in the order of the dataset's rows.

    Raises:
        Refusal: what is wrong with the file.
    """
    if os.path.getsize(path) > MAX_BYTES:
        raise Refusal(f"has more than {MAX_BYTES:,} bytes; {_FIX}")
    with open(path, "rb") as file:
        content = file.read()
    try:
        state = _state_of(read_operations(content), "datasets.arrow_dataset.Dataset")
        columns = _find_columns(state["_data"])
        table = pa.table({name: _build_column(name, columns[name]) for name in columns if name in set(wanted)})
        if table.num_columns and state.get("_indices") is not None:  # select, shuffle and others only reorder
            indices = _build_column("indices", _find_columns(state["_indices"])["indices"])
            table = _take(table, indices)
    except Refusal:
        raise
    except (ValueError, LookupError, TypeError, pa.ArrowException) as error:
        raise Refusal(f"is damaged, or not a pickled datasets.Dataset ({one_line(error)[:90]}); {_FIX}") from None
    return list(columns), table


# --- operations -------------------------------------------------------------------------------------------------------


def read_operations(content: bytes) -> Any:
    """The value of a pickle: numbers, texts, bytes, tuples, lists, dicts and calls.

    Raises:
        Refusal: a name or an operation that is not known.
        ValueError, LookupError, TypeError: a damaged file.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: list[Any] = []
    for count, (operation, argument, _) in enumerate(pickletools.genops(content)):
        if count == MAX_OPERATIONS:
            raise Refusal(f"has more than {MAX_OPERATIONS:,} operations; {_FIX}")
        _apply(operation.name, argument, stack, marks, memo)
    return stack.pop()


def _apply(operation: str, argument: Any, stack: list[Any], marks: list[int], memo: list[Any]) -> None:
    """Does one operation. `stack`, `marks` and `memo` are those of pickle.py."""
    match operation:
        case "PROTO" | "FRAME" | "STOP":
            pass
        case _ if operation in _VALUES:
            stack.append(argument)
        case _ if operation in _CONSTANTS:
            stack.append(_CONSTANTS[operation])
        case "BINGET" | "LONG_BINGET":
            stack.append(memo[argument])
        case "MEMOIZE":
            memo.append(stack[-1])
        case "MARK":
            marks.append(len(stack))
        case "EMPTY_LIST":
            stack.append([])
        case "EMPTY_DICT":
            stack.append({})
        case "TUPLE1" | "TUPLE2" | "TUPLE3":
            stack.append(tuple(_pop(stack, len(stack) - int(operation[-1]))))
        case "TUPLE":
            stack.append(tuple(_pop(stack, marks.pop())))
        case "APPEND" | "APPENDS":
            items = _pop(stack, marks.pop() if operation == "APPENDS" else len(stack) - 1)
            _check(stack[-1], list).extend(items)
        case "SETITEM" | "SETITEMS":
            items = _pop(stack, marks.pop() if operation == "SETITEMS" else len(stack) - 2)
            _set_items(_check(stack[-1], dict), items)
        case "STACK_GLOBAL":
            stack.append(_find_global(*_pop(stack, len(stack) - 2)))
        case "NEWOBJ" | "REDUCE":
            function, arguments = _pop(stack, len(stack) - 2)
            stack.append(Call(_check(function, Global).name, _check(arguments, tuple)))
        case "BUILD":
            (state,) = _pop(stack, len(stack) - 1)
            _check(stack[-1], Call).state = state
        case "GLOBAL" | "INST":
            _find_global(*argument.split(" ", 1))
            raise Refusal(f"is a pickle of protocol 3 or older; {_FIX}")
        case _:
            raise Refusal(f"has the operation {operation}, which no pickled datasets.Dataset needs; {_FIX}")


def _pop(stack: list[Any], start: int) -> list[Any]:
    """Removes the values from a position on."""
    if not 0 <= start <= len(stack):
        raise IndexError("too few values")
    items = stack[start:]
    del stack[start:]
    return items


def _set_items(target: dict[Any, Any], items: list[Any]) -> None:
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str | bytes):  # the hash of a deep tuple overflows the stack
            raise TypeError(f"a {type(key).__name__} as a key")
        target[key] = value


def _find_global(module: Any, name: Any) -> Global:
    if _check(name, str) not in GLOBALS.get(_check(module, str), ()):
        called = f"{module}.{name}"[:80]
        raise Refusal(f"names {called!r}, which is not allowed in a pickle; nothing of the file was run; {_FIX}")
    return Global(f"{module}.{name}")


def _check(value: Any, kind: type) -> Any:
    """Returns the value, which is of a kind."""
    if type(value) is not kind:
        raise TypeError(f"a {type(value).__name__} where a {kind.__name__} belongs")
    return value


# --- columns ----------------------------------------------------------------------------------------------------------


def _arguments_of(value: Any, name: str) -> tuple[Any, ...]:
    if _check(value, Call).name != name:
        raise TypeError(f"{value.name} where {name} belongs")
    return tuple(value.arguments)


def _state_of(value: Any, name: str) -> dict[Any, Any]:
    _arguments_of(value, name)
    return dict(_check(value.state, dict))


def _find_columns(table: Any) -> dict[str, list[Any]]:
    """{column: its chunks} of a table of `datasets`. Blocks are lists of rows of tables side by side."""
    if _check(table, Call).name != "datasets.table.ConcatenationTable":
        return _find_own_columns(table)
    blocks = _state_of(table, table.name)["blocks"]
    columns: dict[str, list[Any]] | None = None
    for row in blocks if isinstance(blocks, list) else [blocks]:
        parts: dict[str, list[Any]] = {}
        for block in row if isinstance(row, list) else [row]:
            parts |= _find_own_columns(block)
        columns = columns or {name: [] for name in parts}
        if columns.keys() != parts.keys():
            raise Refusal(f"joins tables with different columns; {_FIX}")
        for name, chunks in parts.items():
            columns[name] += chunks
    return columns or {}


def _find_own_columns(table: Any) -> dict[str, list[Any]]:
    arrays, schema = _arguments_of(
        _state_of(table, "datasets.table.InMemoryTable")["table"], "pyarrow.lib._reconstruct_table"
    )
    fields = _check(_arguments_of(schema, "pyarrow.lib.schema")[0], list)
    names = [_check(_arguments_of(field, "pyarrow.lib.field")[0], str) for field in fields]
    if len(set(names)) < len(names):
        raise Refusal(f"two columns have the same name {max(names, key=names.count)!r}")
    chunks = [_check(_arguments_of(array, "pyarrow.lib.chunked_array")[0], list) for array in arrays]
    return dict(zip(names, chunks, strict=True))


def _build_column(name: str, chunks: list[Any]) -> pa.ChunkedArray:
    """Makes a column of its chunks, whose lengths and offsets may be false."""
    num_bytes, arrays = 0, []
    for chunk in chunks:
        kind, length, _, offset, buffers = _arguments_of(chunk, "pyarrow.lib._restore_array")[0][:5]
        (alias,) = _arguments_of(kind, "pyarrow.lib.type_for_alias")
        if _check(alias, str) not in TYPES:
            raise Refusal(f"column {name!r} is {alias!r}; supported: {', '.join(TYPES)}")
        contents = [None if buffer is None else _content_of(buffer) for buffer in buffers]
        num_bytes += sum(map(len, filter(None, contents)))
        _check_size(name, num_bytes)
        if not all(0 <= _check(number, int) <= MAX_BYTES for number in (length, offset)):
            raise ValueError("a false length or offset")  # pyarrow reads memory in front of a buffer if one is negative
        array = pa.Array.from_buffers(
            TYPES[alias], length, [None if one is None else pa.py_buffer(one) for one in contents], offset=offset
        )
        array.validate(full=True)
        arrays.append(array)
    return pa.chunked_array(arrays, None if arrays else pa.string())


def _content_of(buffer: Any) -> bytes | bytearray:
    (content,) = _arguments_of(buffer, "pyarrow.lib.py_buffer")
    if isinstance(content, Call):
        (content,) = _arguments_of(content, "builtins.bytearray") or (b"",)
    return _check(content, bytearray if isinstance(content, bytearray) else bytes)


def _check_size(name: str, num_bytes: int) -> None:
    if num_bytes > MAX_BYTES:
        raise Refusal(f"column {name!r} has more than {MAX_BYTES:,} bytes; {_FIX}")


def _take(table: pa.Table, indices: pa.ChunkedArray) -> pa.Table:
    """The rows of a dataset that only holds their positions."""
    for name in table.column_names:
        if not pa.types.is_primitive(table[name].type):
            _check_size(name, pc.sum(pc.binary_length(table[name]).take(indices)).as_py() or 0)
    return table.take(indices)

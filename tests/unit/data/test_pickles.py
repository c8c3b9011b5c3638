"""A pickled dataset gives its texts in order; whatever else a pickle can ask for is refused, and nothing of it runs."""

import copyreg
import io
import os
import pickle
import pickletools
import struct
from pathlib import Path

import datasets
import pandas
import pytest
from datasets.table import InMemoryTable

from trainer.data.pickles import Refusal, read_pickled_dataset

TEXTS = [*(f"text {i}" for i in range(5)), "", None]
SMALL = datasets.Dataset.from_dict({"text": TEXTS, "n": range(7)})
JOINED = datasets.concatenate_datasets([SMALL, SMALL])
SIZES = b"K\x07K\x01K\x00]"
"""of the texts in SMALL: 7 values, 1 of them null, from offset 0"""


class OlderPickler(pickle.Pickler):
    """Writes tables as earlier versions of `datasets` did: with all their fields, among them arrays of numpy."""

    def reducer_override(self, value):
        if isinstance(value, InMemoryTable):
            return copyreg.__newobj__, (InMemoryTable,), dict(vars(value))
        return NotImplemented


def dump(dataset, pickler=pickle.Pickler, protocol=4):
    buffer = io.BytesIO()
    pickler(buffer, protocol).dump(dataset)
    return buffer.getvalue()


def dump_with_numpy(dataset, module):
    """The pickle of a version of `datasets` and numpy in which _reconstruct is in this module."""
    content, name = dump(dataset, OlderPickler), b"numpy._core.multiarray"
    assert (
        content.count(name) == 1
        and content[2:3] == b"\x95"
        and len(content) == 11 + (*struct.unpack("<Q", content[3:11]),)[0]
    )
    content = content.replace(bytes([len(name)]) + name, bytes([len(module)]) + module)
    return content[:3] + struct.pack("<Q", len(content) - 11) + content[11:]


def read(content, wanted=("text",)):
    Path("file.pkl").write_bytes(content)
    return read_pickled_dataset("file.pkl", wanted)


def refused(content):
    with pytest.raises(Refusal) as refusal:
        read(content)
    assert "to_parquet" in str(refusal.value)
    assert len(str(refusal.value)) < 240
    return str(refusal.value)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "dataset",
    {
        "whole": SMALL,
        "joined": JOINED,
        "selected": SMALL.select([5, 0, 3, 3]),
        "joined and shuffled": JOINED.shuffle(seed=1),
        "sliced": JOINED.select(range(2, 9)),
        "side by side": datasets.concatenate_datasets(
            [SMALL, SMALL.select(range(7)).rename_columns({"text": "b", "n": "m"})], axis=1
        ),
        "pandas": datasets.Dataset.from_pandas(pandas.DataFrame({"text": ["a", "b"], "n": [1.5, 2.0]})),
        "empty": SMALL.select([]),
    }.values(),
    ids=str,
)
@pytest.mark.parametrize(
    "write",
    [
        dump,
        lambda dataset: dump(dataset, protocol=5),
        lambda dataset: dump(dataset, OlderPickler),
    ],
)
def test_rows_and_order_are_those_of_the_dataset(dataset, write):
    names, table = read(write(dataset), ["n", "text"])
    assert names == dataset.column_names
    assert {name: table[name].to_pylist() for name in ("text", "n")} == {
        name: dataset[name][:] for name in ("text", "n")
    }


@pytest.mark.parametrize("module", [b"numpy._core.multiarray", b"numpy.core.multiarray"])
def test_both_names_of_numpy(module):
    content = dump_with_numpy(SMALL.select([2, 1]), module)
    assert module in content
    assert read(content)[1]["text"].to_pylist() == ["text 2", "text 1"]


def test_columns_that_are_not_wanted_are_named_only():
    names, table = read(dump(SMALL.add_column("flag", [True] * 7)))
    assert (names, table.column_names) == (["text", "n", "flag"], ["text"])
    with pytest.raises(Refusal, match="'text' is 'bool'; supported: string, "):
        read(dump(datasets.Dataset.from_dict({"text": [True]})))


class Evil:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.system, "touch ran"), "'posix.system'"),
        (Evil(eval, "open('ran', 'w')"), "eval'"),
        (Evil(os.mkdir, "ran"), "'posix.mkdir'"),
    ],
)
def test_a_call_of_anything_else_is_refused_by_name(evil, name, protocol, folder):
    assert name in refused(pickle.dumps(evil, protocol))
    assert name in refused(dump(SMALL)[:-1] + pickle.dumps(evil, protocol))
    assert os.listdir(folder) == ["file.pkl"]


def short(text):
    return b"\x8c" + bytes([len(text)]) + text.encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("datasets.table", "InMemoryTable.from_file"),
        ("datasets.table", "MemoryMappedTable"),
        ("datasets", "table.InMemoryTable"),
        ("numpy", "core.multiarray._reconstruct"),
        ("pyarrow.lib", "memory_map"),
        ("builtins", "getattr"),
        ("pyarrow.lib", "schema.__init__.__globals__"),
        ("\n\x1b[2Jos", "system" + "m" * 200),
    ],
)
def test_names_beside_the_list_are_refused(module, name):
    said = refused(b"\x80\x04" + short(module) + short(name) + b"\x93.")
    assert repr(f"{module}.{name}"[:80]) in said and said.isprintable()


def test_tables_that_name_a_file_are_refused():
    SMALL.save_to_disk("saved")
    assert "MemoryMappedTable" in refused(dump(datasets.load_from_disk("saved")))


@pytest.mark.parametrize(
    ("operation", "name"),
    [
        (b"Pid\n.", "PERSID"),
        (b"K\x01Q.", "BINPERSID"),
        (b"\x82\x01.", "EXT1"),
        (b"K\x01r\xff\xff\xff\x7f.", "LONG_BINPUT"),
        (b"(K\x01o.", "OBJ"),
        (b")}\x92.", "NEWOBJ_EX"),
        (b"\x97.", "NEXT_BUFFER"),
        (b"K\x012.", "DUP"),
    ],
)
def test_operations_that_no_dataset_needs_are_refused(operation, name):
    assert f" {name}," in refused(b"\x80\x04" + operation)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text\na\n",
        b"PAR1" + bytes(100),
        pickle.dumps(["a", "b"], 4),
        pickle.dumps({"text": ["a"]}, 4),
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"short.",
        b"\x80\x04\x96" + struct.pack("<Q", 2**40) + b"short.",
        b"\x80\x04h\x05.",
        b"\x80\x04R.",
        b"\x80\x04(((.",
        b"\x80\x04t.",
        b"\x80\x04]K\x01b.",
        b"\x80\x04]\x85K\x01b.",
        b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"K\x01s.",  # a key whose hash would overflow the stack
        b"\x80\x04)" + b"\x85" * 200_000 + b"\x8c\x01a\x93.",
        b"\x80\x04]\x94h\x00a.",  # a list in itself
    ],
    ids=range(16),
)
def test_what_is_no_pickled_dataset(content):
    assert "not a pickled datasets.Dataset" in refused(content)


def test_other_pickles_are_refused_by_the_name_of_their_class():
    assert "DataFrame" in refused(pickle.dumps(pandas.DataFrame({"text": ["a"]}), 4))
    assert "DatasetDict" in refused(dump(datasets.DatasetDict({"test": SMALL})))


def test_a_file_that_ends_too_early():
    content = dump(JOINED.select([1, 0]))
    for size in range(0, len(content), 13):
        refused(content[:size])


def integer(value):
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


@pytest.mark.parametrize(
    ("length", "offset"),
    [(8, 0), (2**62, 0), (-1, 0), (1, 7), (1, -1), (0, -(2**40)), (1, 2**62), (2**64, 0), (1, 2**64)],
)
def test_false_lengths_and_offsets_are_found(length, offset):
    """pyarrow itself reads memory in front of a buffer if an offset is negative."""
    content = dump(SMALL)
    assert content.count(SIZES) == 1
    refused(content.replace(SIZES, integer(length) + integer(-1) + integer(offset) + b"]"))


def test_buffers_that_lie_are_found():
    content = dump(SMALL)
    for texts, wrong in ((b"text 3text 4", b"text 3tex\xff 4"), (b"text 3text 4", b"text 3text")):
        assert content.count(texts) == 1
        size = len(content[: content.index(texts)].rpartition(b"C")[2]) - 1
        assert size == 18
        changed = content.replace(texts, wrong)
        at = changed.index(b"text 0") - 1
        refused(changed[:at] + bytes([changed[at] + len(wrong) - len(texts)]) + changed[at + 1 :])
    selected = dump(SMALL.select([2, 1]))
    assert selected.count(struct.pack("<QQ", 2, 1)) == 1
    refused(selected.replace(struct.pack("<QQ", 2, 1), struct.pack("<QQ", 2, 7)))


def repeat_first_chunk(content, times):
    """The pickle in which the text column names its only chunk again and again, in three bytes each."""
    operations = list(pickletools.genops(content))
    names = [operation.name for operation, _, _ in operations]
    append = names.index("APPEND", [argument for _, argument, _ in operations].index("_restore_array"))
    end, memo = operations[append + 1][2], names[:append].count("MEMOIZE") - 1
    return content[:end] + (b"h" + bytes([memo]) + b"a") * times + content[end:]


def test_sizes_are_limited(monkeypatch):
    content = dump(SMALL)
    monkeypatch.setattr("trainer.data.pickles.MAX_BYTES", len(content))
    assert read(content)[1].num_rows == 7
    assert f"more than {len(content):,} bytes" in refused(dump(JOINED))
    monkeypatch.setattr("trainer.data.pickles.MAX_OPERATIONS", 100)
    assert "more than 100 operations" in refused(content)


def test_what_a_small_file_repeats_is_limited(monkeypatch):
    assert read(repeat_first_chunk(dump(SMALL), 2))[1]["text"].to_pylist() == TEXTS * 3
    content = repeat_first_chunk(dump(SMALL), 500)
    monkeypatch.setattr("trainer.data.pickles.MAX_BYTES", len(content))
    assert "'text' has more than" in refused(content)
    texts = datasets.Dataset.from_dict({"text": ["text " * 200]})
    content = dump(texts.select([0] * 9))
    monkeypatch.setattr("trainer.data.pickles.MAX_BYTES", len(content))
    assert "'text' has more than" in refused(content)

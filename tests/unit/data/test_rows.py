import errno
import fcntl
import json
import os
import re

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness.data import write_csv
from trainer.config.schema import DataConfig, Source, TaskConfig, resolve
from trainer.data.corpus import load_corpus, load_for_prediction
from trainer.data.rows import Texts, _encode_label, hash_texts, read_table
from trainer.data.sources import Origin
from trainer.errors import UserError
from trainer.tasks.single_label import TASK

ROWS = [(f"text {i} é" + " goal" * (i % 7), "abc"[i % 3]) for i in range(100)]
AWKWARD = [
    "x",
    "goal " * 30_000,
    "a\0b",
    "\U0001f600 🏴󠁧󠁢󠁥󠁮󠁧󠁿",
    "e\u0301",
    "\u202eteam",
    "one\ntwo\r\nthree",
    '"quoted", "a"',
    "中文",
    "NA",
]


@pytest.fixture(autouse=True)
def keep_all(cache, monkeypatch):
    """Keeps the rows of small sources too, and reads them in chunks that divide by nothing."""
    monkeypatch.setattr("trainer.data.rows.MIN_CACHED_BYTES", 0)
    monkeypatch.setattr("trainer.data.formats.CHUNK", 7)


def load(train, seed=1, **settings):
    return load_corpus(
        DataConfig(train=str(train), **{"validation_fraction": 0.0, **settings}), TaskConfig(), seed, quiet=True
    )


def in_memory(*arguments, **settings):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.data.rows.MIN_CACHED_BYTES", 2**40)
        return load(*arguments, **settings)


def kept_rows(cache):
    return sorted(cache.glob("*.rows"))


def content(corpus):
    """All that a corpus says, for comparison."""
    return corpus.label_names, corpus.warnings, corpus.counts, {
        name: (
            list(s.texts), s.text_pairs and list(s.text_pairs), s.targets.tolist(), s.rows.tolist(), s.digests.tolist()
        )
        for name, s in corpus.splits.items()
    }  # fmt: skip


def as_jsonl(path, rows):
    path.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
    return path


def as_json(path, rows):
    path.write_text(json.dumps([{"text": text, "label": label} for text, label in rows]))
    return path


def as_parquet(path, rows):
    texts, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), path, row_group_size=11)
    return path


WRITERS = {"csv": write_csv, "jsonl": as_jsonl, "json": as_json, "parquet": as_parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_kept_rows_equal_those_in_memory(tmp_path, cache, kind):
    path = WRITERS[kind](tmp_path / f"x.{kind}", ROWS)
    plain = in_memory(path, validation_fraction=0.2)
    assert not cache.exists()
    first, second = load(path, validation_fraction=0.2), load(path, validation_fraction=0.2)
    assert content(first) == content(second) == content(plain)
    assert len(kept_rows(cache)) == 1
    assert second.splits["train"].texts.file is not None and plain.splits["train"].texts.file is None


@pytest.mark.parametrize("kind", WRITERS)
def test_awkward_texts(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"x.{kind}", [(text, i % 2) for i, text in enumerate(AWKWARD)])
    for _ in range(2):
        split = load(path, quoting="multi_line").splits["train"]
        assert split.texts[:] == [text.strip() for text in AWKWARD]
        assert [split.texts[i] for i in range(len(AWKWARD))] == list(split.texts)


def test_text_that_spills_behind_the_named_columns_is_told_again(tmp_path, cache):
    path = tmp_path / "x.csv"
    path.write_text("label,text,\n" + "a,x,\nb,y,z\n" * 10)
    first, second = load(path), load(path)
    assert len(kept_rows(cache)) == 1 and content(first) == content(second) == content(in_memory(path))
    assert any("10 rows have text" in line and "row 2, 4, 6, 8, 10, ...; " in line for line in second.warnings)


def test_rows_are_read_once(tmp_path, cache, monkeypatch):
    path = write_csv(tmp_path / "x.csv", ROWS)
    first = content(load(path))
    monkeypatch.setattr(Origin, "read_chunks", lambda *_: pytest.fail("read again"))
    assert content(load(path)) == first
    path.rename(tmp_path / "moved.csv")  # neither name nor time counts
    assert content(load(tmp_path / "moved.csv")) == first
    assert load(tmp_path / "moved.csv", label_names=["c", "b", "a"]).splits["train"].targets.tolist()[:3] == [2, 1, 0]


def test_changed_file_never_meets_old_rows(tmp_path, cache):
    path = write_csv(tmp_path / "x.csv", ROWS)
    before, times = load(path), path.stat()
    write_csv(path, [("TEXT 0" + ROWS[0][0][6:], ROWS[0][1]), *ROWS[1:]])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == times.st_size
    after = load(path)
    assert after.splits["train"].texts[0].startswith("TEXT 0") and before.splits["train"].texts[0].startswith("text 0")
    assert after.splits["train"].texts[1:] == before.splits["train"].texts[1:]
    assert len(kept_rows(cache)) == 2


@pytest.mark.parametrize(
    "other",
    [{"text_columns": ["t"]}, {"text_columns": ["t", "text"]}, {"label_column": "n"}, {"text_pair_columns": ["t"]},
     {"column_names": ["a", "b", "c", "d"], "text_columns": ["b"], "label_column": "c"}],
)  # fmt: skip
def test_other_layout_never_meets_old_rows(tmp_path, other):
    rows = [(f"title {i}", f"text {i}", "ab"[i % 2], i % 3) for i in range(30)]
    path = write_csv(tmp_path / "x.csv", rows, ("t", "text", "label", "n"))
    load(path)
    assert content(load(path, **other)) == content(in_memory(path, **other))


@pytest.mark.parametrize(
    ("row", "one", "other"),
    [
        (b'"a",x\n', {"quoting": "single_line"}, {"quoting": "none"}),
        (b"\x80,x\n", {"encoding": "cp1252"}, {"encoding": "latin-1"}),
        (b"a;b,x\n", {"delimiter": ","}, {"delimiter": ";"}),
        (b",x\n", {"empty_text": "keep"}, {"empty_text": "skip"}),
    ],
)
def test_another_way_to_read_never_meets_old_rows(tmp_path, row, one, other):
    path = tmp_path / "x.csv"
    path.write_bytes(row + b"c;e,d\nf;g,x\n")
    for way in (one, other):
        assert content(load(path, column_names=["text", "label"], **way)) == content(
            in_memory(path, column_names=["text", "label"], **way)
        )
    texts = [load(path, column_names=["text", "label"], **way).splits["train"].texts for way in (one, other)]
    assert list(texts[0]) != list(texts[1])


@pytest.mark.parametrize("name", ["rows.arrow", "facts.json", "hashes.json"])
@pytest.mark.parametrize("damage", ["cut", "cut late", "empty", "foreign", "absent", "other words"])
def test_damaged_rows_are_read_again(tmp_path, cache, name, damage):
    path = write_csv(tmp_path / "x.csv", ROWS)
    before = content(load(path))
    (entry,) = kept_rows(cache)
    whole = (entry / name).read_bytes()
    (entry / name).unlink()  # not in place: the first corpus still has it mapped
    if damage != "absent":
        cut = {"cut": whole[: len(whole) // 2], "cut late": whole[:-3], "empty": b"", "foreign": b"x" * 5000}
        word = next(word for word in (b"goal", b"100", b"rows.") if word in whole)
        cut["other words"] = whole.replace(word, word[::-1], 1)
        assert cut[damage] != whole
        (entry / name).write_bytes(cut[damage])
    assert content(load(path)) == before
    assert kept_rows(cache) == [entry] and (entry / name).read_bytes() == whole


@pytest.mark.parametrize("what", ["full disk", "no folder", "unknown locks"])
def test_without_a_cache_the_rows_are_read_all_the_same(tmp_path, cache, monkeypatch, capsys, what):
    path = write_csv(tmp_path / "x.csv", ROWS)
    expected = content(in_memory(path))
    error = {"full disk": errno.ENOSPC, "no folder": errno.ENOTDIR, "unknown locks": errno.EIO}[what]

    def fails(*arguments):
        raise OSError(error, os.strerror(error))

    if what == "no folder":
        (tmp_path / "file").touch()
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    elif what == "full disk":
        monkeypatch.setattr("trainer.data.cache.publish", fails)
    else:
        monkeypatch.setattr(fcntl, "flock", fails)
    corpus = load_corpus(DataConfig(train=str(path), validation_fraction=0.0), TaskConfig(), 1, quiet=False)
    assert content(corpus) == expected
    said = [line for line in capsys.readouterr().err.splitlines() if "continuing without the cache" in line]
    if what == "unknown locks":  # a lock only saves work
        assert (said, len(kept_rows(cache))) == ([], 1)
    else:
        assert len(said) == 1 and said[0].endswith(os.strerror(error))


@pytest.mark.parametrize(
    "rows",
    [[("", "a"), ("x", "b")], [("x", ""), ("y", "b")], [("x", "a", "b")], []],
    ids=["text", "label", "csv", "none"],
)
def test_rows_are_refused_alike_with_and_without_the_cache(tmp_path, cache, rows):
    path = write_csv(tmp_path / "x.csv", rows)
    with pytest.raises(UserError) as plain:
        in_memory(path)
    for _ in range(2):
        with pytest.raises(UserError) as kept:
            load(path)
        assert str(kept.value) == str(plain.value)


def test_file_that_changes_while_it_is_read(tmp_path, cache, monkeypatch):
    path = write_csv(tmp_path / "x.csv", ROWS)
    contents = iter([["before"], ["after"]])
    monkeypatch.setattr(Origin, "hash_files", lambda _: next(contents))
    with pytest.raises(UserError, match=rf"^data.train: {path} was changed while it was read$"):
        load(path)
    assert kept_rows(cache) == []


def test_hub_data_set(tmp_path, cache, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = datasets.Dataset.from_dict({"text": [f"t {i}" for i in range(30)], "label": [0, 1, 1] * 10}, features)
    rows.save_to_disk(tmp_path / "saved")
    asked = []

    def load_dataset(name, settings, split, keep_in_memory):
        assert not keep_in_memory, "a table in memory has no files"
        asked.append((name, settings, split))
        return datasets.load_from_disk(tmp_path / "saved")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for kept in (0, 1, 1):
        assert len(kept_rows(cache) if cache.exists() else []) == kept
        corpus = load("owner/name/part:all")
        assert corpus.label_names == ["no", "yes"] and corpus.splits["train"].targets.tolist() == [0, 1, 1] * 10
        assert corpus.splits["train"].texts[29] == "t 29"
    assert asked[0] == ("owner/name", "part", "all")


def test_hub_names_are_those_of_the_label_column_and_count_from_0(tmp_path, cache, monkeypatch):
    """Also where they are numbers themselves, and not the only column of classes."""
    classes = {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["1", "2", "3"])}
    features = datasets.Features({**classes, "topic": datasets.ClassLabel(names=["war", "peace"])})
    rows = {"text": [f"t {i}" for i in range(30)], "label": [1, 2, 1] * 10, "topic": [0, 1, 0] * 10}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved", num_shards=2)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.load_from_disk(tmp_path / "saved"))
    corpus = load("owner/name")
    assert corpus.label_names == ["1", "2", "3"]
    assert corpus.splits["train"].targets.tolist() == rows["label"]
    corpus = load("owner/name", label_column="topic")
    assert corpus.label_names == ["war", "peace"]
    assert corpus.splits["train"].targets.tolist() == rows["topic"]


def test_a_prediction_takes_the_layout_of_the_training_file(tmp_path):
    path = write_csv(tmp_path / "x.csv", ROWS, header=["title", "class"])
    source = Source(path=str(path), text_columns=["title"], label_column="class")
    config = DataConfig(train=source, validation_fraction=0.0)
    names = load_corpus(config, TaskConfig(), 1).label_names
    split, _, _ = load_for_prediction(Source(path=str(path)), config, TASK, names, None)
    assert split.texts[:] == [text for text, _ in ROWS]
    assert [names[label] for label in split.targets] == [label for _, label in ROWS]


def test_an_input_with_a_header_for_a_run_without(tmp_path):
    """[] says that the first row is the header; null would mean the run's own column names."""
    path = write_csv(tmp_path / "x.csv", ROWS)
    own = {"path": str(path), "text_columns": ["text"], "label_column": "label"}
    config = DataConfig(
        train=Source("t.csv", column_names=["body", "topic"], text_columns=["body"], label_column="topic")
    )
    with pytest.raises(UserError, match="--input: "):
        load_for_prediction(Source(**own), config, TASK, ["a", "b", "c"], None)
    split, *_ = load_for_prediction(Source(**own, column_names=[]), config, TASK, ["a", "b", "c"], None)
    assert split.texts[:] == [text for text, _ in ROWS]


@pytest.mark.parametrize(
    ("row", "id_column", "says"),
    [
        ({"label": ""}, None, "an empty or missing label: row 1; --ignore_labels true ignores labels"),
        ({"label": "a", "number": None}, "number", "an empty or missing id: row 1"),
        ({"label": "a"}, "number", "(see --id_column; if the file has no header"),
    ],
)
def test_what_is_wrong_with_an_input_names_its_options(tmp_path, row, id_column, says):
    pq.write_table(pa.table({"text": ["x"], **{name: [value] for name, value in row.items()}}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=re.escape(says)):
        load_for_prediction(Source(path=str(tmp_path / "x.parquet")), DataConfig(train="x"), TASK, ["a"], id_column)


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_a_label_may_be_a_list_and_the_task_decides(tmp_path, kind):
    labels = [["a", 2.0], [], ["a", None], ["a", 2.0]]
    texts, path = ["p", "q", "r", "s"], tmp_path / f"x.{kind}"
    if kind == "json":
        path.write_text(json.dumps([{"text": text, "label": label} for text, label in zip(texts, labels, strict=True)]))
    else:
        labels = [["a", "2"], [], ["a", None], ["a", "2"]]
        pq.write_table(pa.table({"text": texts, "label": labels}), path)
    for _ in range(2):  # read, then from the cache
        column = read_table("train", resolve(str(path), DataConfig())).labels
        assert column.columns == ["label"] and column.codes.tolist() == [0, 1, 2, 0]
        assert column.values == [["a", "2"], [], ["a", None]]
        with pytest.raises(
            UserError, match=r"x\..*: row 1: column 'label' holds a list, not text; .*task\.type multi_label$"
        ):
            column.texts()


@pytest.mark.parametrize(
    ("cells", "label"),
    [((1.0,), "1"), ((True,), "true"), ((1,), "1"), (([],), []), ((0, "x"), ["0", "x"]), ((None, 0.5), [None, "0.5"])],
)
def test_a_label_of_one_or_several_columns(cells, label):
    assert json.loads(_encode_label(cells)) == label
    assert _encode_label((None,)) is None


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_are_a_sequence():
    words = [f"word {i}" for i in range(50)]
    column = pa.chunked_array([words[:13], words[13:14], words[14:]], pa.large_string())
    rows = np.array([3, 12, 13, 14, 40, 7, 49, 0])
    texts, expected = Texts(column, rows), [words[i] for i in rows]
    assert len(texts) == 8 and list(texts) == expected
    assert [texts[i] for i in range(-8, 8)] == expected * 2
    for part in (slice(2, 5), slice(None), slice(5, 5), slice(-3, None), slice(6, 99), slice(None, None, 2)):
        assert texts[part] == expected[part]
    with pytest.raises(IndexError):
        texts[8]


def test_take_keeps_texts_and_rows_together(tmp_path):
    split = load(write_csv(tmp_path / "x.csv", ROWS)).splits["train"]
    some = split.take("some", np.array([5, 17, 80]))
    again = some.take("again", np.array([2, 0]))
    assert some.texts[:] == [ROWS[i][0] for i in (5, 17, 80)] and again.texts[:] == [ROWS[i][0] for i in (80, 5)]
    assert again.rows.tolist() == [80, 5] and np.array_equal(again.digests, hash_texts(again.texts, None))


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_are_those_of_a_naive_count(tmp_path, seed):
    chooser = np.random.default_rng(seed)
    train, test = (
        [
            (" ".join(chooser.choice(["a", "b", "ab"], 3)), " ".join(chooser.choice(["a", "ab"], 2)), i % 2)
            for i in range(n)
        ]
        for n in (200, 50)
    )
    header = ("p", "q", "label")
    path = write_csv(tmp_path / "train.csv", train, header)
    other = str(write_csv(tmp_path / "test.csv", test, header))
    for layout in ({"text_columns": ["p"]}, {"text_columns": ["p"], "text_pair_columns": ["q"]}):
        corpus = load(path, test=other, validation_fraction=0.3, **layout)
        summary = corpus.counts
        rows = {
            name: list(zip(s.texts, s.text_pairs or [None] * len(s), strict=True)) for name, s in corpus.splits.items()
        }
        assert summary["train"]["num_duplicates"] == len(rows["train"]) - len(set(rows["train"])) > 0
        assert summary["test"]["num_in_train"] == sum(row in set(rows["train"]) for row in rows["test"]) > 0

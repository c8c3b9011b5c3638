import dataclasses
import re
import shlex

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness.data import write_csv
from trainer.config.loading import parse_config
from trainer.config.schema import DataConfig, Source, TaskConfig
from trainer.data.corpus import load_corpus, load_for_prediction
from trainer.errors import UserError
from trainer.tasks.single_label import TASK

SKIP = "--data.empty_text skip skips them"
TYPES = ".csv, .tsv, .json, .jsonl, .ndjson, .parquet, .pq, .arrow, .feather, .xlsx, .pkl, .pickle, .gz, .zip"
ROWS = [("goal one", "b"), ("goal two", "a"), ("win", "b"), ("bank", "a")]


@pytest.fixture(autouse=True)
def large(cache, monkeypatch):
    """Each test with its own cache; its files are read as if they were large, in small chunks."""
    monkeypatch.setattr("trainer.data.rows.MIN_CACHED_BYTES", 0)
    monkeypatch.setattr("trainer.data.formats.CHUNK", 3)


def load(train, seed=1, task=None, **settings):
    config = DataConfig(train=str(train), **{"validation_fraction": 0.0, **settings})
    return load_corpus(config, task or TaskConfig(), seed)


def refused(train, **settings):
    with pytest.raises(UserError) as error:
        load(train, **settings)
    return str(error.value)


def write(path, data):
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def texts_and_labels(corpus, split="train"):
    part = corpus.splits[split]
    return list(zip(part.texts, [corpus.label_names[i] for i in part.targets], strict=True))


# --- file types -------------------------------------------------------------------------------------------------------


def test_file_without_header(tmp_path):
    path = write(tmp_path / "x.csv", 'b,"goal, one",more\na,win,\n')
    corpus = load(path, column_names=["label", "title", "body"], text_columns=["title", "body"])
    assert texts_and_labels(corpus) == [("goal, one more", "b"), ("win", "a")]


def test_header_of_one_split_only(tmp_path):
    train = write_csv(tmp_path / "train.csv", ROWS)
    test = write(tmp_path / "test.csv", "a,x,y\nb,z,\n")
    own = Source(str(test), column_names=["label", "t", "u"], text_columns=["t", "u"])
    assert texts_and_labels(load(train, test=own), "test") == [("x y", "a"), ("z", "b")]


def test_text_pairs(tmp_path):
    path = write(tmp_path / "x.csv", "q1,q2,note,label\ngoal,win,n,0\nbank,deal,,1\n")
    corpus = load(path, text_columns=["q1"], text_pair_columns=["q2", "note"])
    assert corpus.splits["train"].texts[:] == ["goal", "bank"]
    assert corpus.splits["train"].text_pairs[:] == ["win n", "deal"]


def test_file_whose_name_looks_like_a_glob(tmp_path):
    assert texts_and_labels(load(write_csv(tmp_path / "[a]*.csv", ROWS))) == ROWS


@pytest.mark.parametrize("word", ["NA", "null", "None", "nan", "0", "False", "#N/A"])
def test_words_that_other_readers_take_for_nothing(tmp_path, word):
    path = write_csv(tmp_path / "x.csv", [(word, word), ("x", "y")])
    assert texts_and_labels(load(path))[0] == (word, word)


def test_folder_called_like_a_partition_adds_no_column(tmp_path):
    (tmp_path / "label=7").mkdir()
    path = tmp_path / "label=7" / "x.parquet"
    texts, labels = zip(*ROWS, strict=True)
    pq.write_table(pa.table({"text": list(texts), "label": list(labels)}), path)
    assert texts_and_labels(load(path)) == ROWS


def test_parquet_columns_of_other_types(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["x", "y", "x"]).dictionary_encode(),
            "label": pa.array([True, False, True]),
            "unused": pa.array([[1], [2], []]),
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    assert texts_and_labels(load(tmp_path / "x.parquet")) == [("x", "true"), ("y", "false"), ("x", "true")]


@pytest.mark.parametrize("values", [[1.0, 0.0], [1, 0], ["1", "0"], [" 1", "0 "], ["1.0", "-0.00"]])
def test_whole_numbers_read_alike(tmp_path, values):
    pq.write_table(pa.table({"text": ["x", "y"], "label": values}), tmp_path / "x.parquet")
    corpus = load(tmp_path / "x.parquet", label_names=["no", "yes"])
    assert texts_and_labels(corpus) == [("x", "yes"), ("y", "no")]


def test_classes_called_by_numbers_are_met_under_their_names(tmp_path):
    """As pandas writes a column of whole numbers in which one was missing."""
    train = write(tmp_path / "x.csv", "text,label\na,-1.0\nb,0.0\nc,1.0\n")
    test = write(tmp_path / "y.csv", "text,label\nd,1\ne,0\n")
    corpus = load(train, test=str(test))
    assert corpus.label_names == ["-1", "0", "1"]
    assert texts_and_labels(corpus, "test") == [("d", "1"), ("e", "0")]
    mapped = load(train, label_names={"-1.0": "bad", 0: "fair", 1.0: "good"})
    assert texts_and_labels(mapped) == [("a", "bad"), ("b", "fair"), ("c", "good")]
    halves = write(tmp_path / "z.csv", "text,label\na,0.5\nb,1.5\n")
    single = TaskConfig("single_label")
    assert load(halves, task=single).label_names == ["0.5", "1.5"]
    assert "unknown, first 1 in" in refused(halves, task=single, test=str(test))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "", " has no rows"),
        ("x.csv", "text,label\n", " has no rows"),
        ("x.csv", "text,label\na\n", ": line 2 has 1 fields, expected 2 (text, label)"),
        ("x.csv", "text,text\na,b\n", ": two columns have the same name 'text'"),
        (
            "x.csv",
            b"text,label\nok,1\n\xff,2\n",
            ": line 3 has a byte that is not UTF-8 (0xff, character 1); set the file's encoding, as --data.encoding "
            "cp1252, or save it as UTF-8",
        ),
        ("x.json", '{"data": [{"text": 1, "label": 2}]}', None),
        ("x.jsonl", '{"text": "a", "label": 1}\n[1]', ": line 2 is a list, not an object"),
        ("x.jsonl", '{"text": 1}\n{"te', ": line 2: Unterminated string starting at (character 2)"),
        ("x.parquet", "PAR1 no", None),
        ("x.jsonl", '{"text": ' + "1" * 5000 + "}", None),
        ("x.txt", "a", f": has an unsupported type (supported: {TYPES})"),
        (
            "x.pkl",
            "a",
            ": is damaged, or not a pickled datasets.Dataset (too few values); write the data as parquet where it was "
            "made: dataset.to_parquet('FILE.parquet')",
        ),
        ("x.csv", "text,label\n,a\n ,b\nx,a\n", f": 2 rows have an empty or missing text (text): row 1, 2; {SKIP}"),
        ("x.csv", "text,label\nx,\n", ": 1 row has an empty or missing label: row 1"),
        ("x.jsonl", '{"text": NaN, "label": 1}', f": 1 row has an empty or missing text (text): row 1; {SKIP}"),
        ("x.jsonl", '{"text": "a", "label": [0, [1]]}', ": row 1: column 'label' holds a list with a list, not text"),
        (
            "x.jsonl",
            '{"text": "a", "label": 0}\n{"text": "\\ud83d", "label": 1}',
            ": row 2: column 'text' holds half a character (a lone surrogate such as \\ud83d)",
        ),
        ("x.csv", "text,label\nx,a\ny,a\n", " has a single class, 'a'; a classifier needs two"),
    ],
)  # fmt: skip
def test_refused(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    said = refused(path)
    assert said.startswith(f"data.train: {path}") and "\n" not in said and len(said) < 600
    if message is not None:
        assert said == f"data.train: {path}{message}"


def test_refused_places(tmp_path):
    assert refused(tmp_path / "no.csv") == f"data.train: no file '{tmp_path}/no.csv'"
    (tmp_path / "folder.csv").mkdir()
    for folder in (tmp_path / "folder.csv", tmp_path):
        assert refused(folder) == (
            f"data.train: {folder} is a folder; name what belongs to this split, as '{folder}/*.csv'"
        )


def test_missing_column(tmp_path):
    path = write_csv(tmp_path / "x.csv", ROWS, header=("title", "class"))
    assert refused(path) == (
        f"data.train: {path} has no column 'text', 'label'; it has 'title', 'class' (see data.text_columns; if the "
        "file has no header, name its columns in data.column_names)"
    )
    said = refused(path, text_columns=["title"])
    assert said.startswith(f"data.train: {path} has no column 'label'; it has 'title', 'class' (see data.label_column;")


@pytest.mark.parametrize("text", ["text ", "Text", "\u200btext", "te\u00adxt", "ｔｅｘｔ"])
def test_a_column_that_looks_like_the_missing_one_is_shown(tmp_path, text):
    path = write_csv(tmp_path / "x.csv", [[1] * 22], header=[*(f"c{i}" for i in range(20)), text, "label"])
    said = refused(path)
    assert "has no column 'text'; it has 'c0', " in said
    assert re.search(r"; ('text', .*) differ only in case, spaces, invisible characters or Unicode form \(see", said)
    assert ascii(text) in said or repr(text) in said


def test_every_splits_problem_at_once(tmp_path):
    train, good = write(tmp_path / "train.csv", ""), write_csv(tmp_path / "good.csv", ROWS)
    said = refused(train, validation=str(good), test=str(tmp_path / "no.csv")).splitlines()
    assert [line.partition(":")[0] for line in said] == ["data.train", "data.test"]
    for rows in ([("", "a")], [("x", "")], [("x", "zzz")]):
        other = write_csv(tmp_path / "other.csv", rows)
        said = refused(good, validation=str(other), test=str(other)).splitlines()
        assert [line.partition(":")[0] for line in said] == ["data.validation", "data.test"]


def test_no_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    said = refused("no-owner/no-such-name").splitlines()
    assert said[0].startswith(
        "data.train: 'no-owner/no-such-name' was not found as a local file, in the cache, or on the hub ("
    )
    assert said[1].startswith("Use local files: --data.train FILE.csv (csv, tsv, json, jsonl, parquet), or run once")


# --- labels -----------------------------------------------------------------------------------------------------------


def numbered(path, labels, header=("text", "label")):
    return write_csv(path, [(f"text {i}", label) for i, label in enumerate(labels)], header)


def test_numbers_sort_as_numbers_and_before_names(tmp_path):
    labels = ["10", "9", "b", "-1", "a", "²", "--5", "٣", "1" * 5000]
    names = load(numbered(tmp_path / "x.csv", labels)).label_names
    assert names[:3] == ["-1", "9", "10"] and sorted(names[3:]) == names[3:]


def test_label_names_fix_the_order(tmp_path):
    path = write_csv(tmp_path / "x.csv", ROWS)
    corpus = load(path, label_names=["b", "c", "a"])
    assert corpus.label_names == ["b", "c", "a"]
    assert corpus.splits["train"].targets.tolist() == [0, 2, 0, 2]
    assert corpus.warnings == ["data.train has no example of 'c'"]


def test_label_mapping(tmp_path):
    path = numbered(tmp_path / "x.csv", [1, 2, 3, 2])
    corpus = load(path, label_names={"1": "neg", "2": "pos", "3": "neg"})
    assert corpus.label_names == ["neg", "pos"]
    assert corpus.splits["train"].targets.tolist() == [0, 1, 0, 1]
    said = refused(path, label_names={"1": "neg", "2": "pos"})
    assert "1 of 4 labels are unknown, first 3 in row 3; known: 1, 2" in said


def test_mapping_of_one_split(tmp_path):
    train = numbered(tmp_path / "train.csv", ["neg", "pos"])
    test = numbered(tmp_path / "test.csv", [1, 2, 2])
    own = Source(str(test), label_names={"2": "pos", "1": "neg"})
    assert load(train, test=own).splits["test"].targets.tolist() == [0, 1, 1]
    own = dataclasses.replace(own, label_names={"1": "neg", "2": "good"})
    assert "label_names maps to 'good', which is not a class of train: 'neg', 'pos'" in refused(train, test=own)


def test_list_of_names_of_one_split_is_its_own_numbering(tmp_path):
    train = numbered(tmp_path / "train.csv", [0, 1])
    test = numbered(tmp_path / "test.csv", [0, 1, 1])
    own = Source(str(test), label_names=["pos", "neg"])
    corpus = load(train, test=own, label_names=["neg", "pos"])
    assert corpus.splits["train"].targets.tolist() == [0, 1]
    assert corpus.splits["test"].targets.tolist() == [1, 0, 0]


def test_awkward_label_names(tmp_path):
    names = ["a,b", "a\nb", '"', "<b>", "é", " "]
    corpus = load(numbered(tmp_path / "x.csv", names[:-1]), quoting="multi_line")
    assert corpus.label_names == sorted(names[:-1])
    assert "missing label: row 6" in refused(numbered(tmp_path / "x.csv", names), quoting="multi_line")


# --- two numberings ---------------------------------------------------------------------------------------------------

FOUR = ["World", "Sports", "Business", "Sci/Tech"]
FROM_1 = dict(zip("1234", FOUR, strict=True))


@pytest.mark.parametrize("names", [None, FOUR, dict(zip("0123", FOUR, strict=True))])
def test_train_from_0_and_test_from_1(tmp_path, names):
    train = numbered(tmp_path / "train.csv", [0, 1, 2, 3])
    test = numbered(tmp_path / "test.csv", [1, 2, 3, 4])
    said = refused(train, test=str(test), label_names=names)
    pairs = ", ".join(f"{i + 1}: {name}" for i, name in enumerate(FOUR if names else "0123"))
    assert said == (
        f"data.test: {test}: 1 of 4 labels are unknown, first 4 in row 4; known: 0, 1, 2, 3\n"
        f"data.test counts its labels from 1; map them: --data.test.label_names '{{{pairs}}}'"
    )
    few = numbered(tmp_path / "few.csv", [3, 1, 2])
    corpus = load(train, test=str(few), label_names=names)
    assert corpus.splits["test"].targets.tolist() == [3, 1, 2]
    assert len(corpus.warnings) == 1
    assert corpus.warnings[0].startswith("data.test: its labels could count from 0 or from 1; they were read as 1 = ")
    if names:
        mapped = load(train, test=Source(str(test), label_names=FROM_1), label_names=names)
        assert mapped.splits["test"].targets.tolist() == [0, 1, 2, 3] and mapped.warnings == []


def test_long_labels_are_shortened_in_messages(tmp_path):
    texts = [f"review {i} " + "word\n" * 300 for i in range(20)]
    test = numbered(tmp_path / "test.csv", texts)
    said = refused(numbered(tmp_path / "train.csv", [1, 2]), test=str(test), quoting="multi_line")
    assert "first 'review 0 word" in said and len(said) < 400
    said = refused(test, test=str(numbered(tmp_path / "other.csv", ["x"])), quoting="multi_line")
    assert said.count("review") == 12 and len(said) < 1300


def test_the_mapping_to_type_is_one_word_and_has_these_names(tmp_path):
    names = ["a, b: c", "it's", 'say "hi"', "two\nlines", "null", "- x", "café", "#1"]
    train = numbered(tmp_path / "train.csv", range(8))
    said = refused(train, test=str(numbered(tmp_path / "test.csv", range(1, 9))), label_names=names)
    assert said.count("\n") == 1
    *_, option, typed = shlex.split(said)
    assert option == "--data.test.label_names"
    config = parse_config(["--data.train", "x", "--data.label_names", typed])
    assert config.data.label_names == {str(i): name for i, name in enumerate(names, start=1)}


@pytest.mark.parametrize("names", [None, FROM_1])
def test_train_from_1_and_test_from_0(tmp_path, names):
    train = numbered(tmp_path / "train.csv", [1, 2, 3, 4])
    test = numbered(tmp_path / "test.csv", [0, 1, 2, 3])
    said = refused(train, test=str(test), label_names=names)
    pairs = ", ".join(f"{i}: {name}" for i, name in enumerate(FOUR if names else "1234"))
    assert "1 of 4 labels are unknown, first 0 in row 1; known: 1, 2, 3, 4" in said
    assert said.endswith(f"data.test counts its labels from 0; map them: --data.test.label_names '{{{pairs}}}'")
    few = numbered(tmp_path / "few.csv", [3, 1, 2])
    corpus = load(train, test=str(few), label_names=names)
    assert corpus.splits["test"].targets.tolist() == [2, 0, 1]
    assert [line.partition(":")[0] for line in corpus.warnings] == ["data.test"]


def test_names_are_never_found_by_number_where_classes_are_numbers(tmp_path):
    # '1' to '4' are names here: a test split of 0 to 3 must not be taken for positions among them
    train = numbered(tmp_path / "train.csv", [1, 2, 3, 4])
    assert "unknown" in refused(train, test=str(numbered(tmp_path / "t.csv", [0])))
    assert "unknown" in refused(train, test=str(numbered(tmp_path / "t.csv", [0, 1])), label_names=["1", "2", "3", "4"])


# --- hold-out and counts ----------------------------------------------------------------------------------------------


def test_hold_out_is_stratified_and_a_function_of_the_seed(tmp_path):
    labels = ["a"] * 60 + ["b"] * 25 + ["c"] * 5 + ["d"]
    path = numbered(tmp_path / "x.csv", labels)
    first = load(path, seed=1, validation_fraction=0.1)
    held = first.splits["validation"]
    # halves are rounded up: 6 of 60, 3 of 25, 1 of 5, 0 of 1
    assert np.bincount(held.targets, minlength=4).tolist() == [6, 3, 1, 0]
    assert sorted([*held.rows, *first.splits["train"].rows]) == list(range(91))
    assert held.rows.tolist() == sorted(held.rows) and held.texts[:] == [f"text {i}" for i in held.rows]
    again, other = load(path, seed=1, validation_fraction=0.1), load(path, seed=2, validation_fraction=0.1)
    assert again.splits["validation"].rows.tolist() == held.rows.tolist()
    assert other.splits["validation"].rows.tolist() != held.rows.tolist()
    assert list(first.splits) == ["train", "validation"]


@pytest.mark.parametrize(("fraction", "count"), [(0.1, 4), (0.99, 4)])
def test_hold_out_that_leaves_nothing(tmp_path, fraction, count):
    path = numbered(tmp_path / "x.csv", ["a", "b"] * (count // 2))
    said = refused(path, validation_fraction=fraction)
    assert said == (
        f"data.validation_fraction: {fraction} of {count} examples, stratified, leaves train or "
        "validation empty; change it, or name data.validation"
    )


def test_a_class_that_validation_lacks_is_said(tmp_path):
    path = numbered(tmp_path / "x.csv", ["a"] * 10 + ["b"] * 10 + ["c"] * 2)
    corpus = load(path, validation_fraction=0.2)
    assert corpus.warnings == ["too few rows to hold one out for validation: 'c'"]


def test_summary_counts_duplicates_and_test_rows_in_train(tmp_path):
    train = write_csv(tmp_path / "train.csv", [("x", "a"), ("x", "b"), ("y", "a"), ("x", "a"), ("z", "b")])
    test = write_csv(tmp_path / "test.csv", [("x", "a"), ("q", "b"), (" z ", "a"), ("Z", "a")])
    summary = load(train, test=str(test)).counts
    assert summary["train"] == {"num_examples": 5, "label_counts": {"a": 3, "b": 2}, "num_duplicates": 2}
    assert summary["test"] == {"num_examples": 4, "label_counts": {"a": 3, "b": 1}, "num_in_train": 2}


# --- prediction -------------------------------------------------------------------------------------------------------


def test_load_for_prediction(tmp_path):
    config = DataConfig(train="x", text_columns=["t"], label_names={"1": "neg", "2": "pos"})
    path = write(tmp_path / "x.csv", "id,t\n007,x\n8,y\n")
    split, ids, warnings = load_for_prediction(Source(str(path)), config, TASK, ["neg", "pos"], "id")
    assert (split.texts[:], split.targets, ids, warnings) == (["x", "y"], None, ["007", "8"], [])
    assert load_for_prediction(Source(str(path)), config, TASK, ["neg", "pos"], None)[1] == ["0", "1"]
    path = write(tmp_path / "y.csv", "t,label\nx,2\ny,neg\n")
    with pytest.raises(UserError, match="1 of 2 labels are unknown, first 2 in row 1; known: 'neg', 'pos'"):
        load_for_prediction(Source(str(path)), config, TASK, ["neg", "pos"], None)
    path = write(tmp_path / "y.csv", "t,label\nx,2\ny,1\n")
    assert load_for_prediction(Source(str(path)), config, TASK, ["neg", "pos"], None)[0].targets.tolist() == [1, 0]
    with pytest.raises(UserError, match="has no column 'lable'"):
        load_for_prediction(Source(str(path), label_column="lable"), config, TASK, ["neg", "pos"], None)
    with pytest.raises(UserError, match=r"^--input: .*y\.csv has no column 'id'"):
        load_for_prediction(Source(str(path)), config, TASK, ["neg", "pos"], "id")

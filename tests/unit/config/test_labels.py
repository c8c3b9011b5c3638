"""Labels as they are spelled, what a submission holds, ids, and the rows that two splits share."""

import dataclasses
import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.harness.data import write_csv, write_labelled
from trainer.config.labels import label_text, look_alikes, match_labels
from trainer.config.predict_options import Options
from trainer.config.schema import Config, DataConfig, EvaluationConfig, OptimConfig, Source, TaskConfig
from trainer.data.corpus import find_id_columns, load_corpus, load_for_prediction
from trainer.errors import UserError
from trainer.predict import main
from trainer.tasks.single_label import TASK, example_weights, prediction_columns
from trainer.tasks.task import metric_value
from trainer.training.prediction import (
    check_label_names,
    choose_id_column,
    choose_labels,
    read_summary,
    render_predictions,
)
from trainer.training.setup import check_names


@pytest.fixture(autouse=True)
def own_cache(cache):
    """Each test with its own cache."""


def load(train, seed=1, **settings):
    return load_corpus(DataConfig(train=str(train), **{"validation_fraction": 0.0, **settings}), TaskConfig(), seed)


# --- spelling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "text"),
    [(True, "true"), (False, "false"), ("False", "False"), (1.0, "1"), ("1.0", "1"), (0.5, "0.5"), (" a ", "a"),
     ("null", "null"), ("NA", "NA"), (None, None), (float("nan"), None), ("", None), ("007", "007"), ("1e3", "1e3")],
)  # fmt: skip
def test_a_label_as_text(value, text):
    assert label_text(value) == text


def test_a_word_means_its_own_spelling_first_and_then_its_value():
    labels = ["1", "1000", "0.5", "false", "007", "World", "inf", "1.5.2"]
    words = ["1.0", "1e3", "+1", ".5", "False", "FALSE", "7", "007", "0x1", "world", "1e999", "1.5.20", "-1", "NaN"]
    assert match_labels(words, labels) == {
        "1.0": "1", "1e3": "1000", "+1": "1", ".5": "0.5", "False": "false", "FALSE": "false", "007": "007",
    }  # fmt: skip
    assert match_labels(["True", "true", "TRUE"], ["True", "true"]) == {"True": "True", "true": "true"}
    assert match_labels(["1000", "1e3"], ["1e3", "1000"]) == {"1000": "1000", "1e3": "1e3"}
    assert match_labels(["12345678901234567", "1" * 5000], ["12345678901234568", "1" * 4999]) == {}


@pytest.mark.parametrize("group", [
    ["Sports", "sports"], ["Sci/Tech", "Sci / Tech"], ["new york", "new  york"], ["a b", "a\xa0b"], ["ab", "a\u200bb"],
    ["\ufeffa", "a"], ["caf\u00e9", "cafe\u0301"], ["\uff21", "A"], ["a\u00adb", "ab"], ["\u2764", "\u2764\ufe0f"],
    ["STRASSE", "stra\u00dfe"], ["a\tb", "a b"], ["a", "A", "\u200ba"], ["true", "True"],
])  # fmt: skip
def test_classes_that_look_alike_are_named(tmp_path, group):
    assert look_alikes(["other", *group, "another"]) == [group]
    corpus = load(write_labelled(tmp_path / "x.json", ["other", *group]))
    assert len(corpus.label_names) == 1 + len(group), "they stay classes of their own"
    (warning,) = corpus.warnings
    said = warning.partition("Unicode form: ")[2]
    assert said.isprintable() and sorted(eval(f"[{said}]")) == sorted(group)
    assert len(set(said.split(", "))) == len(group)


def test_classes_that_differ_are_not_called_alike(tmp_path):
    names = ["a", "b", "1", "-1", "+1", "C", "C++", "C#", "a-b", "a_b", "ab", "\u0430", "\u044f"]
    assert look_alikes(names) == []
    assert load(write_labelled(tmp_path / "x.csv", names)).warnings == []


def test_an_unknown_label_names_the_class_that_it_looks_like(tmp_path):
    train = write_labelled(tmp_path / "x.json", ["Caf\u00e9", "Bar"])
    test = write_labelled(tmp_path / "y.json", ["Bar", "Cafe\u0301"])
    with pytest.raises(UserError, match=r"'Cafe\\u0301', 'Caf\\xe9' differ only in case, spaces, invisible") as error:
        load(train, test=str(test))
    assert str(error.value).count("\n") == 0


BOOLS = {"x.csv": ["false", "true"], "p.csv": ["False", "True"], "x.json": [False, True], "x.parquet": [False, True]}


@pytest.mark.parametrize("train", BOOLS)
def test_truth_values_of_any_file_meet_those_of_any_other(tmp_path, train):
    path = write_labelled(tmp_path / train, BOOLS[train])
    for other, labels in BOOLS.items():
        test = write_labelled(tmp_path / f"test-{other}", labels)
        assert load(path, test=str(test)).splits["test"].targets.tolist() == [0, 1]
        for names in ({"false": "other", "true": "praise"}, {"False": "other", "True": "praise"}):
            mapped = load(path, test=str(test), label_names=names)
            assert mapped.label_names == ["other", "praise"]
            assert mapped.splits["train"].targets.tolist() == mapped.splits["test"].targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    "word", ["false", "null", "~", "NA", "1.0", "yes", "on", "1e3", "0x1", "2020-01-01", ".5", "007"]
)
def test_words_of_yaml_meet_those_of_the_data(tmp_path, word):
    path = write_labelled(tmp_path / "x.csv", [word, "other"])
    mapped = load(path, label_names={word: "a", "other": "b"})
    assert (mapped.label_names, mapped.splits["train"].targets.tolist()) == (["a", "b"], [0, 1])
    listed = load(path, label_names=["other", word])
    assert listed.splits["train"].targets.tolist() == [1, 0]
    config = Config(optim=OptimConfig(class_weights={word: 3}), evaluation=EvaluationConfig(metric=f"f1/{word}"))
    check_names(config, listed)
    assert example_weights({word: 3}, listed.splits["train"].targets, listed.label_names).tolist() == [3, 1]
    per_class = {name: {"f1": float(name == "other")} for name in listed.label_names}
    assert metric_value({"per_class": per_class}, f"f1/{word}") == 0


def test_a_class_that_is_weighted_twice_or_is_none(tmp_path):
    corpus = load(write_labelled(tmp_path / "x.csv", ["1", "Sports"]))
    for weights, said in (
        ({"1": 2, "1.0": 3}, "name a class twice"),
        ({"sports": 2}, "'sports', 'Sports' differ only"),
    ):
        with pytest.raises(UserError, match=said):
            check_names(Config(optim=OptimConfig(class_weights=weights)), corpus)
    with pytest.raises(UserError, match="'f1/sports', 'f1/Sports' differ only"):
        check_names(Config(evaluation=EvaluationConfig(metric="f1/sports")), corpus)


# --- what a submission holds ------------------------------------------------------------------------------------------

FOUR = ["World", "Sports", "Business", "Tech"]


def submission(folder, classes, values, output="x.csv", **options):
    """The labels that a prediction of each class in turn is written as, and the line that says what they are."""
    summary = {} if values is None else {"label_values": values}
    asked = Options([str(folder)], "input.csv", output, layout="contest", **options)
    labels, told = choose_labels(asked, TASK, summary, classes)
    columns = prediction_columns(np.eye(len(labels)) * 9, classes)
    text = render_predictions(
        asked, [str(i) for i in range(len(labels))], columns, dict(zip(classes, labels, strict=True))
    )
    return text, told


@pytest.mark.parametrize(
    ("data", "names", "written", "told"),
    [
        ([0, 4], None, ["0", "4"], "the labels of the training data: 0, 4"),
        (["b", "a"], None, ["a", "b"], "the labels of the training data: 'a', 'b'"),
        (["yes", "no"], {"yes": "1", "no": "0"}, ["1", "0"], "the names of the classes, which are numbers: 1, 0"),
        ([0, 1, 2, 3], FOUR, ["0", "1", "2", "3"], "the labels of the training data: 0, 1, 2, 3"),
        ([1, 2, 3, 4], dict(zip("1234", FOUR, strict=True)), ["1", "2", "3", "4"], "the labels of the training data"),
        ([1, 2], {"1": "0", "2": "1"}, ["1", "2"], "the labels of the training data: 1, 2"),
        ([1, 0], {"1": "pos", "yes": "pos", "0": "neg"}, ["1", "0"], "the labels of the training data"),
        ([1, 2, 4], {"1": "neg", "2": "neg", "4": "pos"}, ["neg", "pos"],
         "the names of the classes, since several labels of the training data mean 'neg' (1, 2): 'neg', 'pos'"),
    ],
)  # fmt: skip
def test_a_submission_holds_the_labels_of_the_data(tmp_path, data, names, written, told):
    kind = ".parquet" if isinstance(data[0], bool | float) else ".csv"
    corpus = load(write_labelled(tmp_path / f"x{kind}", data), label_names=names)
    values = json.loads(json.dumps(corpus.label_values))
    text, said = submission(tmp_path, corpus.label_names, values)
    assert text == "ID,Label\n" + "".join(f"{i},{label}\n" for i, label in enumerate(written))
    assert said.startswith(f"holds {told or ''}")


def test_a_submission_holds_the_labels_of_the_inputs_own_mapping(tmp_path):
    values = dict(zip("0123", FOUR, strict=True))
    mapping = {str(i): name for i, name in enumerate(FOUR, start=1)}
    text, told = submission(tmp_path, FOUR, values, label_names=mapping)
    assert text.split() == ["ID,Label", "0,1", "1,2", "2,3", "3,4"] and "the labels of --label_names" in told
    assert "labels of --label_names: 1, 2, 3, 4" in told
    for names in ({"7": "World"}, ["Sports", "World", "Business", "Tech"]):
        _, told = submission(tmp_path, FOUR, values, label_names=names)
        assert told == "holds the labels of the training data: 0, 1, 2, 3"


@pytest.mark.parametrize("names", [{"1": "sports"}, ["World", "sports"], {"1": "World", "2": "sports"}])
def test_a_mapping_to_no_class_of_the_run_is_refused(names):
    told = (
        "--label_names: 'sports' is not a class of the run; classes: 'World', 'Sports', 'Business', 'Tech'; 'sports', "
    )
    with pytest.raises(UserError, match=re.escape(f"{told}'Sports' differ only in case")):
        check_label_names(Source("x.csv", label_names=names), FOUR, "class")
    check_label_names(Source("x.csv", label_names=FOUR[:2]), FOUR, "class")


def test_the_task_says_what_the_predictions_are():
    full = Options("run", "input.csv", "output.csv")
    labels, told = choose_labels(full, TASK, {"label_values": dict(zip("0123", FOUR, strict=True))}, FOUR)
    assert labels == FOUR and told.startswith("holds the names of the classes: 'World', ")
    amounts = dataclasses.replace(TASK, output_labels=lambda mappings, names: (names, "holds amounts"))
    assert choose_labels(full, amounts, {}, FOUR) == (FOUR, "holds amounts")


def test_without_a_record_of_the_labels_it_holds_class_names(tmp_path):
    text, told = submission(tmp_path, FOUR, None)
    assert [line.split(",")[1] for line in text.split()] == ["Label", *FOUR]
    assert "the names of the classes: 'World', " in told


@pytest.mark.parametrize("content", ["{", "3"])
def test_a_summary_that_is_damaged(tmp_path, content):
    (tmp_path / "summary.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=r"summary\.json cannot be read"):
        read_summary(tmp_path)


# --- ids --------------------------------------------------------------------------------------------------------------


def ids_of(path, id_column="id"):
    _, ids, warnings = load_for_prediction(Source(str(path)), DataConfig(train="x"), TASK, ["a", "b"], id_column)
    return ids, warnings


def with_ids(path, ids):
    if path.suffix == ".csv":
        return write_csv(path, [(text, f"text {i}") for i, text in enumerate(ids)], ("id", "text"))
    pq.write_table(pa.table({"id": ids, "text": [f"text {i}" for i in range(len(ids))]}), path)
    return path


@pytest.mark.parametrize(
    ("name", "given", "ids"),
    [
        ("x.parquet", [100.0, 7.0], ["100", "7"]),
        ("x.csv", ["100.0", "7.0", "-3.00"], ["100", "7", "-3"]),
        ("x.csv", ["1.0", "1.1", "1.10"], ["1.0", "1.1", "1.10"]),
        ("x.csv", ["12345678901234567890", "9007199254740993"], ["12345678901234567890", "9007199254740993"]),
        ("x.csv", ["007", " 8", "NA", "12e34", "1e5"], ["007", " 8", "NA", "12e34", "1e5"]),
    ],
)
def test_ids_that_a_column_of_floats_held_are_whole_again(tmp_path, name, given, ids):
    found, warnings = ids_of(with_ids(tmp_path / name, given))
    assert found == ids
    changed = ids != [str(value) for value in given]
    assert len(warnings) == changed and (not changed or f"are written as {ids[0]!r}" in warnings[0])


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("x.parquet", [1.0, float("nan"), 3.0], "column 'id': row 2 has no id ('nan')"),
        ("x.parquet", [1, None, 3], "1 row has an empty or missing id: row 2"),
        ("x.csv", ["1", "2", " "], "row 3 has no id (' ')"),
        ("x.parquet", [1.0, 2.0**53], "row 2: '9007199254740992.0' has lost digits"),
        ("x.csv", ["1.23457E+18", "7"], "row 1: '1.23457E+18' has lost digits"),
        ("x.csv", ["7", "1,23E+11"], "row 2: '1,23E+11' has lost digits"),
        ("x.parquet", [b"a", b"b"], "row 1: column 'id' holds a bytes, not text"),
    ],
)
def test_ids_that_are_missing_or_have_lost_digits_are_refused(tmp_path, name, given, told):
    with pytest.raises(UserError) as error:
        ids_of(with_ids(tmp_path / name, given))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_repeated_ids_are_reported(tmp_path):
    ids, warnings = ids_of(with_ids(tmp_path / "x.csv", ["7", "8", "7", "9", "8", "7"]))
    assert ids == ["7", "8", "7", "9", "8", "7"]
    assert warnings == [f"--input: {tmp_path}/x.csv: column 'id': repeated ids: 3, first '7' in row 1 and row 3"]
    _, warnings = ids_of(with_ids(tmp_path / "x.csv", ["7.0", "7.00"]))
    assert "repeated ids: 1, first '7' in row 1 and row 2" in warnings[-1]


@pytest.mark.parametrize(
    ("header", "found"),
    [("ID,text", ["ID"]), ("id,text", ["id"]), (" Id ,text", [" Id "]), ("uid,text", []), ("id,ID,text", ["id", "ID"]),
     ("text,label", [])],
)  # fmt: skip
def test_the_column_of_ids_is_found(tmp_path, header, found):
    path = tmp_path / "x.csv"
    path.write_text(f"{header}\n{','.join('abc'[: header.count(',') + 1])}\n")
    assert find_id_columns(Source(str(path)), DataConfig(train="x")) == found
    column, told = choose_id_column(Options("r", "i", "o"), found)
    assert column == (found[0] if len(found) == 1 else None)
    assert told == {0: "holds the row, counted from 0", 1: f"holds column {found[:1]} of the input"}.get(
        len(found), "holds the row, counted from 0, since 'id', 'ID' could hold ids (see --id_column)"
    ).replace("[", "").replace("]", "")
    assert choose_id_column(Options("r", "i", "o", id_column=""), found)[0] is None
    assert find_id_columns(Source(str(path)), DataConfig(train="x", text_columns=["ID"], label_column="id")) == [
        column for column in found if column == " Id "
    ]


# --- pairs, and rows that splits share --------------------------------------------------------------------------------


def test_splits_agree_on_pairs(tmp_path):
    path = write_csv(tmp_path / "x.csv", [("a", "b", 0), ("c", "d", 1)], ("text", "pair", "label"))
    pairs, single = Source(str(path), text_pair_columns=["pair"]), Source(str(path), text_pair_columns=[])
    told = (
        "data.test has pairs of texts and data.train has single texts; set data.train.text_pair_columns, or leave it "
        "out of data.test too"
    )
    with pytest.raises(UserError) as error:
        load(path, test=pairs)
    assert str(error.value).startswith(told)
    with pytest.raises(UserError, match=r"^data\.train has pairs of texts and data\.validation has single texts; "):
        load(path, validation=single, text_pair_columns=["pair"])
    assert load(path, test=pairs, text_pair_columns=["pair"]).splits["test"].text_pairs[:] == ["b", "d"]
    for config, source in ((DataConfig(train="x"), pairs), (DataConfig(train=pairs), single)):
        with pytest.raises(UserError, match=r"^--text_pair_columns: .* has single texts; both must agree$"):
            load_for_prediction(source, config, TASK, ["0", "1"], None)


def test_equal_texts_stay_on_one_side_of_the_hold_out(tmp_path):
    rng = np.random.default_rng(0)
    rows = [(f"text {i}", "abc"[i % 3]) for i in range(150) for _ in range(rng.integers(1, 5))]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    path = write_csv(tmp_path / "x.csv", rows)
    for seed in range(5):
        corpus = load(path, seed=seed, validation_fraction=0.2)
        train, held = corpus.splits["train"], corpus.splits["validation"]
        assert not set(train.texts) & set(held.texts)
        assert sorted([*train.rows, *held.rows]) == list(range(len(rows)))
        assert corpus.counts["validation"]["num_in_train"] == 0
        shares = np.bincount(held.targets) / np.bincount(np.concatenate([train.targets, held.targets]))
        assert np.abs(shares - 0.2).max() < 0.02
        again = load(path, seed=seed, validation_fraction=0.2)
        assert again.splits["validation"].rows.tolist() == held.rows.tolist()


def test_a_text_of_most_rows_is_not_held_out(tmp_path):
    rows = [("the same", "a")] * 80 + [(f"text {i}", "ab"[i % 2]) for i in range(40)]
    path = write_csv(tmp_path / "x.csv", rows)
    for seed in range(10):
        held = load(path, seed=seed, validation_fraction=0.1).splits["validation"]
        assert "the same" not in held.texts and np.bincount(held.targets).tolist() == [10, 2]


def test_a_hold_out_that_equal_texts_forbid_says_so(tmp_path):
    path = write_csv(tmp_path / "x.csv", [("x", "a")] * 10 + [("y", "b")] * 10)
    with pytest.raises(UserError, match="stratified, equal texts together, leaves train or validation empty"):
        load(path, validation_fraction=0.1)


def test_the_hold_out_of_earlier_versions(tmp_path):
    """Without equal texts, the split of a seed is fixed for ever."""
    labels = [i % 3 for i in range(30)]
    held = load(write_labelled(tmp_path / "x.csv", labels), seed=42, validation_fraction=0.2).splits["validation"]
    assert held.rows.tolist() == [0, 5, 6, 13, 17, 25]


def test_texts_with_two_labels_are_counted(tmp_path):
    rows = [("x", "a"), ("y", "a"), ("x", "b"), ("x", "a"), ("y", "a"), ("z", "b"), ("z", "a")]
    corpus = load(write_csv(tmp_path / "x.csv", rows))
    assert corpus.warnings == ["data.train: texts with different labels: 2, first in row 1 and row 3"]


# --- a label column that holds no classes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels",
    [
        [f"id {i}" for i in range(45)],
        [f"a text of its own {i}" for i in range(45)],
        [str(i) for i in range(12)],
    ],
)
def test_what_is_wrong_with_a_label_column_is_said_first(tmp_path, labels):
    path = write_labelled(tmp_path / "x.csv", labels)
    with pytest.raises(UserError) as error:
        load(path, validation_fraction=0.1)
    first = str(error.value).splitlines()[0]
    assert first == (
        f"data.train has {len(set(labels))} classes in {len(labels)} rows; does column 'label' hold the classes "
        "(data.label_column)?"
    )


@pytest.mark.parametrize(("count", "each"), [(77, 20), (4, 1), (150, 3), (20, 1), (9, 2)])
def test_many_classes_are_no_fault(tmp_path, count, each):
    corpus = load(write_labelled(tmp_path / "x.csv", [f"class {i}" for i in range(count)] * each))
    assert corpus.warnings == [] and len(corpus.label_names) == count


def test_a_class_for_each_row_is_warned_of_where_it_can_be_trained(tmp_path):
    path = write_labelled(tmp_path / "x.csv", [f"class {i}" for i in range(77)])
    assert "77 classes in 77 rows" in load(path, validation=str(path)).warnings[0]
    assert load(path, label_names=[f"class {i}" for i in range(77)]).warnings == []


# --- every row --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("text_columns", "body", "--text_columns: 'body' is not a list; write [body]"),
        ("label_names", "a, b", "--label_names: "),
        ("column_names", "id,text", "--column_names: 'id,text' is not a list; write [id,text]"),
        ("layout", "kaggle", "--layout: Expected a typing.Literal['full', 'contest']. Got value: kaggle"),
    ],
)
def test_options_of_predict_that_do_not_fit(monkeypatch, option, value, told):
    monkeypatch.setattr("sys.argv", ["", "--run", "r", "--input", "i", "--output", "o.csv", f"--{option}", value])
    with pytest.raises(UserError) as error:
        main()
    assert str(error.value).startswith(told)

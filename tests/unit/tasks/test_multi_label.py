"""Several labels: how files hold them, their metrics and thresholds against scikit-learn, and what is refused."""

import itertools
import json
import re

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

from tests.harness.data import write_csv, write_labelled
from trainer.config.schema import DataConfig, OptimConfig, Source, TaskConfig
from trainer.data.corpus import load_corpus, load_for_prediction
from trainer.errors import UserError
from trainer.tasks import make_task
from trainer.tasks.multi_label import best_threshold, make_losses, positive_weights, probabilities, strata
from trainer.tasks.task import measure

NAMES = ["a", "b", "c"]
TASK = make_task(TaskConfig("multi_label"))
ROWS = [["a", "c"], [], ["b"], ["c", "b", "a"], ["b"]]
TARGETS = [[1, 0, 1], [0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 1, 0]]


@pytest.fixture(autouse=True)
def own_cache(cache):
    """Each test with its own cache."""


def load(path, task=None, **settings):
    config = DataConfig(train=str(path), **{"validation_fraction": 0.0, **settings})
    return load_corpus(config, task or TaskConfig(), 1, quiet=True)


def bits(path, rows=TARGETS, names=NAMES):
    return write_csv(path, [(f"text {i}", *row) for i, row in enumerate(rows)], ("text", *names))


# --- labels in files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("large", [2**26, 0, 0], ids=["read", "to the cache", "cached"])
@pytest.mark.parametrize("name", ["x.json", "x.jsonl", "x.parquet", "x.csv", "bits.csv"])
def test_all_ways_to_write_labels_are_read_alike(tmp_path, monkeypatch, name, large):
    monkeypatch.setattr("trainer.data.rows.MIN_CACHED_BYTES", large)
    path, task, settings = tmp_path / name, TaskConfig(), {}
    if name == "bits.csv":
        bits(path)
        settings = {"label_columns": NAMES}
    elif name == "x.csv":
        write_labelled(path, ["a|c", "", " b |", "c|b|a|a", "b"])
        task = TaskConfig(separator="|")
    else:
        write_labelled(path, ROWS)
    for _ in range(2 if large == 0 else 1):
        corpus = load(path, task, **settings)
        assert corpus.task.type == "multi_label" and corpus.label_names == NAMES
        assert corpus.splits["train"].targets.tolist() == TARGETS and corpus.warnings == []
        assert corpus.counts["train"]["label_counts"] == {"a": 2, "b": 3, "c": 2}


def test_numbers_names_and_stored_classes(tmp_path):
    path = write_labelled(tmp_path / "x.json", [[1, 2.0], [0], []])
    assert load(path).label_names == ["0", "1", "2"]
    named = load(path, label_names=["x", "y", "z"])
    assert (named.label_names, named.splits["train"].targets.tolist()) == (
        ["x", "y", "z"],
        [[0, 1, 1], [1, 0, 0], [0] * 3],
    )
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.Sequence(datasets.ClassLabel(names=["x", "y", "z"]))}
    )
    table = datasets.Dataset.from_dict({"text": ["p", "q", "r"], "label": [[1, 2], [0], []]}, features)
    table.to_parquet(str(tmp_path / "x.parquet"))
    stored = load(tmp_path / "x.parquet")
    assert stored.label_names == ["x", "y", "z"]
    assert stored.splits["train"].targets.tolist() == [[0, 1, 1], [1, 0, 0], [0] * 3]


def test_columns_keep_their_order_and_take_truth_values(tmp_path):
    path = bits(tmp_path / "x.csv", [("True", "0"), ("false", "1.0")], ["z", "b"])
    corpus = load(path, label_columns=["z", "b"])
    assert (corpus.label_names, corpus.splits["train"].targets.tolist()) == (["z", "b"], [[1, 0], [0, 1]])


def test_one_label_a_row_is_single_label(tmp_path):
    corpus = load(write_labelled(tmp_path / "x.csv", ["a", "b"]))
    assert (corpus.task.type, corpus.splits["train"].targets.tolist()) == ("single_label", [0, 1])


@pytest.mark.parametrize("labels", [["a|b", "b", "a", "a|c", "b|c", "a|b|c"], ["x;y", "y;z", "x;z", "z;x;y"]])
def test_labels_that_look_like_several_need_a_choice(tmp_path, labels):
    path = write_labelled(tmp_path / "x.csv", labels)
    with pytest.raises(UserError) as refusal:
        load(path)
    separator = labels[0][1]
    options = ("--task.type single_label", f"--task.separator {separator!r}")
    for word in ("column 'label'", repr(labels[0]), *options):
        assert word in str(refusal.value)
    assert load(path, TaskConfig("single_label")).label_names == sorted(set(labels))
    assert len(load(path, TaskConfig(separator=separator)).label_names) == 3


@pytest.mark.parametrize(
    "labels", [["a|b", "c|d"], ["Sci/Tech", "World"], ["Arts, Crafts", "Sports"], ["a", "b", "a|b"]]
)
def test_names_with_a_separator_need_none(tmp_path, labels):
    assert load(write_labelled(tmp_path / "x.csv", labels)).task.type == "single_label"


@pytest.mark.parametrize(
    ("labels", "task", "words"),
    [
        ([["a"], ["b", None]], TaskConfig(), ["row 2", "'label'", "empty label"]),
        ([["a"], ["b", ["c"]]], TaskConfig(), ["row 2", "'label'", "a list with a list"]),
        ([["a"], [{"b": 1}]], TaskConfig(), ["row 2", "a list with a dict"]),
        ([["a"], ["\ud83d"]], TaskConfig(), ["row 2", "surrogate"]),
        ([["a"], "b"], TaskConfig(), ["row 2", "holds text ('b')", "--task.separator"]),
        ([["a"], None], TaskConfig(), ["row 2", "missing label"]),
        (
            ["a", "b"],
            TaskConfig("multi_label"),
            ["row 1", "holds text ('a')", "--task.separator", "data.label_columns"],
        ),
        ([[], []], TaskConfig(), ["x.json has no label in any row"]),
        (["", ""], TaskConfig(separator="|"), ["x.json has no label in any row"]),
        ([["a|b"], ["c"]], TaskConfig(), ["label 'a|b' contains '|'", "--task.separator ';'"]),
        ([["a"], ["b"]], TaskConfig("single_label"), ["row 1", "holds a list", "task.type multi_label"]),
    ],
)
def test_hostile_labels_are_refused(tmp_path, labels, task, words):
    path = tmp_path / "x.json"
    path.write_text(json.dumps([{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]))
    with pytest.raises(UserError) as refusal:
        load(path, task)
    assert [word for word in words if word not in str(refusal.value)] == [], refusal.value
    assert len(str(refusal.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("cells", "shown"),
    [(("2", "0"), "holds '2'"), (("", "1"), "holds ''"), (("yes", "1"), "holds 'yes'"), (("0.5", "1"), "")],
)
def test_a_column_of_bits_holds_nothing_else(tmp_path, cells, shown):
    path = bits(tmp_path / "x.csv", [("1", "0"), cells], ["a", "b"])
    with pytest.raises(UserError, match=f"row 2: column 'a' {shown}.*0 or 1"):
        load(path, label_columns=["a", "b"])


def test_missing_columns_are_named(tmp_path):
    path = bits(tmp_path / "x.csv", [("1", "0")], ["a", "b"])
    with pytest.raises(UserError, match=r"no column 'c', 'd'.*data\.label_columns"):
        load(path, label_columns=["a", "c", "d"])


def test_a_separator_that_no_row_has_is_a_warning(tmp_path):
    [warning] = load(write_labelled(tmp_path / "x.csv", ["a|b", "b"]), TaskConfig(separator=";")).warnings
    assert "task.separator: ';'" in warning and "'label'" in warning


def test_the_input_of_a_prediction(tmp_path):
    run = DataConfig(train="x")
    path = write_labelled(tmp_path / "x.json", [["a"], ["x"]])
    with pytest.raises(UserError, match=r"row 2; known: 'a', 'b', 'c'; --ignore_labels"):
        load_for_prediction(Source(str(path)), run, TASK, NAMES, None)
    split, _, _ = load_for_prediction(Source(str(path)), run, TASK, NAMES, None, ignore_labels=True)
    assert split.targets is None
    with_separator = make_task(TaskConfig("multi_label", "|"))
    path = write_labelled(tmp_path / "x.csv", ["c|a", ""])
    split, _, _ = load_for_prediction(Source(str(path)), run, with_separator, NAMES, None)
    assert split.targets.tolist() == [[1, 0, 1], [0, 0, 0]]
    path = write_csv(tmp_path / "bare.csv", [("x",)], ("text",))
    for config in (run, DataConfig(train="x", label_columns=NAMES)):
        split, _, _ = load_for_prediction(Source(str(path)), config, with_separator, NAMES, None)
        assert split.targets is None
    own = Source(str(bits(tmp_path / "bits.csv")), label_columns=NAMES)
    assert load_for_prediction(own, run, TASK, NAMES, None)[0].targets.tolist() == TARGETS


def test_the_hold_out_has_its_share_of_rare_labels(tmp_path):
    generator = np.random.default_rng(0)
    rows = [["often", *(["rare"] if i % 10 == 0 else []), *(["half"] if i % 2 else [])] for i in range(200)]
    rows = [row if generator.random() < 0.9 else [] for row in rows]
    corpus = load(write_labelled(tmp_path / "x.json", rows), validation_fraction=0.2)
    train, held = (corpus.counts[name]["label_counts"] for name in ("train", "validation"))
    for name in train:
        assert held[name] == pytest.approx(0.2 * (train[name] + held[name]), abs=1.5), name
    groups = strata(np.array(TARGETS, dtype=np.uint8))
    assert groups.argmax(axis=1).tolist() == [0, 3, 2, 0, 2] and groups.sum(axis=1).tolist() == [2, 1, 1, 3, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_hold_out_has_its_share_of_each_label(tmp_path, seed):
    """Though labels occur together: half of them in 40 sets of two or three."""
    generator = np.random.default_rng(seed)
    rates = np.array([0.02, 0.05, 0.1, 0.2, 0.3, 0.5])
    rows = [[name for name, is_there in zip("abcdef", generator.random(6) < rates, strict=True) if is_there]
            for _ in range(500)]  # fmt: skip
    corpus = load(write_labelled(tmp_path / "x.json", rows), validation_fraction=0.1)
    train, held = (corpus.counts[name]["label_counts"] for name in ("train", "validation"))
    for name in train:
        assert held[name] == pytest.approx(0.1 * (train[name] + held[name]), abs=2), name
    assert len(corpus.splits["validation"]) == pytest.approx(50, abs=4)


# --- loss -------------------------------------------------------------------------------------------------------------


def test_the_loss_is_torchs(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, dtype=torch.float64, generator=generator) * 4
    targets = np.array(TARGETS, dtype=np.uint8)
    for given, weights in (
        (None, [1, 1, 1]),
        ({"b": 3, "c": 0}, [1, 3, 0]),
        ("balanced", [3 / 2, 2 / 3, 3 / 2]),
    ):
        found = make_losses(OptimConfig(class_weights=given), targets, NAMES)(logits, torch.tensor(targets))
        criterion = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights, dtype=torch.float64))
        wanted = [criterion(row, target.double()) for row, target in zip(logits, torch.tensor(targets), strict=True)]
        assert found.tolist() == pytest.approx([float(value) for value in wanted], rel=1e-12)
    constant = np.array([[1, 0, 1], [1, 0, 0]], dtype=np.uint8)
    assert positive_weights("balanced", constant, NAMES).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ({"label_smoothing": 0.1}, ["optim.label_smoothing: 0.1", "multi_label"]),
        ({"class_weights": {"x": 1.0}}, ["optim.class_weights", "'x'", "['a', 'b', 'c']"]),
        ({"class_weights": {"a": -1.0}}, ["optim.class_weights", "at least 0"]),
    ],
)
def test_options_of_the_loss_that_are_refused(optim, words):
    with pytest.raises(UserError) as refusal:
        make_losses(OptimConfig(**optim), np.array(TARGETS), NAMES)
    assert [word for word in words if word not in str(refusal.value)] == []


# --- thresholds -------------------------------------------------------------------------------------------------------


def f1(true, predicted):
    return sklearn_metrics.f1_score(true, predicted, zero_division=0)


@pytest.mark.parametrize("digits", [1, 2, 9], ids=["many ties", "some ties", "no ties"])
@pytest.mark.parametrize("seed", range(6))
def test_no_threshold_has_a_higher_f1(seed, digits):
    generator = np.random.default_rng(seed)
    scores = generator.random(40).round(digits)
    true = (scores + generator.normal(size=40) * 0.4 > 0.5).astype(np.uint8)
    found = best_threshold(scores, true)
    best = max(f1(true, scores >= threshold) for threshold in [*scores, 0.5])
    assert f1(true, scores >= found) == best
    assert np.abs(scores - found).min() > 1e-12, "a rounding of the scores changes no prediction"


@pytest.mark.parametrize(
    ("scores", "true", "threshold"),
    [
        ([0.9, 0.6, 0.2], [1, 1, 0], 0.4),
        ([0.9, 0.6, 0.2], [1, 1, 1], 0.5),
        ([0.9, 0.6, 0.2], [0, 0, 0], 0.5),
        ([0.3, 0.3, 0.3], [1, 0, 1], 0.15),
        ([0.2, 0.9], [1, 0], 0.1),
        ([np.nextafter(0.3, 1), 0.3], [1, 0], np.nextafter(0.3, 1)),
        ([0.0, 0.0], [1, 0], 0.0),
    ],
)
def test_thresholds_by_hand(scores, true, threshold):
    assert best_threshold(np.array(scores), np.array(true, dtype=np.uint8)) == pytest.approx(threshold, abs=1e-17)


def test_thresholds_decide_predictions_and_metrics():
    logits = np.array([[0.2, -3.0], [0.1, -2.0], [-1.0, -9.0]], dtype=np.float32)
    targets = np.array([[1, 0], [0, 1], [0, 0]], dtype=np.uint8)
    constants = TASK.find_constants(logits, targets, ["a", "b"])
    tuned = make_task(TaskConfig("multi_label", "; "), json.loads(json.dumps(constants)))
    assert TASK.prediction_columns(logits, ["a", "b"])["prediction"] == ["a", "a", ""]
    columns = tuned.prediction_columns(logits, ["a", "b"])
    assert columns["prediction"] == ["a", "b", ""]
    assert list(columns) == ["prediction", "probability:a", "probability:b"]
    assert columns["probability:a"] == pytest.approx((1 / (1 + np.exp(-logits[:, 0].astype(float)))).tolist())
    assert tuned.format_targets(np.array([[1, 1], [0, 0]]), ["a", "b"]) == ["a; b", ""]
    assert measure(TASK, logits, targets, ["a", "b"])["subset_accuracy"] == pytest.approx(2 / 3)
    measured = measure(tuned, logits, targets, ["a", "b"])
    assert measured["subset_accuracy"] == measured["f1_macro"] == 1
    assert {name: row["threshold"] for name, row in measured["per_class"].items()} == constants["thresholds"]


# --- metrics ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", range(5))
def test_metrics_against_scikit_learn(seed):
    generator = np.random.default_rng(seed)
    logits = (generator.normal(size=(60, 3)) * 3).astype(np.float32)
    targets = (generator.random((60, 3)) < 0.4).astype(np.uint8)
    predicted = (logits >= 0).astype(int)
    measured = measure(TASK, logits, targets, NAMES)
    each = sklearn_metrics.precision_recall_fscore_support(targets, predicted, zero_division=0)
    expected = {
        "f1_micro": sklearn_metrics.f1_score(targets, predicted, average="micro"),
        "f1_macro": each[2].mean(),
        "f1_samples": sklearn_metrics.f1_score(targets, predicted, average="samples", zero_division=1.0),
        "precision_macro": each[0].mean(),
        "recall_macro": each[1].mean(),
        "subset_accuracy": sklearn_metrics.accuracy_score(targets, predicted),
        "average_precision_macro": sklearn_metrics.average_precision_score(targets, probabilities(logits)),
        "loss": torch.nn.functional.binary_cross_entropy_with_logits(
            torch.tensor(logits).double(), torch.tensor(targets).double()
        ).item(),
    }
    assert set(TASK.metrics) == set(expected)
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-12)
    for name, *row in zip(NAMES, *each, strict=True):
        found = measured["per_class"][name]
        assert [found[key] for key in ("precision", "recall", "f1", "support")] == pytest.approx(row)


@pytest.mark.filterwarnings("error")
def test_labels_that_never_occur():
    logits = np.full((4, 3), -2.0, dtype=np.float32)
    logits[:2, 0] = 800.0  # a probability of 1
    nothing = np.zeros((4, 3), dtype=np.uint8)
    targets = nothing.copy()
    targets[:2, 0] = 1
    measured = measure(TASK, logits, targets, NAMES)
    assert measured["f1_macro"] == measured["average_precision_macro"] == measured["f1_samples"] == 1
    assert measured["per_class"]["b"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0, "threshold": 0.5}
    empty = measure(TASK, logits - 900, nothing, NAMES)
    assert (empty["f1_macro"], empty["average_precision_macro"], empty["f1_samples"]) == (0, 0, 1)
    json.dumps([measured, empty], allow_nan=False)


def test_any_number_of_labels():
    for num_labels, rows in itertools.product((1, 2), (1, 3)):
        logits, targets = np.ones((rows, num_labels), np.float32), np.ones((rows, num_labels), np.uint8)
        assert measure(TASK, logits, targets, NAMES[:num_labels])["f1_samples"] == 1
        assert re.fullmatch("a(\\|b)?", TASK.prediction_columns(logits, NAMES[:num_labels])["prediction"][0])

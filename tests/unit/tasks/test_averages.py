"""The mean of several runs, and the shares of classes in predictions and training."""

import json

import numpy as np
import pytest

from trainer.config.schema import TaskConfig
from trainer.tasks import TASKS, make_task, multi_label, single_label
from trainer.tasks.shares import class_shares, describe_shares, find_shift
from trainer.tasks.task import measure

NAMES = ["a", "b", "c", "d"]
LOGITS = [np.random.default_rng(seed).normal(size=(50, 4)).astype(np.float32) * 3 for seed in range(3)]


def test_single_label_averages_probabilities():
    logits, constants = single_label.TASK.average(LOGITS, [{}] * 3, NAMES)
    wanted = np.mean([single_label.probabilities(each) for each in LOGITS], axis=0)
    assert np.abs(single_label.probabilities(logits) - wanted).max() < 1e-14
    assert np.abs(single_label.probabilities(np.mean(LOGITS, axis=0)) - wanted).max() > 0.01, "not the mean of logits"
    assert constants == {}


def test_multi_label_averages_probabilities_and_thresholds():
    constants = [{"thresholds": dict(zip(NAMES, row, strict=True))} for row in ([0.1, 0.2, 0.3, 0.4], [0.5] * 4)]
    constants.append({"thresholds": {"d": 0.3, "c": 0.1, "b": 0.2, "a": 0.9}})
    logits, averaged = make_task(TaskConfig("multi_label")).average(LOGITS, constants, NAMES)
    wanted = np.mean([multi_label.probabilities(each) for each in LOGITS], axis=0)
    assert np.abs(multi_label.probabilities(logits) - wanted).max() < 1e-14
    assert averaged["thresholds"] == pytest.approx({"a": 0.5, "b": 0.3, "c": 0.3, "d": 0.4})
    task = make_task(TaskConfig("multi_label"), averaged)
    assert task.decide(logits).tolist() == (wanted >= [0.5, 0.3, 0.3, 0.4]).tolist()
    _, without = task.average(LOGITS, [{}] * 3, NAMES)
    assert without["thresholds"] == dict.fromkeys(NAMES, 0.5)


def test_regression_averages_numbers_in_their_own_units():
    names = ["price", "size"]
    logits = [np.array([[1.0, 2.0]], dtype=np.float32), np.array([[-1.0, 0.5]], dtype=np.float32)]
    constants = [
        {"mean": {"price": 10.0, "size": 0.0}, "scale": {"price": 2.0, "size": 1.0}},
        {"scale": {"size": 4.0, "price": 6.0}, "mean": {"size": 1.0, "price": 20.0}},
    ]
    task = TASKS["regression"](TaskConfig("regression"), {})
    found, averaged = task.average(logits, constants, names)
    columns = TASKS["regression"](TaskConfig("regression"), averaged).prediction_columns(found, names)
    assert columns["prediction:price"] == [(12 + 14) / 2]
    assert columns["prediction:size"] == [(2 + 3) / 2]
    assert class_shares(task, found, names, {"num_examples": 2, "label_counts": {}}) == {}


@pytest.mark.parametrize("name", ["single_label", "multi_label"])
def test_extreme_logits_stay_finite(name):
    task = TASKS[name](TaskConfig(name), {})
    extreme = [np.array([[900.0, -900, 0, 0]], dtype=np.float32), np.array([[850.0, -850, 0, 1]], dtype=np.float32)]
    logits, _ = task.average(extreme, [{}, {}], NAMES)
    assert np.isfinite(logits).all()
    targets = {"single_label": np.array([1]), "multi_label": np.array([[0, 1, 0, 0]], dtype=np.uint8)}[name]
    assert 200 < measure(task, logits, targets, NAMES)["loss"] < 2000


# --- shares ---


def logits_of(counts):
    return np.eye(4, dtype=np.float32)[np.repeat(np.arange(4), counts)]


def shares_of(counts, train=(25, 25, 25, 25)):
    in_train = {"num_examples": sum(train), "label_counts": dict(zip(NAMES, train, strict=True))}
    return class_shares(single_label.TASK, logits_of(counts), NAMES, json.loads(json.dumps(in_train)))


def test_shares_by_hand():
    shares = shares_of([10, 0, 6, 4], train=(10, 20, 30, 40))
    assert {name: row["predicted"] for name, row in shares.items()} == {"a": 0.5, "b": 0, "c": 0.3, "d": 0.2}
    assert {name: row["train"] for name, row in shares.items()} == {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4}
    assert (
        describe_shares(shares)
        == "predicted (in train): 'a' 50.0% (10.0%), 'b' 0.0% (20.0%), 'c' 30.0% (30.0%), 'd' 20.0% (40.0%)"
    )


def test_shares_of_several_labels():
    task = make_task(TaskConfig("multi_label"))
    logits = np.array([[1, 1, -1, -1], [1, -1, -1, -1]], dtype=np.float32)
    train = {"num_examples": 10, "label_counts": {"a": 9, "b": 5, "c": 1, "d": 0}}
    shares = class_shares(task, logits, NAMES, train)
    assert [row["predicted"] for row in shares.values()] == [1, 0.5, 0, 0]
    assert [row["train"] for row in shares.values()] == [0.9, 0.5, 0.1, 0]


def test_a_run_without_counts_has_no_shares():
    assert class_shares(single_label.TASK, LOGITS[0], NAMES, {}) == {}
    assert find_shift({}, 50) is None


@pytest.mark.parametrize(
    ("counts", "is_shift"),
    [
        ([2500, 2500, 2500, 2500], False),
        ([2100, 2000, 2401, 3499], False),  # 10 points more of d are alike
        ([2100, 2000, 2398, 3502], True),
        ([1400, 2700, 2900, 3000], True),  # as many less of a
        ([1, 0, 0, 19], True),
        ([1, 2, 3, 6], False),  # a quarter of d is not far from a half in 12 rows
        ([0, 0, 0, 1], False),
    ],
)
def test_a_shift_is_large_and_not_by_chance(counts, is_shift):
    assert (find_shift(shares_of(counts), sum(counts)) is not None) == is_shift


def test_a_shift_names_the_class():
    assert "'d' is 60.0% of the predictions, and 25.0% of train" in find_shift(
        shares_of([1500, 1500, 1000, 6000]), 10_000
    )


def test_draws_from_train_are_no_shift():
    generator = np.random.default_rng(0)
    for size in (5, 20, 60, 200):
        counts = generator.multinomial(size, [0.25] * 4, size=500)
        assert not [row for row in counts.tolist() if find_shift(shares_of(row), size)]

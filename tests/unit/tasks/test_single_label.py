"""Metrics against hand-computed numbers, scikit-learn and torch."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef, precision_score, recall_score

from trainer.tasks.single_label import METRICS, TASK, confusion, example_weights, probabilities, report_text
from trainer.tasks.task import is_better, measure, metric_value

NAMES = ["a", "b", "c", "d"]


def one_hot(predicted, num_labels=4, scale=2.0):
    return np.eye(num_labels, dtype=np.float32)[predicted] * scale


def test_a_case_done_by_hand():
    # class a: 2 of 2 found, 1 of b taken for a; b: 1 of 2 found; c: 1 of 1
    labels, predicted = np.array([0, 0, 1, 1, 2]), np.array([0, 0, 0, 1, 2])
    metrics = measure(TASK, one_hot(predicted, 3), labels, ["a", "b", "c"])
    assert metrics["accuracy"] == pytest.approx(4 / 5)
    assert metrics["per_class"]["a"] == pytest.approx({"precision": 2 / 3, "recall": 1.0, "f1": 0.8, "support": 2})
    assert metrics["per_class"]["b"] == pytest.approx({"precision": 1.0, "recall": 0.5, "f1": 2 / 3, "support": 2})
    assert metrics["f1_macro"] == pytest.approx((0.8 + 2 / 3 + 1) / 3)
    assert metrics["f1_weighted"] == pytest.approx((2 * 0.8 + 2 * 2 / 3 + 1) / 5)
    assert metrics["precision_macro"] == pytest.approx((2 / 3 + 1 + 1) / 3)
    assert metrics["recall_macro"] == pytest.approx((1 + 0.5 + 1) / 3)
    right, wrong = math.log(math.exp(2) + 2) - 2, math.log(math.exp(2) + 2)
    assert metrics["loss"] == pytest.approx((4 * right + wrong) / 5, rel=1e-6)
    assert metrics["num_examples"] == 5
    assert confusion(one_hot(predicted, 3), labels).tolist() == [[2, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn_and_torch(seed):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(97, 4)).astype(np.float32) * 3
    labels = generator.integers(0, 4, 97)
    predicted = logits.argmax(axis=1)
    metrics = measure(TASK, logits, labels, NAMES)
    expected = {
        "accuracy": (predicted == labels).mean(),
        "f1_macro": f1_score(labels, predicted, average="macro"),
        "f1_weighted": f1_score(labels, predicted, average="weighted"),
        "precision_macro": precision_score(labels, predicted, average="macro"),
        "recall_macro": recall_score(labels, predicted, average="macro"),
        "mcc": matthews_corrcoef(labels, predicted),
        "loss": torch.nn.functional.cross_entropy(torch.tensor(logits).double(), torch.tensor(labels)).item(),
    }
    assert set(METRICS) == set(expected)
    assert {name: metrics[name] for name in METRICS} == pytest.approx(expected, rel=1e-12)
    each = f1_score(labels, predicted, average=None)
    assert [metrics["per_class"][name]["f1"] for name in NAMES] == pytest.approx(each.tolist())
    assert probabilities(logits) == pytest.approx(torch.tensor(logits).double().softmax(dim=1).numpy(), rel=1e-12)


@pytest.mark.filterwarnings("error")
def test_classes_that_never_occur():
    labels, predicted = np.array([0, 1, 0]), np.array([0, 1, 1])
    metrics = measure(TASK, one_hot(predicted), labels, NAMES)
    assert set(metrics["per_class"]) == set(NAMES)
    assert metrics["per_class"]["d"] == {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert metrics["f1_macro"] == pytest.approx(2 / 3), "macro averages run over the classes that occur"
    assert confusion(one_hot(predicted), labels).sum() == 3
    assert confusion(one_hot(predicted), labels).shape == (4, 4)
    text = report_text(one_hot(predicted), labels, NAMES)
    assert [name for name in NAMES if f" {name} " in text] == NAMES[:2], text
    assert "0.6667" in next(line for line in text.splitlines() if "macro avg" in line)


@pytest.mark.filterwarnings("ignore:A single label")
@pytest.mark.parametrize(("predicted", "accuracy"), [(2, 1.0), (0, 0.0)])
def test_one_example(predicted, accuracy):
    metrics = measure(TASK, one_hot([predicted]), np.array([2]), NAMES)
    assert metrics["accuracy"] == accuracy
    assert metrics["mcc"] == 0.0
    assert metrics["num_examples"] == 1
    assert all(math.isfinite(metrics[name]) for name in METRICS)


def test_large_logits_neither_overflow_nor_lose_the_loss():
    logits = np.array([[3e4, -3e4], [3e4, -3e4]], dtype=np.float32)
    metrics = measure(TASK, logits, np.array([0, 1]), ["a", "b"])
    assert metrics["loss"] == pytest.approx(3e4)
    assert probabilities(logits).tolist() == [[1.0, 0.0], [1.0, 0.0]]


def test_metric_by_name():
    metrics = measure(TASK, one_hot([0, 1, 1]), np.array([0, 1, 0]), ["x", "f1/odd"])
    assert metric_value(metrics, "accuracy") == metrics["accuracy"]
    assert metric_value(metrics, "f1/f1/odd") == metrics["per_class"]["f1/odd"]["f1"]


@pytest.mark.parametrize(
    ("value", "best", "name", "expected"),
    [
        (0.1, None, "accuracy", True),
        (0.9, 0.8, "accuracy", True),
        (0.8, 0.8, "accuracy", False),
        (0.5, 0.8, "loss", True),
        (0.9, 0.8, "loss", False),
        (math.nan, 0.8, "loss", False),
        (math.nan, 0.8, "accuracy", False),
        (0.5, math.nan, "loss", True),
    ],
)
def test_better(value, best, name, expected):
    assert is_better(TASK, name, value, best) is expected


def test_weights_of_examples_are_those_of_their_classes():
    labels = np.array([0, 0, 0, 1, 2, 2])  # no example of d
    assert example_weights(None, labels, NAMES).tolist() == [1.0] * 6
    assert example_weights({"b": 2, "a": 0}, labels, NAMES).tolist() == [0, 0, 0, 2, 1, 1]
    balanced = example_weights("balanced", labels, NAMES)
    assert balanced == pytest.approx([2 / 3] * 3 + [2.0] + [1.0] * 2)
    assert np.bincount(labels, balanced) == pytest.approx([2.0, 2.0, 2.0]), "each class has the same share"

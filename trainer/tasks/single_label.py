"""Predictions -> numbers. scikit-learn does the arithmetic; it loads with the first of them, not before the first step.

Always holds: the numbers are a function of all predictions of a split in the order of its examples, never of batches,
so they are equal on any number of processes.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np

from trainer.config.labels import match_labels

METRICS = ("accuracy", "f1_macro", "f1_weighted", "precision_macro", "recall_macro", "mcc", "loss")


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over classes in double precision, [N, C]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def classification_metrics(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> dict[str, Any]:
    """All numbers of one split.

    Macro averages run over the classes that occur in the labels or the predictions, as in scikit-learn.

    Args:
        logits: [N, C].
        labels: class numbers [N].
        label_names: [C].

    Returns:
        the scalars named in METRICS (`loss` is the plain mean cross-entropy, without smoothing or weights),
        `num_examples`, and `per_class`: {name: {precision, recall, f1, support}}.
    """
    from sklearn import metrics

    predicted = logits.argmax(axis=1)
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    macro = metrics.precision_recall_fscore_support(labels, predicted, average="macro", zero_division=0)
    each = metrics.precision_recall_fscore_support(labels, predicted, labels=range(len(label_names)), zero_division=0)
    with warnings.catch_warnings(action="ignore"):  # a single class, all right: scikit-learn answers 0 and a warning
        mcc = metrics.matthews_corrcoef(labels, predicted)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "f1_macro": float(macro[2]),
        "f1_weighted": float(metrics.f1_score(labels, predicted, average="weighted", zero_division=0)),
        "precision_macro": float(macro[0]),
        "recall_macro": float(macro[1]),
        "mcc": float(mcc),
        "loss": float((log_sum - wide[np.arange(len(labels)), labels]).mean()),
        "num_examples": len(labels),
        "per_class": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for name, p, r, f, n in zip(label_names, *each, strict=True)
        },
    }


def metric_value(metrics: dict[str, Any], name: str) -> float:
    """The metric `name`; `f1/CLASS` is the F1 of one class."""
    if name.startswith("f1/"):
        word = name.removeprefix("f1/")
        return float(metrics["per_class"][match_labels([word], metrics["per_class"])[word]]["f1"])
    return float(metrics[name])


def is_better(value: float, best: float | None, name: str) -> bool:
    """Whether `value` beats `best`; a loss is better when lower; the first value always is, and so is any after NaN."""
    return best is None or math.isnan(best) or (value < best if name == "loss" else value > best)


def confusion(logits: np.ndarray, labels: np.ndarray, num_labels: int) -> np.ndarray:
    """Counts, rows true, columns predicted, int64 [C, C]."""
    from sklearn.metrics import confusion_matrix

    return np.asarray(confusion_matrix(labels, logits.argmax(axis=1), labels=range(num_labels)))


def report_text(logits: np.ndarray, labels: np.ndarray, label_names: list[str]) -> str:
    """Precision, recall and F1 of the classes that occur, as scikit-learn prints them."""
    from sklearn.metrics import classification_report

    predicted = logits.argmax(axis=1)
    numbers = np.union1d(labels, predicted)
    names = [label_names[number] for number in numbers]
    text = classification_report(labels, predicted, labels=numbers, target_names=names, digits=4, zero_division=0)
    return str(text)

"""Each example has one label, the name of its class. A target is the number of the class, int64 [N].

scikit-learn computes the metrics. It is imported when the first of them is computed, after the first steps.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from trainer.config.schema import OptimConfig
from trainer.errors import UserError
from trainer.files import csv_text
from trainer.tasks import classes
from trainer.tasks.task import ClassWeights, Constants, Losses, Metric, Task

# --- labels -----------------------------------------------------------------------------------------------------------


def count_labels(targets: np.ndarray, label_names: list[str]) -> dict[str, int]:
    """{class: number of examples}."""
    return dict(zip(label_names, np.bincount(targets, minlength=len(label_names)).tolist(), strict=True))


def find_fault(targets: np.ndarray, label_names: list[str]) -> str | None:
    """Why no model can be trained with these targets; None if one can."""
    present = np.unique(targets)
    return f"has a single class, {label_names[present[0]]!r}; a classifier needs two" if len(present) < 2 else None


# --- training ---------------------------------------------------------------------------------------------------------


def make_losses(optim: OptimConfig, targets: np.ndarray, label_names: list[str]) -> Losses:
    """`losses` with the smoothing of a configuration."""
    return functools.partial(losses, label_smoothing=optim.label_smoothing)


def losses(logits: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross-entropy of each example, [B].

    The weight of an example multiplies its whole loss, also the smoothed part. `torch.nn.CrossEntropyLoss` with class
    weights would weigh the smoothed part by the weights of the other classes.
    """
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)


def example_weights(class_weights: ClassWeights, targets: np.ndarray, label_names: list[str]) -> np.ndarray:
    """Weight of each example in the loss: that of its class, float64 [N].

    Raises:
        UserError: a class that does not exist, or weights that no model can be trained with.
    """
    if class_weights is None:
        return np.ones(len(targets))
    if class_weights == "balanced":
        counts = np.bincount(targets, minlength=len(label_names))
        return (len(targets) / (np.count_nonzero(counts) * np.maximum(counts, 1)))[targets]
    weights = classes.named_weights(class_weights, label_names)
    if np.count_nonzero(weights) < 2:
        raise UserError("optim.class_weights: at least two classes need a weight above 0")
    return weights[targets]


# --- metrics ----------------------------------------------------------------------------------------------------------


def _accuracy(logits: np.ndarray, targets: np.ndarray) -> float:
    return float((logits.argmax(axis=1) == targets).mean())


def _average(logits: np.ndarray, targets: np.ndarray, over: str) -> tuple[float, float, float]:
    """Precision, recall and F1, averaged over the classes that occur in targets or predictions."""
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(targets, logits.argmax(axis=1), average=over, zero_division=0)
    return float(scores[0]), float(scores[1]), float(scores[2])


def _matthews(logits: np.ndarray, targets: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings(action="ignore"):  # for a single class it warns and returns 0
        return float(matthews_corrcoef(targets, logits.argmax(axis=1)))


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean cross-entropy, without smoothing or weights."""
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float((log_sum - wide[np.arange(len(targets)), targets]).mean())


METRICS = {
    "accuracy": Metric(_accuracy, higher_is_better=True),
    "f1_macro": Metric(lambda logits, targets: _average(logits, targets, "macro")[2], higher_is_better=True),
    "f1_weighted": Metric(lambda logits, targets: _average(logits, targets, "weighted")[2], higher_is_better=True),
    "precision_macro": Metric(lambda logits, targets: _average(logits, targets, "macro")[0], higher_is_better=True),
    "recall_macro": Metric(lambda logits, targets: _average(logits, targets, "macro")[1], higher_is_better=True),
    "mcc": Metric(_matthews, higher_is_better=True),
    "loss": Metric(_cross_entropy, higher_is_better=False),
}


def class_scores(logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> dict[str, dict[str, Any]]:
    """{class: its precision, recall, F1 and number of examples}, for every class."""
    from sklearn.metrics import precision_recall_fscore_support

    numbers = range(len(label_names))
    each = precision_recall_fscore_support(targets, logits.argmax(axis=1), labels=numbers, zero_division=0)
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
        for name, p, r, f, n in zip(label_names, *each, strict=True)
    }


# --- predictions ------------------------------------------------------------------------------------------------------


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the classes in double precision, [N, C]."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return shifted / shifted.sum(axis=1, keepdims=True)


def average(
    logits: Sequence[np.ndarray], constants: Sequence[Constants], label_names: list[str]
) -> tuple[np.ndarray, Constants]:
    """Logits whose probabilities are the mean of those of several runs: logs of the means."""
    return np.logaddexp.reduce([log_probabilities(each) for each in logits]) - np.log(len(logits)), {}


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log of the softmax over the classes in double precision, [N, C]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def confusion(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Counts, rows true and columns predicted, int64 [C, C]."""
    from sklearn.metrics import confusion_matrix

    return np.asarray(confusion_matrix(targets, logits.argmax(axis=1), labels=range(logits.shape[1])))


def report_text(logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> str:
    """Precision, recall and F1 of the classes that occur, as scikit-learn prints them."""
    from sklearn.metrics import classification_report

    predicted = logits.argmax(axis=1)
    numbers = np.union1d(targets, predicted)
    names = [label_names[number] for number in numbers]
    return str(classification_report(targets, predicted, labels=numbers, target_names=names, digits=4, zero_division=0))


def files(logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> dict[str, str]:
    """The confusion matrix and scikit-learn's report, by file name."""
    rows = zip(label_names, confusion(logits, targets).tolist(), strict=True)
    matrix = [["true \\ predicted", *label_names], *([name, *row] for name, row in rows)]
    return {
        "confusion_matrix.csv": csv_text(matrix),
        "classification_report.txt": report_text(logits, targets, label_names),
    }


def prediction_columns(logits: np.ndarray, label_names: list[str]) -> dict[str, list[Any]]:
    """The predicted class, its probability, and the probability of each class."""
    shares = probabilities(logits)
    return {
        "prediction": format_targets(logits.argmax(axis=1), label_names),
        "confidence": shares.max(axis=1).tolist(),
        **{f"probability:{name}": column.tolist() for name, column in zip(label_names, shares.T, strict=True)},
    }


def format_targets(targets: np.ndarray, label_names: list[str]) -> list[str]:
    """The class names of class numbers, [N]."""
    return [label_names[target] for target in targets]


TASK = Task(
    problem_type="single_label_classification",
    noun="class",
    name_labels=classes.name_classes,
    encode=classes.class_numbers,
    label_values=classes.class_values,
    output_labels=classes.output_labels,
    count_labels=count_labels,
    find_fault=find_fault,
    strata=lambda targets: targets,
    make_losses=make_losses,
    example_weights=example_weights,
    metrics=METRICS,
    headline=("accuracy", "f1_macro", "loss"),
    average=average,
    decide=lambda logits: logits.argmax(axis=1),
    class_scores=class_scores,
    confusion=confusion,
    files=files,
    prediction_columns=prediction_columns,
    format_targets=format_targets,
)

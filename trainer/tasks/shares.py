"""The classes that a model predicts beside those it was trained on: the share of each in either.

On data unlike those of training, a model often prefers one class. Without labels, the shares are the only sign of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.config.labels import MAX_SHOWN_LABELS, quoted
from trainer.tasks.task import Task

MIN_DIFFERENCE = 0.1
"""of two shares of a class: below it they are alike"""
CHANCE = 0.001
"""highest probability of a warning if the predictions were drawn from the shares of train"""

Shares = dict[str, dict[str, float]]
"""{class: {"predicted": share of the predictions, "train": share of the training examples}}"""


def class_shares(task: Task, logits: np.ndarray, label_names: list[str], train: Mapping[str, Any]) -> Shares:
    """The shares of each class; {} for a task whose labels are not classes.

    `train` has the `num_examples` and `label_counts` of the training split, as in summary.json.
    """
    counts, in_train = task.count_labels(task.decide(logits), label_names), train.get("label_counts", {})
    if counts.keys() != in_train.keys():
        return {}
    return {
        name: {"predicted": count / len(logits), "train": in_train[name] / train["num_examples"]}
        for name, count in counts.items()
    }


def describe_shares(shares: Shares) -> str:
    """A line about all classes, or about those that differ most."""
    names = sorted(shares, key=lambda name: -_difference(shares[name]))[:MAX_SHOWN_LABELS]
    shown = (f"{quoted([name])} {_percent(shares[name])}" for name in shares if name in names)
    more = f", ... ({len(shares)})" if len(shares) > len(names) else ""
    return f"predicted (in train): {', '.join(shown)}{more}"


def find_shift(shares: Shares, num_predictions: int) -> str | None:
    """A warning about the class whose share differs most; None if no class differs much.

    A share differs much by more than `MIN_DIFFERENCE`, and by more than chance: Hoeffding's bound for N predictions,
    divided among the C classes, sqrt(log(2 C / CHANCE) / (2 N)).
    """
    if not shares:
        return None
    name = max(shares, key=lambda name: _difference(shares[name]))
    by_chance = math.sqrt(math.log(2 * len(shares) / CHANCE) / (2 * num_predictions))
    if _difference(shares[name]) <= max(MIN_DIFFERENCE, by_chance):
        return None
    row = shares[name]
    found = f"{quoted([name])} is {row['predicted']:.1%} of the predictions, and {row['train']:.1%} of train"
    return f"class shares differ: {found}"


def _difference(row: Mapping[str, float]) -> float:
    return abs(row["predicted"] - row["train"])


def _percent(row: Mapping[str, float]) -> str:
    return f"{row['predicted']:.1%} ({row['train']:.1%})"

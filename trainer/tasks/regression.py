"""Each example has a number, or one in each of several columns. A target is a row of them, float64 [N, C].

Always holds: the model computes in standardized units. A logit stands for (number - mean) / scale, with mean and
standard deviation of the numbers of train. They are known before step 1 and saved with the adapter. The loss is in
these units, so targets of any size count alike. Predictions and the other metrics are in the numbers' own units.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from trainer.config.labels import quoted
from trainer.config.schema import ABOVE_ZERO, FINITE, OptimConfig, TaskConfig
from trainer.errors import UserError
from trainer.files import csv_text
from trainer.tasks.task import Constants, Label, LabelColumn, Losses, Metric, Task, weigh_equally

LARGEST = 1e100  # squares of larger numbers have no sums
NUM_QUANTILES = 10
"""groups by size of which the validation split takes equal fractions"""
PRECISION = 6
"""digits of a prediction below the size of its target's standard deviation"""
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")

# --- targets ----------------------------------------------------------------------------------------------------------


def read_number(text: str | None) -> float | None:
    """The number that a label spells; None if it spells none, or one that is not finite or above 1e100."""
    number = float(text) if text and _NUMBER.fullmatch(text) else math.inf
    return number if abs(number) <= LARGEST else None


def name_targets(train: LabelColumn) -> tuple[list[str], str | None]:
    """The names of the columns."""
    if train.given_names:
        raise UserError(f"{train.option}: label_names are for classes, and task.type regression has none; leave it out")
    return train.columns, None


def encode(column: LabelColumn, label_names: list[str]) -> tuple[np.ndarray, list[str]]:
    """The targets of each example, float64 [N, C], without warnings.

    Raises:
        UserError: another number of columns than train has, or a label that is not a finite number.
    """
    columns = column.columns
    if len(columns) != len(label_names):
        raise UserError(f"{column.option}: {quoted(columns)} are {len(columns)} targets, train has {len(label_names)}")
    order = [columns.index(name) for name in label_names] if set(columns) == set(label_names) else range(len(columns))
    numbers = np.array([_numbers_of(column, code, value) for code, value in enumerate(column.values)])
    return numbers.reshape(-1, len(columns))[:, list(order)][column.codes], []


def _numbers_of(column: LabelColumn, code: int, value: Label) -> list[float]:
    """The numbers of the rows with one label, in the order of the columns."""
    cells = value if isinstance(value, list) and len(column.columns) > 1 else [value]
    numbers = []
    for name, cell in zip(column.columns, cells, strict=True):
        number = None if isinstance(cell, list) else read_number(cell)
        if number is None:
            shown = "a list" if isinstance(cell, list) else quoted([cell]) if cell else "nothing"
            row = column.describe_row(int(np.argmax(column.codes == code)))
            fix = "--ignore_labels true ignores labels" if column.option == "--input" else "or set another task.type"
            raise UserError(
                f"{column.option}: {column.path}: {row}: column {name!r} holds {shown}; task.type regression needs "
                f"a finite number, such as 3.7; {fix}"
            )
        numbers.append(number)
    return numbers


def fit(targets: np.ndarray, label_names: list[str]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of each target; sums are exact, so they are equal on every machine."""
    count = len(targets)
    means = [math.fsum(column) / count for column in targets.T]
    scales = [math.sqrt(math.fsum((column - m) ** 2) / count) for column, m in zip(targets.T, means, strict=True)]
    return {"mean": dict(zip(label_names, means, strict=True)), "scale": dict(zip(label_names, scales, strict=True))}


def find_fault(targets: np.ndarray, label_names: list[str]) -> str | None:
    """Why no model can be trained with these targets; None if one can."""
    for name, scale, first in zip(label_names, fit(targets, label_names)["scale"].values(), targets[0], strict=True):
        if not scale or (targets[:, label_names.index(name)] == first).all():
            return f"has one number, {first:g}, in all rows of column {name!r}; regression needs two"
    return None


def strata(targets: np.ndarray) -> np.ndarray:
    """For each tenth of the examples by size, those up to it; by the mean of standardized targets; bool [N, 10]."""
    spread = targets.std(axis=0)
    size = ((targets - targets.mean(axis=0)) / np.where(spread > 0, spread, 1.0)).mean(axis=1)
    limits = np.quantile(size, np.arange(1, NUM_QUANTILES) / NUM_QUANTILES)
    return np.searchsorted(limits, size)[:, None] <= np.arange(NUM_QUANTILES)


# --- metrics ----------------------------------------------------------------------------------------------------------


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Pearson's correlation of two [N]; 0 if all values of one are equal."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    a, b = one - one.mean(), other - other.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()  # squares of small numbers vanish
    return float(np.clip((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()), -1.0, 1.0))


def ranks(values: np.ndarray) -> np.ndarray:
    """The rank of each value; equal values have the mean of their ranks; float64 [N]."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[places])


def explained(predicted: np.ndarray, true: np.ndarray) -> float:
    """R2 of [N]; if all targets are equal, it is 1 for exact predictions and else 0."""
    errors = float(((predicted - true) ** 2).sum())
    if np.ptp(true) == 0:
        return float(errors == 0)
    return 1 - errors / float(((true - true.mean()) ** 2).sum())


SCORES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], bool]] = {
    "mse": (lambda predicted, true: float(((predicted - true) ** 2).mean()), False),
    "mae": (lambda predicted, true: float(np.abs(predicted - true).mean()), False),
    "pearson": (correlation, True),
    "spearman": (lambda predicted, true: correlation(ranks(predicted), ranks(true)), True),
    "r2": (explained, True),
}
"""by name: the score of one target, of predictions and targets [N] in own units, and whether higher is better"""


def average(
    logits: Sequence[np.ndarray], constants: Sequence[Constants], label_names: list[str]
) -> tuple[np.ndarray, Constants]:
    """The mean of the numbers that several runs predict, in the standardized units of the first."""
    units = [[np.array([own[kind][name] for name in label_names]) for kind in ("mean", "scale")] for own in constants]
    numbers = [each.astype(np.float64) * scale + mean for each, (mean, scale) in zip(logits, units, strict=True)]
    mean, scale = units[0]
    return (np.stack(numbers).mean(axis=0) - mean) / scale, constants[0]


# --- the task ---------------------------------------------------------------------------------------------------------


def make_task(config: TaskConfig, constants: Constants) -> Task:
    """The task with the constants of `fit`; without them a logit is the number itself."""
    mean = np.array(list(constants.get("mean", {}).values()) or 0.0)
    scale = np.array(list(constants.get("scale", {}).values()) or 1.0)

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Loss of each example in standardized units, averaged over its targets, [B]."""
        wide = targets.double()
        wanted = (wide - torch.from_numpy(mean).to(wide)) / torch.from_numpy(scale).to(wide)
        loss = torch.nn.functional.huber_loss if config.loss == "huber" else torch.nn.functional.mse_loss
        return loss(logits, wanted.to(logits.dtype), reduction="none").mean(dim=1)

    def make_losses(optim: OptimConfig, targets: np.ndarray, label_names: list[str]) -> Losses:
        if optim.label_smoothing:
            raise UserError(f"optim.label_smoothing: {optim.label_smoothing} is for classes; use 0 for regression")
        weigh_equally(optim.class_weights, targets, label_names)
        return losses

    def predict(logits: np.ndarray) -> np.ndarray:
        return np.asarray(logits.astype(np.float64) * scale + mean)

    def each(name: str, logits: np.ndarray, targets: np.ndarray) -> list[float]:
        return [SCORES[name][0](*pair) for pair in zip(predict(logits).T, targets.T, strict=True)]

    def score(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
        return lambda logits, targets: float(np.mean(each(name, logits, targets)))

    def loss(logits: np.ndarray, targets: np.ndarray) -> float:
        return float(losses(torch.from_numpy(logits).double(), torch.from_numpy(targets)).mean())

    def target_scores(logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> dict[str, dict[str, Any]]:
        columns = {name: each(name, logits, targets) for name in SCORES}
        return {label: {name: columns[name][i] for name in SCORES} for i, label in enumerate(label_names)}

    def round_numbers(numbers: np.ndarray) -> np.ndarray:
        digits = [max(0, PRECISION - math.floor(math.log10(size))) for size in np.atleast_1d(scale)]
        return np.column_stack([np.round(column, n) for column, n in zip(numbers.T, digits, strict=True)])

    def prediction_columns(logits: np.ndarray, label_names: list[str]) -> dict[str, list[Any]]:
        numbers = round_numbers(predict(logits))
        columns = {f"prediction:{name}": column.tolist() for name, column in zip(label_names, numbers.T, strict=True)}
        return {"prediction": format_targets(numbers, label_names), **(columns if len(label_names) > 1 else {})}

    def residuals(logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> dict[str, str]:
        rows = [
            [name, *pair]
            for pairs in zip(targets.tolist(), round_numbers(predict(logits)).tolist(), strict=True)
            for name, *pair in zip(label_names, *pairs, strict=True)
        ]
        return {"residuals.csv": csv_text([["target", "true", "predicted"], *rows])}

    return Task(
        problem_type="regression",
        noun="target",
        name_labels=name_targets,
        encode=encode,
        find_fault=find_fault,
        strata=strata,
        constants={"mean": FINITE, "scale": ABOVE_ZERO},
        fit=fit,
        affine=(np.atleast_1d(scale), np.atleast_1d(mean)),
        average=average,
        make_losses=make_losses,
        metrics={name: Metric(score(name), higher_is_better=higher) for name, (_, higher) in SCORES.items()}
        | {"loss": Metric(loss, higher_is_better=False)},
        class_scores=target_scores,
        prediction_columns=prediction_columns,
        format_targets=format_targets,
        files=residuals,
    )


def format_targets(targets: np.ndarray, label_names: list[str]) -> list[Any]:
    """A number for each example; several numbers as a list in JSON."""
    rows = targets.tolist()
    return [row[0] for row in rows] if len(label_names) == 1 else list(map(json.dumps, rows))

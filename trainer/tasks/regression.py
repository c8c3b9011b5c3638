"""Each example has a number, or one in each of several columns. A target is a row of them, float64 [N, C].

Always holds: the model computes in standardized units. A logit stands for (number - mean) / scale, with mean and
standard deviation of the numbers of train. They are known before step 1 and saved with the adapter. The loss is in
these units, so targets of any size count alike. Predictions and the other metrics are in the numbers' own units.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
                f"a finite number below 1e100, such as 3.7; {fix}"
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


# --- units, loss and predictions --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Units:
    """What logits stand for: number = logit * scale + mean, in each column."""

    mean: np.ndarray
    """[C], or one for all"""
    scale: np.ndarray
    """[C], or one for all"""

    def numbers(self, logits: np.ndarray) -> np.ndarray:
        """The numbers that logits [N, C] stand for, float64 [N, C]."""
        return np.asarray(logits.astype(np.float64) * self.scale + self.mean)

    def rounded(self, logits: np.ndarray) -> np.ndarray:
        """The same, with `PRECISION` digits below the scale."""
        digits = [max(0, PRECISION - math.floor(math.log10(size))) for size in np.atleast_1d(self.scale)]
        return np.column_stack([np.round(column, n) for column, n in zip(self.numbers(logits).T, digits, strict=True)])


def read_units(constants: Constants) -> Units:
    """The units by the constants of `fit`; without them a logit is the number itself."""
    mean, scale = constants.get("mean", {}), constants.get("scale", {})
    return Units(np.array(list(mean.values()) or [0.0]), np.array(list(scale.values()) or [1.0]))


def losses(units: Units, name: str, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Squared error or Huber's loss of each example in standardized units, averaged over its targets, [B]."""
    wide = targets.double()
    wanted = (wide - torch.from_numpy(units.mean).to(wide)) / torch.from_numpy(units.scale).to(wide)
    function = torch.nn.functional.huber_loss if name == "huber" else torch.nn.functional.mse_loss
    return function(logits, wanted.to(logits.dtype), reduction="none").mean(dim=1)


def check_options(optim: OptimConfig, targets: np.ndarray, label_names: list[str]) -> None:
    """Refuses the options of a loss of classes."""
    if optim.label_smoothing:
        raise UserError(f"optim.label_smoothing: {optim.label_smoothing} is for classes; use 0 for regression")
    weigh_equally(optim.class_weights, targets, label_names)


def mean_loss(units: Units, name: str, logits: np.ndarray, targets: np.ndarray) -> float:
    """The mean of `losses` over a split, in double precision."""
    return float(losses(units, name, torch.from_numpy(logits).double(), torch.from_numpy(targets)).mean())


def score_targets(name: str, units: Units, logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """A score of `SCORES` for each target, [C]."""
    return [SCORES[name][0](*pair) for pair in zip(units.numbers(logits).T, targets.T, strict=True)]


def make_metrics(units: Units, loss: str) -> dict[str, Metric]:
    """The means of `SCORES` over the targets, and the loss."""

    def mean_score(name: str) -> Callable[[np.ndarray, np.ndarray], float]:
        return lambda logits, targets: float(np.mean(score_targets(name, units, logits, targets)))

    metrics = {name: Metric(mean_score(name), higher_is_better) for name, (_, higher_is_better) in SCORES.items()}
    return metrics | {"loss": Metric(functools.partial(mean_loss, units, loss), higher_is_better=False)}


def target_scores(
    units: Units, logits: np.ndarray, targets: np.ndarray, label_names: list[str]
) -> dict[str, dict[str, Any]]:
    """{target: {score: value}}."""
    columns = {name: score_targets(name, units, logits, targets) for name in SCORES}
    return {label: {name: column[i] for name, column in columns.items()} for i, label in enumerate(label_names)}


def prediction_columns(units: Units, logits: np.ndarray, label_names: list[str]) -> dict[str, list[Any]]:
    """The predicted numbers; of several targets together, and in a column for each."""
    numbers = units.rounded(logits)
    columns = {f"prediction:{name}": column.tolist() for name, column in zip(label_names, numbers.T, strict=True)}
    return {"prediction": format_targets(numbers, label_names), **(columns if len(label_names) > 1 else {})}


def residuals(units: Units, logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> dict[str, str]:
    """residuals.csv: true and predicted number of each target of each example."""
    rows = [
        [name, *pair]
        for pairs in zip(targets.tolist(), units.rounded(logits).tolist(), strict=True)
        for name, *pair in zip(label_names, *pairs, strict=True)
    ]
    return {"residuals.csv": csv_text([["target", "true", "predicted"], *rows])}


def average(
    logits: Sequence[np.ndarray], constants: Sequence[Constants], label_names: list[str]
) -> tuple[np.ndarray, Constants]:
    """The mean of the numbers that several runs predict, in the standardized units of the first."""
    units = [read_units({kind: {n: own[kind][n] for n in label_names} for kind in own}) for own in constants]
    numbers = np.stack([own.numbers(each) for own, each in zip(units, logits, strict=True)]).mean(axis=0)
    return (numbers - units[0].mean) / units[0].scale, constants[0]


def format_targets(targets: np.ndarray, label_names: list[str]) -> list[Any]:
    """A number for each example; several numbers as a list in JSON."""
    rows = targets.tolist()
    return [row[0] for row in rows] if len(label_names) == 1 else list(map(json.dumps, rows))


def make_task(config: TaskConfig, constants: Constants) -> Task:
    """The task in the units of train."""
    units = read_units(constants)

    def make_losses(optim: OptimConfig, targets: np.ndarray, label_names: list[str]) -> Losses:
        check_options(optim, targets, label_names)
        return functools.partial(losses, units, config.loss)

    return Task(
        problem_type="regression",
        noun="target",
        name_labels=name_targets,
        encode=encode,
        find_fault=find_fault,
        strata=strata,
        constants={"mean": FINITE, "scale": ABOVE_ZERO},
        fit=fit,
        affine=(units.scale, units.mean),
        average=average,
        make_losses=make_losses,
        metrics=make_metrics(units, config.loss),
        class_scores=functools.partial(target_scores, units),
        prediction_columns=functools.partial(prediction_columns, units),
        format_targets=format_targets,
        output_labels=lambda mappings, names: (names, f"holds the numbers of {quoted(names)}"),
        files=functools.partial(residuals, units),
    )

"""What a task is: how labels become targets, and logits become losses, metrics and predictions.

Always holds: a metric is a function of all logits and targets of a split, never of batches. So it is equal on any
number of processes. docs/architecture.md says how to add a task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from trainer.config.labels import match_labels
from trainer.config.schema import OptimConfig, Range
from trainer.errors import UserError

Label = str | list[str | None]
"""the label of a row: a text; or a list of texts, from a list in JSON or Parquet, or from several columns"""
Losses = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(logits [B, C], targets of B examples) -> loss of each example [B], not yet weighted"""
ClassWeights = Literal["balanced"] | Mapping[str, float] | None
Mappings = Iterable[tuple[str, Any]]
"""(where it is from, {label: class name}) each"""
Constants = Mapping[str, Mapping[str, float]]
"""numbers that predictions need beside the logits: {kind: {label name: number}}, such as thresholds"""


@dataclass(frozen=True)
class Metric:
    """A number that says how well the logits of a split fit its targets."""

    function: Callable[[np.ndarray, np.ndarray], float]
    """of logits [N, C] and targets"""
    higher_is_better: bool


@dataclass(frozen=True)
class LabelColumn:
    """The labels of the N examples of a source. The task decides which of them it takes."""

    option: str
    """that names the source, for messages: data.train, data.validation, data.test or --input"""
    path: str
    columns: list[str]
    """names of the columns with the labels"""
    values: Sequence[Label]
    """the labels that occur, each once"""
    codes: np.ndarray
    """position of each example's label in `values`, int64 [N]"""
    given_names: list[str] | dict[str, str] | None
    """label_names of the source"""
    stored_names: list[str] | None
    """class names that a file or hub data set stores with its numbers"""
    describe_row: Callable[[int], str]
    """example -> its row, for messages"""

    def texts(self) -> list[str]:
        """The labels that occur, for a task that takes no lists.

        Raises:
            UserError: a label that is a list.
        """
        for code, value in enumerate(self.values):
            if isinstance(value, list):
                row = self.describe_row(int(np.argmax(self.codes == code)))
                place = f"{self.option}: {self.path}: {row}: column {self.columns[0]!r}"
                raise UserError(f"{place} holds a list, not text; lists of labels need task.type multi_label")
        return [value for value in self.values if isinstance(value, str)]


def weigh_equally(class_weights: ClassWeights, targets: np.ndarray, label_names: list[str]) -> np.ndarray:
    """Gives each example the weight 1, for a task whose labels are not classes."""
    if class_weights is not None:
        raise UserError("optim.class_weights: the labels of this task are not classes; use null")
    return np.ones(len(targets))


def average_logits(
    logits: Sequence[np.ndarray], constants: Sequence[Constants], label_names: list[str]
) -> tuple[np.ndarray, Constants]:
    """The mean of the logits, for a task without constants."""
    return np.stack(logits).astype(np.float64).mean(axis=0), {}


def keep_names(mappings: Mappings, label_names: list[str]) -> tuple[list[str], str]:
    """Writes predictions as they are, for a task whose labels are not classes."""
    return label_names, "holds the predictions of the model"


@dataclass(frozen=True)
class Task:
    """One kind of label. A model has one logit for each label name: C = len(label_names).

    The targets of N examples are an array [N] or [N, C]. Functions that take label names use them in messages and
    tables. The defaults are those of a task whose labels are not classes.
    """

    problem_type: str
    """name of the task in transformers; in config.json of a model it tells pipelines how to read the logits"""
    name_labels: Callable[[LabelColumn], tuple[list[str], str | None]]
    """labels of train -> label names [C], and why the column may be the wrong one"""
    encode: Callable[[LabelColumn, list[str]], tuple[np.ndarray, list[str]]]
    """(labels of a source, label names) -> targets and warnings; a UserError for a label that has no target"""
    make_losses: Callable[[OptimConfig, np.ndarray, list[str]], Losses]
    """(the options of the loss, targets of train, label names) -> the function that computes the losses; a UserError
    for an option that the task does not take"""
    metrics: Mapping[str, Metric]
    """by the names that evaluation.metric accepts; the report draws `loss` and `accuracy` as curves"""
    prediction_columns: Callable[[np.ndarray, list[str]], dict[str, list[Any]]]
    """(logits, label names) -> {column: N values}; the first column is `prediction`"""
    format_targets: Callable[[np.ndarray, list[str]], list[Any]]
    """(targets, label names) -> the `label` column of a predictions table [N]"""

    separator: str | None = None
    """cuts a text label into a list of labels; None = a text is one label"""
    noun: str = "label"
    """what messages call one of the label names: class, label or target"""
    constants: Mapping[str, Range] = field(default_factory=dict)
    """the kinds of constants, and which numbers they may be. `fit` and `find_constants` find them. They are saved in
    adapter/task.json, and `TASKS` makes the task with them"""
    fit: Callable[[np.ndarray, list[str]], Constants] | None = None
    """(targets of train, label names) -> the constants that the loss needs too. They are known before step 1"""
    find_constants: Callable[[np.ndarray, np.ndarray, list[str]], Constants] = lambda logits, targets, names: {}
    """(logits and targets of validation, label names) -> more constants, after training; none without validation"""
    affine: tuple[np.ndarray, np.ndarray] | None = None
    """factor and shift [C], if predictions are numbers: logit * factor + shift. An exported model computes them, and
    TensorBoard draws them over the targets [N, C]"""
    average: Callable[[Sequence[np.ndarray], Sequence[Constants], list[str]], tuple[np.ndarray, Constants]] = (
        average_logits
    )
    """(logits [N, C] of several runs, the constants of each, label names) -> logits and constants that predict the mean
    of what the runs predict"""
    decide: Callable[[np.ndarray], np.ndarray] = lambda logits: logits
    """logits -> the targets that the task predicts"""
    headline: Sequence[str] = ()
    """metrics that the console, the report and summary.json show, beside evaluation.metric; () = all"""
    find_fault: Callable[[np.ndarray, list[str]], str | None] = lambda targets, names: None
    """(targets of train, label names) -> why they cannot train a model; None if they can"""
    strata: Callable[[np.ndarray], np.ndarray] = lambda targets: np.zeros(len(targets), dtype=np.int64)
    """targets -> groups of which the validation split takes equal fractions. The group of each example, int64 [N]; if
    groups overlap, the S groups of each example, at least one, bool [N, S]"""
    example_weights: Callable[[ClassWeights, np.ndarray, list[str]], np.ndarray] = weigh_equally
    """(optim.class_weights, targets, label names) -> weight of each example in the loss, float64 [N]"""
    files: Callable[[np.ndarray, np.ndarray, list[str]], dict[str, str]] = lambda logits, targets, names: {}
    """(logits, targets, label names) -> {name of a file in evaluation/<split>: its text}; the report draws
    confusion_matrix.csv and residuals.csv"""
    output_labels: Callable[[Mappings, list[str]], tuple[list[str], str]] = keep_names
    """(mappings that a contest's file may follow, label names) -> what the column of predictions holds in place of each
    name, and a sentence about that column; `predict --layout full` has no mappings"""
    label_values: Callable[[LabelColumn, list[str]], dict[str, str]] = lambda train, names: {}
    """(labels of train, label names) -> {label: class name}, each class at least once"""
    count_labels: Callable[[np.ndarray, list[str]], dict[str, int]] = lambda targets, names: {}
    """(targets, label names) -> {class: number of examples}"""
    class_scores: Callable[[np.ndarray, np.ndarray, list[str]], dict[str, dict[str, Any]]] = (
        lambda logits, targets, names: {}
    )
    """(logits, targets, label names) -> {label name: {score: number}}; the report shows them as a table"""
    confusion: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None
    """(logits, targets) -> counts, rows true and columns predicted [C, C]; TensorBoard draws them"""


def measure(task: Task, logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> dict[str, Any]:
    """All numbers of a split: each metric of the task, `num_examples` and `per_class`."""
    return {
        **{name: metric.function(logits, targets) for name, metric in task.metrics.items()},
        "num_examples": len(targets),
        "per_class": task.class_scores(logits, targets, label_names),
    }


def metric_value(measured: Mapping[str, Any], name: str) -> float:
    """The metric of a name among the numbers of a split; `f1/CLASS` is the F1 of one class."""
    if name.startswith("f1/"):
        word = name.removeprefix("f1/")
        return float(measured["per_class"][match_labels([word], measured["per_class"])[word]]["f1"])
    return float(measured[name])


def headline_values(task: Task, measured: Mapping[str, Any], metric: str) -> dict[str, float]:
    """The task's headline metrics, and the metric that chooses the best adapter."""
    return {name: metric_value(measured, name) for name in dict.fromkeys((*(task.headline or task.metrics), metric))}


def format_score(value: float) -> str:
    """A score for people: four decimals, or four digits if they would show too little or too much."""
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"


def is_better(task: Task, name: str, value: float, best: float | None) -> bool:
    """Whether a value of a metric beats the best one so far. Any value beats None and NaN."""
    if best is None or math.isnan(best):
        return True
    higher_is_better = name.startswith("f1/") or task.metrics[name].higher_is_better
    return value > best if higher_is_better else value < best

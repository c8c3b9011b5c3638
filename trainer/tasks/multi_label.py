"""Each example has any number of labels. A target is a row of 0 and 1, one for each label, uint8 [N, C].

Always holds: a label is predicted if its probability, the sigmoid of its logit, reaches its threshold. The thresholds
are tuned on the validation split after training, so they change no gradient. Until then all are 0.5.

Averages are over labels that are true or predicted somewhere. A row without labels, true or predicted, counts as right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch

from trainer.config.labels import quoted
from trainer.config.schema import FRACTION, OptimConfig, TaskConfig
from trainer.errors import UserError
from trainer.tasks import classes
from trainer.tasks.task import ClassWeights, Constants, Label, LabelColumn, Losses, Metric, Task

DEFAULT_THRESHOLD = 0.5
DEFAULT_SEPARATOR = "|"
"""joins the labels of a prediction without `task.separator`"""
SEPARATORS = "|;,"
"""that `find_joined` looks for"""
BITS = {"0": False, "false": False, "1": True, "true": True}
"""cells of data.label_columns"""

Decide = Callable[[np.ndarray], np.ndarray]
"""logits [N, C] -> which labels are predicted, bool [N, C]"""

# --- labels -----------------------------------------------------------------------------------------------------------


def separate(column: LabelColumn) -> tuple[LabelColumn, np.ndarray]:
    """Turns lists of labels into a column with an entry for each label of each row.

    Example: rows [a, b], [], [b] -> entries a, b, b of the rows 0, 0, 2

    Returns:
        the column of M entries, and the row of each entry, int64 [M]

    Raises:
        UserError: a row without a list, or an empty item of a list.
    """
    lists = [_list_of(column, code, value) for code, value in enumerate(column.values)]
    texts = list(dict.fromkeys(chain.from_iterable(lists)))
    number = {text: i for i, text in enumerate(texts)}
    codes = np.array([number[text] for text in chain.from_iterable(lists)], dtype=np.int64)
    sizes = np.array(list(map(len, lists)), dtype=np.int64)
    counts, starts = sizes[column.codes], (np.cumsum(sizes) - sizes)[column.codes]
    rows = np.repeat(np.arange(len(column.codes)), counts)
    places = np.arange(len(rows)) - np.repeat(np.cumsum(counts) - counts - starts, counts)

    def describe_row(entry: int) -> str:
        return column.describe_row(int(rows[entry]))

    return dataclasses.replace(column, values=texts, codes=codes[places], describe_row=describe_row), rows


def _list_of(column: LabelColumn, code: int, value: Label) -> list[str]:
    """The labels of the rows with one value of a column: of a list, or of the columns that hold 1."""

    def refuse(reason: str) -> UserError:
        row = column.describe_row(int(np.argmax(column.codes == code)))
        return UserError(f"{column.option}: {column.path}: {row}: {reason}")

    if isinstance(value, str):
        reason = f"column {column.columns[0]!r} holds text ({quoted([value])}), and task.type multi_label needs a list"
        raise refuse(f"{reason}; name what separates labels, as --task.separator '|', or use data.label_columns")
    if len(column.columns) == 1:
        labels = [text for text in value if text is not None]
        if len(labels) < len(value):
            raise refuse(f"column {column.columns[0]!r} has an empty label in its list")
        return labels
    for name, cell in zip(column.columns, value, strict=True):
        if cell is None or cell.lower() not in BITS:
            raise refuse(f"column {name!r} holds {cell or ''!r}; a column of data.label_columns holds 0 or 1")
    return [name for name, cell in zip(column.columns, value, strict=True) if BITS[str(cell).lower()]]


def name_labels(train: LabelColumn, joiner: str) -> tuple[list[str], str | None]:
    """Label names in order, and why the column may not hold labels; columns of 0 and 1 keep their order."""
    entries, _ = separate(train)
    has_own_columns = len(train.columns) > 1 and not train.given_names
    names, doubt = (train.columns, None) if has_own_columns else classes.name_classes(entries, "label")
    if unfit := [name for name in names if joiner in name]:
        raise UserError(
            f"task.separator: label {unfit[0]!r} contains {joiner!r}, which joins the labels of a prediction; "
            "give another, such as --task.separator ';'"
        )
    return names, doubt


def encode(column: LabelColumn, label_names: list[str], separator: str | None) -> tuple[np.ndarray, list[str]]:
    """The targets of each example, uint8 [N, C], and warnings; a UserError for an unknown label."""
    entries, rows = separate(column)
    targets = np.zeros((len(column.codes), len(label_names)), dtype=np.uint8)
    if not len(rows):
        return targets, []
    numbers, warnings = classes.class_numbers(entries, label_names, "label")
    targets[rows, numbers] = 1
    if separator is not None and column.option == "data.train" and not any(len(value) > 1 for value in column.values):
        warnings.append(f"task.separator: {separator!r} separates no labels of column {column.columns[0]!r} of train")
    return targets, warnings


def find_joined(texts: list[str]) -> tuple[str, str] | None:
    """A text that looks like several labels, and its separator: most texts contain it, and their parts repeat."""
    for separator in SEPARATORS:
        joined = [text for text in texts if separator in text]
        parts = {part.strip() for text in texts for part in text.split(separator)}
        if 2 * len(joined) > len(texts) and len(parts) < len(texts):
            return joined[0], separator
    return None


def count_labels(targets: np.ndarray, label_names: list[str]) -> dict[str, int]:
    """{label: number of examples}."""
    return dict(zip(label_names, targets.sum(axis=0).tolist(), strict=True))


def find_fault(targets: np.ndarray, label_names: list[str]) -> str | None:
    """Why no model can be trained with these targets; None if one can."""
    return None if targets.any() else "has no label in any row"


def strata(targets: np.ndarray) -> np.ndarray:
    """A group for each label, the rarest first, then one of the examples without labels; bool [N, C + 1]."""
    ranked = targets[:, np.argsort(targets.sum(axis=0), kind="stable")].astype(bool)
    return np.column_stack([ranked, ~ranked.any(axis=1)])


# --- training ---------------------------------------------------------------------------------------------------------


def make_losses(optim: OptimConfig, targets: np.ndarray, label_names: list[str]) -> Losses:
    """Binary cross-entropy of each example, averaged over the labels; a label that holds has its weight."""
    if optim.label_smoothing:
        raise UserError(
            f"optim.label_smoothing: {optim.label_smoothing} is for task.type single_label; use 0 for multi_label"
        )
    weights = torch.from_numpy(positive_weights(optim.class_weights, targets, label_names))

    def losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, targets.to(logits.dtype), reduction="none", pos_weight=weights.to(logits)
        )
        return each.mean(dim=1)

    return losses


def positive_weights(class_weights: ClassWeights, targets: np.ndarray, label_names: list[str]) -> np.ndarray:
    """Weight in the loss of each label where it holds, float64 [C]; `balanced` makes both answers weigh the same.

    A label that holds for all examples or for none has the weight 1 in `balanced`.
    """
    if class_weights != "balanced":
        return classes.named_weights(class_weights, label_names, "label")
    positives = targets.sum(axis=0, dtype=np.int64)
    negatives = len(targets) - positives
    return np.where((positives > 0) & (negatives > 0), negatives / np.maximum(positives, 1), 1.0)


# --- thresholds -------------------------------------------------------------------------------------------------------


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Sigmoid of each logit in double precision, [N, C]."""
    return np.asarray(np.exp(-np.logaddexp(0, -logits.astype(np.float64))))


def best_threshold(scores: np.ndarray, is_true: np.ndarray) -> float:
    """The threshold of one label with the highest F1, found among all ways to cut the sorted scores.

    It is the middle between the two scores at the cut. Equal scores fall on one side. Of equally good cuts, the one
    nearest to 0.5 counts. A label that all examples have, or none, shows nothing and keeps 0.5.

    Example: scores [0.9, 0.6, 0.2], true [1, 1, 0] -> 0.4
    """
    num_true = int(is_true.sum())
    if num_true in (0, len(is_true)):
        return DEFAULT_THRESHOLD
    order = np.argsort(-scores, kind="stable")
    ranked = np.append(scores[order], 0.0)
    lasts = np.append(np.flatnonzero(ranked[1:-1] < ranked[:-2]), len(scores) - 1)  # of each group of equal scores
    hits = np.cumsum(is_true[order], dtype=np.int64)[lasts]
    f1 = 2 * hits / (lasts + 1 + num_true)
    cuts = lasts[f1 == f1.max()]
    above, below = ranked[cuts], ranked[cuts + 1]
    middles = (above + below) / 2
    thresholds = np.where(middles > below, middles, above)  # neighboring floats have no middle
    return float(thresholds[np.abs(thresholds - DEFAULT_THRESHOLD).argmin()])


def find_constants(logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> Constants:
    """The threshold of each label by the scores of the validation split: {"thresholds": {label: threshold}}."""
    columns = zip(label_names, probabilities(logits).T, targets.T, strict=True)
    return {"thresholds": {name: best_threshold(scores, is_true) for name, scores, is_true in columns}}


def average(
    logits: Sequence[np.ndarray], constants: Sequence[Constants], label_names: list[str]
) -> tuple[np.ndarray, Constants]:
    """Logits whose probabilities are the mean of those of several runs; each threshold is the mean of theirs too."""
    wide = np.stack(logits).astype(np.float64)
    log_yes, log_no = (np.logaddexp.reduce(-np.logaddexp(0, sign * wide)) for sign in (-1, 1))
    default = dict.fromkeys(label_names, DEFAULT_THRESHOLD)
    thresholds = [each.get("thresholds", default) for each in constants]
    means = {name: float(np.mean([each[name] for each in thresholds])) for name in label_names}
    return log_yes - log_no, {"thresholds": means}


# --- metrics ----------------------------------------------------------------------------------------------------------


def _ratio(part: np.ndarray, whole: np.ndarray, empty: float = 0.0) -> np.ndarray:
    return np.where(whole > 0, part / np.maximum(whole, 1), empty)


def _scores(
    true: np.ndarray, predicted: np.ndarray, axis: int | None, empty: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 over an axis: 0 for each label, 1 for each example, None for all together.

    `empty` is the F1 where nothing is true or predicted.
    """
    hits, num_true, num_predicted = ((true & predicted).sum(axis), true.sum(axis), predicted.sum(axis))
    f1 = _ratio(2 * hits, num_true + num_predicted, empty)
    return _ratio(hits, num_predicted), _ratio(hits, num_true), f1


def _macro(logits: np.ndarray, targets: np.ndarray, decide: Decide) -> tuple[float, float, float]:
    """Precision, recall and F1, averaged over the labels that are true or predicted somewhere; 0 without any."""
    true, predicted = targets.astype(bool), decide(logits)
    occurs = (true | predicted).any(axis=0)
    if not occurs.any():
        return 0.0, 0.0, 0.0
    precision, recall, f1 = (score[occurs].mean() for score in _scores(true, predicted, axis=0))
    return float(precision), float(recall), float(f1)


def _average_precision(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean over the labels that occur of the area under precision and recall; 0 without any."""
    from sklearn.metrics import average_precision_score

    present = np.flatnonzero(targets.any(axis=0))
    if not len(present):
        return 0.0
    return float(np.mean([average_precision_score(targets[:, i], logits[:, i]) for i in present]))


def _cross_entropy(logits: np.ndarray, targets: np.ndarray) -> float:
    """Mean binary cross-entropy, without weights."""
    wide = logits.astype(np.float64)
    return float((np.logaddexp(0, wide) - wide * targets).mean())


def make_metrics(decide: Decide) -> dict[str, Metric]:
    """The metrics of predictions that `decide` makes. Loss and average precision do not depend on it."""

    def f1_over(axis: int | None) -> Callable[[np.ndarray, np.ndarray], float]:
        return lambda logits, targets: float(_scores(targets.astype(bool), decide(logits), axis, 1.0)[2].mean())

    higher: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "f1_micro": f1_over(None),
        "f1_macro": lambda logits, targets: _macro(logits, targets, decide)[2],
        "f1_samples": f1_over(1),
        "precision_macro": lambda logits, targets: _macro(logits, targets, decide)[0],
        "recall_macro": lambda logits, targets: _macro(logits, targets, decide)[1],
        "subset_accuracy": lambda logits, targets: float((decide(logits) == targets).all(axis=1).mean()),
        "average_precision_macro": _average_precision,
    }
    metrics = {name: Metric(function, higher_is_better=True) for name, function in higher.items()}
    return metrics | {"loss": Metric(_cross_entropy, higher_is_better=False)}


# --- predictions ------------------------------------------------------------------------------------------------------


def make_task(config: TaskConfig, constants: Constants) -> Task:
    """The task with the thresholds that `find_constants` found; without them all are 0.5."""
    joiner = config.separator or DEFAULT_SEPARATOR
    thresholds = np.array(list(constants.get("thresholds", {}).values()) or DEFAULT_THRESHOLD)

    def decide(logits: np.ndarray) -> np.ndarray:
        return np.asarray(probabilities(logits) >= thresholds)

    def format_targets(targets: np.ndarray, label_names: list[str]) -> list[str]:
        return [joiner.join(label_names[i] for i in np.flatnonzero(row)) for row in targets]

    def prediction_columns(logits: np.ndarray, label_names: list[str]) -> dict[str, list[Any]]:
        shares = zip(label_names, probabilities(logits).T, strict=True)
        return {
            "prediction": format_targets(decide(logits), label_names),
            **{f"probability:{name}": column.tolist() for name, column in shares},
        }

    def class_scores(logits: np.ndarray, targets: np.ndarray, label_names: list[str]) -> dict[str, dict[str, Any]]:
        each = _scores(targets.astype(bool), decide(logits), axis=0)
        limits = np.broadcast_to(thresholds, len(label_names))
        names = ("precision", "recall", "f1", "support", "threshold")
        rows = zip(*(column.tolist() for column in (*each, targets.sum(axis=0), limits)), strict=True)
        return {label: dict(zip(names, row, strict=True)) for label, row in zip(label_names, rows, strict=True)}

    return Task(
        problem_type="multi_label_classification",
        separator=config.separator,
        name_labels=lambda train: name_labels(train, joiner),
        encode=lambda column, names: encode(column, names, config.separator),
        count_labels=count_labels,
        find_fault=find_fault,
        strata=strata,
        make_losses=make_losses,
        example_weights=lambda class_weights, targets, names: np.ones(len(targets)),
        constants={"thresholds": FRACTION},
        find_constants=find_constants,
        average=average,
        decide=decide,
        metrics=make_metrics(decide),
        headline=("f1_micro", "f1_macro", "average_precision_macro", "loss"),
        class_scores=class_scores,
        prediction_columns=prediction_columns,
        format_targets=format_targets,
        output_labels=lambda mappings, names: (names, f"holds the names of labels, joined by {joiner!r}"),
    )

"""What a label is. `TASKS` holds every task, by the name that `task.type` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from trainer.config.labels import quoted
from trainer.config.schema import TaskConfig
from trainer.errors import UserError
from trainer.tasks import multi_label, regression, single_label
from trainer.tasks.task import Constants, LabelColumn, Task

TASKS: dict[str, Callable[[TaskConfig, Constants], Task]] = {
    "single_label": lambda config, constants: single_label.TASK,
    "multi_label": multi_label.make_task,
    "regression": regression.make_task,
}
"""by name: (the task's options, its constants) -> the task"""
MAX_NUMBERED_CLASSES = 20
"""more different numbers than that may be amounts"""

TaskType = Literal["single_label", "multi_label", "regression"]


def find_task(config: TaskConfig, train: LabelColumn) -> TaskConfig:
    """The options with a type. If it is null, the labels of train show it.

    Raises:
        UserError: the labels can be read in two ways.
    """
    if config.type is not None:
        return config
    found: TaskType = "single_label"
    if config.separator is not None:
        found = "multi_label"
    elif config.loss != TaskConfig.loss:
        found = "regression"
    elif len(train.columns) > 1:
        found = _find_task_of_columns(train)
    elif any(isinstance(value, list) for value in train.values):
        found = "multi_label"
    elif not train.given_names and not train.stored_names:
        found = _find_task_of_texts(train)
    return replace(config, type=found)


def _find_task_of_columns(train: LabelColumn) -> TaskType:
    """Columns of 0 and 1 are labels; columns of other numbers are amounts."""
    rows = [value for value in train.values if isinstance(value, list)]
    columns = list(zip(*rows, strict=True))
    are_bits = [all((cell or "").lower() in multi_label.BITS for cell in column) for column in columns]
    if all(are_bits) or not _are_mostly_numbers([cell for row in rows for cell in row]):
        return "multi_label"
    if not any(are_bits):
        return "regression"
    place = are_bits.index(False)
    code = next(code for code, cell in enumerate(columns[place]) if (cell or "").lower() not in multi_label.BITS)
    if regression.read_number(cell := columns[place][code]) is None:
        return "multi_label"  # which names the row
    row = train.describe_row(train.codes.tolist().index(code))
    raise UserError(
        f"{train.option}: {train.path}: {row}: column {train.columns[place]!r} holds {cell!r}; multi_label needs 0 or "
        "1, regression any number; choose --task.type multi_label or --task.type regression"
    )


def _are_mostly_numbers(cells: Sequence[str | None]) -> bool:
    """Whether at most a tenth is something else, which regression then names with its row."""
    return sum(regression.read_number(cell) is not None for cell in cells) >= 0.9 * len(cells)


def _find_task_of_texts(train: LabelColumn) -> TaskType:
    """Many different fractions are amounts; names, and few whole numbers, are classes."""
    texts = train.texts()
    place = f"{train.option}: {train.path}: column {train.columns[0]!r}"
    if joined := multi_label.find_joined(texts):
        text, separator = joined
        is_number = separator == "," and regression.read_number(text.replace(",", ".")) is not None
        hint = "; a number needs a decimal point" if is_number else ""
        raise UserError(
            f"{place}: {quoted([text])} is one class, or several labels; choose --task.type single_label or "
            f"--task.separator {separator!r}{hint}"
        )
    numbers = [number for text in texts if (number := regression.read_number(text)) is not None]
    fractions = [number for number in numbers if not number.is_integer()]
    is_varied = len(texts) > MAX_NUMBERED_CLASSES
    if not _are_mostly_numbers(texts) or (not fractions and not is_varied):
        return "single_label"
    if fractions and (is_varied or len(texts) > max(4, len(train.codes) // 2)):
        return "regression"
    shown = f"{fractions[0] if fractions else numbers[0]:g}"
    raise UserError(
        f"{place}: its {len(texts)} different numbers, such as {shown}, are classes or amounts; choose "
        "--task.type single_label or --task.type regression"
    )


def make_task(config: TaskConfig, constants: Constants | None = None) -> Task:
    """The task of a configuration that names its type. Without constants it has their defaults."""
    assert config.type is not None, "the labels of train choose it"
    return TASKS[config.type](config, constants or {})


def check_constants(config: TaskConfig, constants: Mapping[str, Any], label_names: list[str]) -> Constants:
    """The constants that a finished run saved, in the order of its label names.

    Raises:
        UserError: a constant is missing, or is not one number in its range for each label name.
    """
    task = make_task(config)
    missing = sorted(task.constants.keys() - constants.keys())
    if missing and task.fit is not None:
        raise UserError(f"{missing[0]!r} is missing; copy the file again")
    ordered = {}
    for kind, limits in task.constants.items():
        if kind in missing:
            continue
        values = constants[kind]
        if not isinstance(values, dict) or values.keys() != set(label_names):
            raise UserError(f"{kind!r} must have one number for each of {quoted(label_names)}")
        for name, value in values.items():
            if type(value) not in (int, float) or not limits["accepts"](value):
                raise UserError(f"{kind!r} of {name!r} is {value!r}; it must be {limits['range']}")
        ordered[kind] = {name: float(values[name]) for name in label_names}
    return ordered

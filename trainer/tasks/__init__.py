"""What a label is. `TASKS` holds every task, by the name that `task.type` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from trainer.config.schema import TaskConfig
from trainer.tasks import multi_label, single_label
from trainer.tasks.task import LabelColumn, Task

TASKS: dict[str, Callable[[TaskConfig, Mapping[str, Any]], Task]] = {
    "single_label": lambda config, constants: single_label.TASK,
    "multi_label": multi_label.make_task,
}
"""by name: (the task's options, its constants) -> the task; `Task.find_constants` finds the constants"""


def find_task(config: TaskConfig, train: LabelColumn) -> tuple[TaskConfig, str | None]:
    """The options with a type, and a warning if the labels may show another.

    If the type is null, lists of labels and a separator show multi_label.
    """
    if config.type is not None:
        return config, None
    has_lists = any(isinstance(value, list) for value in train.values)
    found: Literal["multi_label", "single_label"] = "multi_label" if has_lists or config.separator else "single_label"
    return replace(config, type=found), multi_label.suggest_separator(train)


def make_task(config: TaskConfig, constants: Mapping[str, Any] | None = None) -> Task:
    """The task of a configuration that names its type. Without constants it has their defaults."""
    assert config.type is not None, "the labels of train choose it"
    return TASKS[config.type](config, constants or {})

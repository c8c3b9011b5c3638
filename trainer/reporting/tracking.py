"""Logs a run: numbers to Accelerate's trackers and metrics.jsonl, lines and a progress bar to the console.

metrics.jsonl has the numbers of each step once, also after a resume. A tracker that fails is named once, and stops
neither the run nor another tracker.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from tqdm import tqdm

from trainer.errors import bar_settings, one_line, visible
from trainer.files import read_json_lines, write_atomic, writing

PROJECT = "isotrain"  # project or experiment in a tracker, unless the tracker's environment variable names another
MAX_FAILURES = 3  # in a row: then a tracker is skipped, because each may wait minutes for a server
_RUN_IDS: dict[str, Callable[[Any], str]] = {"wandb": lambda run: run.id, "mlflow": lambda run: run.info.run_id}
"""the id of a tracker's run, with which a later start resumes it"""


class RunLog:
    """The log of one run, written by the main process. On other ranks every method does nothing.

    Call `open` first and `close` last. `log_scalars` writes to metrics.jsonl and the trackers. `print_line` prints
    above the progress bar.
    """

    def __init__(self, folder: Path, is_main: bool, quiet: bool) -> None:
        self.folder = folder
        self.is_main = is_main
        self.quiet = quiet or not self.is_main
        self._bar: tqdm | None = None
        self._trackers: list[Any] = []
        self._failed: dict[str, int] = {}

    def open(
        self, backends: Sequence[str], step: int, evaluated_step: int, total_steps: int, config: Mapping[str, Any]
    ) -> None:
        """Starts at `step`. Drops what an interrupted run logged after it, so that no step is logged twice."""
        if not self.is_main:
            return
        kept = keep_steps(self.folder / "metrics.jsonl", step, evaluated_step)
        # an evaluation of this step may be in the trackers and will be repeated, so the step is dropped and rewritten
        first = step if evaluated_step < step else step + 1
        for name in dict.fromkeys(backends):
            self._call_safely(name, self._start_tracker, name, first, config)
        text = "".join(f"    {line}\n" for line in json.dumps(config, indent=2, ensure_ascii=False).splitlines())
        self._write_tensorboard(lambda board: board.add_text("config", text, first))
        boards = [tracker for tracker in self._trackers if tracker.name == "tensorboard"]  # only it can drop steps
        for line in kept:
            if line["step"] >= first:
                self._log({tag: value for tag, value in line.items() if "/" in tag}, line["step"], boards)
        bar = {"total": total_steps, "initial": step, "desc": "training", "unit": "step", "disable": self.quiet}
        self._bar = tqdm(**bar, **bar_settings())

    def log_scalars(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        """Logs the values of a step, by tag `group/name`."""
        self._append_record(values, step, epoch)
        self._log(values, step, self._trackers)

    def log_confusion_matrix(self, tag: str, counts: npt.NDArray[Any], label_names: Sequence[str], step: int) -> None:
        """Adds a confusion matrix to TensorBoard as a figure."""

        def draw(board: Any) -> None:
            from trainer.reporting.figures import confusion_matrix_figure  # imports matplotlib after the first step

            board.add_figure(tag, confusion_matrix_figure(counts, label_names), step)

        self._write_tensorboard(draw)

    def log_residuals(
        self, tag: str, true: npt.NDArray[Any], predicted: npt.NDArray[Any], label_names: Sequence[str], step: int
    ) -> None:
        """Adds predicted over true numbers, [N, C] each, to TensorBoard as a figure."""

        def draw(board: Any) -> None:
            from trainer.reporting.figures import residuals_figure  # imports matplotlib after the first step

            board.add_figure(tag, residuals_figure(true, predicted, label_names), step)

        self._write_tensorboard(draw)

    def log_final_metrics(
        self, config: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float], step: int, epoch: float
    ) -> None:
        """Logs the final metrics (`final/...`). TensorBoard also gets the configuration, for its table of runs.

        Trackers get them one step after the last. If the run is killed before its end, the next start drops them.
        """
        self._append_record(metrics, step, epoch)
        table_row = _flatten(config), dict(metrics)
        self._write_tensorboard(lambda board: board.add_hparams(*table_row, run_name=".", global_step=step + 1))
        self._log(metrics, step + 1, [tracker for tracker in self._trackers if tracker.name != "tensorboard"])

    def advance_bar(self, steps: int, **shown: str) -> None:
        """Advances the progress bar and shows the values next to it."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(steps)

    def print_line(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if not self.quiet:
            tqdm.write(visible(line), file=sys.stderr)

    def bar_label(self, label: str) -> str | None:
        """Returns the label of a second progress bar, or None (no bar) without a terminal."""
        return None if self.quiet or not sys.stderr.isatty() else label

    def close_bar(self) -> None:
        """Removes the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Closes the progress bar and the trackers."""
        self.close_bar()
        # accelerate's end_training would also destroy the process group of all ranks
        for tracker in self._trackers:
            self._call_safely(tracker.name, tracker.finish)

    def _append_record(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        """Appends a line to metrics.jsonl."""
        if not self.is_main:
            return
        line, path = {"step": step, "epoch": round(epoch, 6), **values}, self.folder / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _log(self, values: Mapping[str, float], step: int, trackers: Sequence[Any]) -> None:
        for tracker in trackers:
            given = dict(values)
            if tracker.name == "mlflow":  # one invalid character in a name makes it refuse all values of the step
                given = {re.sub(r"[^\w /.:-]", "_", tag): value for tag, value in values.items()}
            self._call_safely(tracker.name, tracker.log, given, step)

    def _start_tracker(self, name: str, first: int, config: Mapping[str, Any]) -> None:
        """Starts a tracker. Resumes its run of an earlier start if the tracker can do that."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind, path = LOGGER_TYPE_TO_CLASS[name], self.folder / "trackers.json"
        try:
            ids = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # the first start, or a damaged file
            ids = {}
        project = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        location = (self.folder.name, str(self.folder.parent)) if kind.requires_logging_directory else (project,)
        tracker = kind(*location, **_tracker_settings(name, self.folder, ids.get(name), first))
        tracker.start()
        self._trackers.append(tracker)
        if name in _RUN_IDS:
            write_atomic(path, json.dumps({**ids, name: str(_RUN_IDS[name](tracker.tracker))}) + "\n")
        if name != "tensorboard" and (name != "mlflow" or name not in ids):  # MLflow parameters are final
            tracker.store_init_configuration(_flatten(config))

    def _write_tensorboard(self, write: Callable[[Any], Any]) -> None:
        def add(board: Any) -> None:
            write(board)
            board.flush()

        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                self._call_safely("tensorboard", add, tracker.writer)

    def _call_safely(self, name: str, action: Callable[..., Any], *arguments: Any) -> None:
        failures = self._failed.get(name, 0)
        if failures == MAX_FAILURES:
            return
        try:
            action(*arguments)
        except (Exception, SystemExit) as error:
            if name not in self._failed:
                self.print_line(f"warning: {name} failed and may miss values: {one_line(error)}")
            self._failed[name] = failures + 1
        else:
            self._failed.update({name: 0} if failures else {})


def keep_steps(path: Path, last_step: int, last_evaluated_step: int) -> list[dict[str, Any]]:
    """Drops lines that will be repeated or are damaged: later steps, final metrics, a torn line. Returns the others."""
    kept = []
    for record in read_json_lines(path):
        groups = {tag.partition("/")[0] for tag in record}
        if "final" not in groups and record["step"] <= (last_evaluated_step if "validation" in groups else last_step):
            kept.append(record)
    if path.exists():
        write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def _flatten(config: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | int | float | str]:
    """Flattens the configuration for trackers: {"group.field": value}, with lists, mappings and null as text."""
    flat = {f"{group}.{key}": value for group, values in config.items() for key, value in values.items()}
    return {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in flat.items()}


def _tracker_settings(name: str, folder: Path, run_id: str | None, first: int) -> dict[str, Any]:
    """Returns the arguments of a tracker: the run's name, and the id of its run of an earlier start."""
    settings: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": first},  # drops everything from this step on
        "wandb": {"name": os.environ.get("WANDB_NAME", folder.name), "id": run_id, "resume": "allow"},
        "mlflow": {"run_name": folder.name, "run_id": run_id},
        "swanlab": {"experiment_name": folder.name},
        "trackio": {"name": folder.name},
        "clearml": {"task_name": folder.name},
        "dvclive": {"dir": str(folder / "dvclive")},
    }
    return {key: value for key, value in settings.get(name, {}).items() if value is not None}

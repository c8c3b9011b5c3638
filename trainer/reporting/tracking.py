"""What a run tells while it goes: numbers to Accelerate's trackers and metrics.jsonl, lines and a bar to the console.

Always holds: metrics.jsonl has each step's numbers once, also after a resume; a tracker that fails is named once and
never stops a run or another tracker.
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

from trainer.errors import bar_settings
from trainer.files import write_atomic, writing

PROJECT = "isotrain"
"""project or experiment of a tracker that has such, unless its own environment variable names another"""
GIVE_UP = 3
"""failures in a row after which a tracker is left out: each may wait minutes for a server"""
# How a tracker names its run, so that a later start can continue it.
_RUN_IDS: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "mlflow": lambda run: run.info.run_id,
    "comet_ml": lambda run: run.get_key(),
    "swanlab": lambda run: run.id,
    "trackio": lambda run: run.name,
    "aim": lambda run: run.hash,
    "dvclive": lambda run: run.dir,
}


class RunLog:
    """The numbers of one run, written by the main process only; on the other ranks every method does nothing.

    `open` starts it at a step, `close` ends it. Between them `scalars` adds a line to metrics.jsonl and the same values
    to the trackers; `say` prints a line above the progress bar.
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
        """Starts at `step`: what an interrupted run wrote beyond it is dropped, so no step stands twice."""
        if not self.is_main:
            return
        kept = keep_steps(self.folder / "metrics.jsonl", step, evaluated_step)
        # an evaluation of this very step may be in the trackers and is to come again: the step is voided and rewritten
        first = step if evaluated_step < step else step + 1
        for name in dict.fromkeys(backends):
            self._guarded(name, self._start_tracker, name, first, config)
        text = "".join(f"    {line}\n" for line in json.dumps(config, indent=2, ensure_ascii=False).splitlines())
        self._with_tensorboard(lambda board: board.add_text("config", text, first))
        boards = [tracker for tracker in self._trackers if tracker.name == "tensorboard"]  # others void nothing
        for line in kept:
            if line["step"] >= first:
                self._log({tag: value for tag, value in line.items() if "/" in tag}, line["step"], boards)
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            desc="training",
            unit="step",
            disable=self.quiet,
            **bar_settings(),
        )

    def scalars(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        """Adds values, tagged as `group/name`, at a step."""
        if not self.is_main:
            return
        self._record(values, step, epoch)
        self._log(values, step, self._trackers)

    def confusion_matrix(self, tag: str, counts: npt.NDArray[Any], label_names: Sequence[str], step: int) -> None:
        """Adds the confusion matrix as a figure to TensorBoard."""

        def draw(board: Any) -> None:
            from trainer.reporting.figures import (
                confusion_matrix_figure,  # matplotlib can wait until the first step is done
            )

            board.add_figure(tag, confusion_matrix_figure(counts, label_names), step)

        self._with_tensorboard(draw)

    def finals(
        self, config: Mapping[str, Mapping[str, Any]], metrics: Mapping[str, float], step: int, epoch: float
    ) -> None:
        """Adds the final metrics (`final/...`), in TensorBoard's table of runs beside the flattened configuration.

        Trackers get them one step behind the last: where the run is killed before its end, the next start voids them.
        """
        if not self.is_main:
            return
        self._record(metrics, step, epoch)
        plain = _plain(config)

        def add(board: Any) -> None:
            from torch.utils.tensorboard.summary import hparams

            # what SummaryWriter.add_hparams does, but in the same file: TensorBoard reads files in the order of the
            # times in their names, so that a second one would come first where the clock has been set back
            for summary in hparams(plain, dict(metrics)):
                board.file_writer.add_summary(summary, step + 1)
            for tag, value in metrics.items():
                board.add_scalar(tag, value, step + 1)

        self._with_tensorboard(add)
        self._log(metrics, step + 1, [tracker for tracker in self._trackers if tracker.name != "tensorboard"])

    def progress(self, steps: int, **shown: str) -> None:
        """Moves the bar; `shown` stands behind it."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(steps)

    def say(self, line: str) -> None:
        """One line for the user, above the bar."""
        if not self.quiet:
            tqdm.write(line, file=sys.stderr)

    def bar_label(self, label: str) -> str | None:
        """The label for a short bar below the training's; None (no bar) where nobody looks at a terminal."""
        return None if self.quiet or not sys.stderr.isatty() else label

    def end_progress(self) -> None:
        """Takes the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """Ends bar and trackers."""
        self.end_progress()
        # not accelerate's end_training, which would take the process group away from the others as well
        for tracker in self._trackers:
            self._guarded(tracker.name, tracker.finish)

    def _record(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        """Adds a line to metrics.jsonl."""
        line, path = {"step": step, "epoch": round(epoch, 6), **values}, self.folder / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _log(self, values: Mapping[str, float], step: int, trackers: Sequence[Any]) -> None:
        for tracker in trackers:
            # MLflow refuses all values of a step for a character that it does not allow in one name
            allowed = {re.sub(r"[^\w /.:-]", "_", tag): v for tag, v in values.items()}
            given = allowed if tracker.name == "mlflow" else dict(values)
            self._guarded(tracker.name, tracker.log, given, step)

    def _start_tracker(self, name: str, first: int, config: Mapping[str, Any]) -> None:
        """Starts a tracker. It goes on with its run of an earlier start, as far as it can do that."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind, path = LOGGER_TYPE_TO_CLASS[name], self.folder / "trackers.json"
        try:
            ids = dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # the first start, or a file that no training needs
            ids = {}
        named = os.environ.get(f"{name.upper()}_PROJECT", PROJECT)
        place = (self.folder.name, str(self.folder.parent)) if kind.requires_logging_directory else (named,)
        tracker = kind(*place, **_tracker_settings(name, self.folder, ids.get(name), first))
        tracker.start()
        self._trackers.append(tracker)
        if name in _RUN_IDS:
            write_atomic(path, json.dumps({**ids, name: str(_RUN_IDS[name](tracker.tracker))}) + "\n")
        if name != "tensorboard" and (name != "mlflow" or name not in ids):  # MLflow lets nobody change a parameter
            tracker.store_init_configuration(_plain(config))

    def _with_tensorboard(self, write: Callable[[Any], Any]) -> None:
        def add(board: Any) -> None:
            write(board)
            board.flush()

        for tracker in self._trackers:
            if tracker.name == "tensorboard":
                self._guarded("tensorboard", add, tracker.writer)

    def _guarded(self, name: str, action: Callable[..., Any], *arguments: Any) -> None:
        failures = self._failed.get(name, 0)
        if failures == GIVE_UP:
            return
        try:
            action(*arguments)
        except (Exception, SystemExit) as error:  # a tracker is never worth a run
            if name not in self._failed:
                self.say(f"warning: {name} failed and may miss values: {' '.join(str(error).split())[:240]}")
            self._failed[name] = failures + 1
        else:
            self._failed.update({name: 0} if failures else {})


def keep_steps(path: Path, last_step: int, last_evaluated_step: int) -> list[dict[str, Any]]:
    """Drops what is to be written again: lines beyond these steps, final metrics, a torn line. Returns the others."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            values = json.loads(line)
            last = last_evaluated_step if any(tag.startswith("validation/") for tag in values) else last_step
            if values["step"] <= last and not any(tag.startswith("final/") for tag in values):
                kept.append(values)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    write_atomic(path, "".join(json.dumps(values) + "\n" for values in kept))
    return kept


def _plain(config: Mapping[str, Mapping[str, Any]]) -> dict[str, bool | int | float | str]:
    """The configuration as trackers take it: {"group.field": value}, with lists, mappings and null as text."""
    flat = {f"{group}.{key}": value for group, values in config.items() for key, value in values.items()}
    return {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in flat.items()}


def _tracker_settings(name: str, folder: Path, run_id: str | None, first: int) -> dict[str, Any]:
    """What a tracker is started with: the run's name, and the id of its run of an earlier start."""
    settings: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": first},  # its way to say that what was written from this step on is void
        "wandb": {"name": os.environ.get("WANDB_NAME", folder.name), "id": run_id, "resume": "allow"},
        "mlflow": {"run_name": folder.name, "run_id": run_id},
        "comet_ml": {"experiment_key": run_id, "mode": "get_or_create"},
        "swanlab": {"experiment_name": folder.name, "id": run_id, "resume": "allow"},
        "trackio": {"name": folder.name, "resume": "allow" if run_id else "never"},
        "aim": {"run_hash": run_id, "experiment": PROJECT},
        "clearml": {"task_name": folder.name},
        "dvclive": {"dir": str(folder / "dvclive"), "resume": run_id is not None},
    }
    return {key: value for key, value in settings.get(name, {}).items() if value is not None}

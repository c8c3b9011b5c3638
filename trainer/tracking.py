"""What a run tells while it goes: numbers to Accelerate's trackers and metrics.jsonl, lines and a bar to the console.

Always holds: metrics.jsonl has each step's numbers once, also after a resume; a tracker that fails is named once and
never stops a run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
from tqdm import tqdm

if TYPE_CHECKING:
    from accelerate import Accelerator


class RunLog:
    """The numbers of one run, written by the main process only; on the other ranks every method does nothing.

    `open` starts it at a step, `close` ends it. Between them `scalars` adds a line to metrics.jsonl and the same values
    to the trackers; `say` prints a line above the progress bar.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, quiet: bool) -> None:
        self.folder = folder
        self.accelerator = accelerator
        self.is_main = accelerator.is_main_process
        self.quiet = quiet or not self.is_main
        self._bar: tqdm | None = None
        self._failed: set[str] = set()

    def open(
        self, backends: Sequence[str], step: int, evaluated_step: int, total_steps: int, config: Mapping[str, Any]
    ) -> None:
        """Starts at `step`: what an interrupted run wrote beyond it is dropped, so no step stands twice."""
        if not self.is_main:
            return
        kept = keep_steps(self.folder / "metrics.jsonl", step, evaluated_step)
        # an evaluation of this very step may be in the trackers and is to come again: the step is voided and rewritten
        first = step if evaluated_step < step else step + 1
        self._guarded("trackers", lambda: self._start_trackers(backends, first, config))
        for values in kept:
            if values["step"] >= first:
                self._track(values)
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=self.quiet,
            # a log file gets a line now and then, a terminal a moving bar
            mininterval=0.2 if sys.stderr.isatty() else 30,
        )

    def scalars(self, values: Mapping[str, float], step: int, epoch: float) -> None:
        """Adds values, tagged as `group/name`, at a step."""
        if not self.is_main:
            return
        self._track(self._recorded(values, step, epoch))

    def confusion_matrix(self, tag: str, counts: npt.NDArray[Any], label_names: Sequence[str], step: int) -> None:
        """Adds the confusion matrix as a figure to TensorBoard."""

        def draw(board: Any) -> None:
            from trainer.figures import confusion_matrix_figure  # matplotlib can wait until the first step is done

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
        self._recorded(metrics, step, epoch)
        flat = {f"{group}.{key}": value for group, values in config.items() for key, value in values.items()}
        plain = {key: v if isinstance(v, bool | int | float | str) else json.dumps(v) for key, v in flat.items()}

        def add(board: Any) -> None:
            from torch.utils.tensorboard.summary import hparams

            # what SummaryWriter.add_hparams does, but in the same file: TensorBoard reads files in the order of the
            # times in their names, so that a second one would come first where the clock has been set back
            for summary in hparams(plain, dict(metrics)):
                board.file_writer.add_summary(summary, step + 1)
            for tag, value in metrics.items():
                board.add_scalar(tag, value, step + 1)

        self._with_tensorboard(add)
        for tracker in self.accelerator.trackers:
            if tracker.name != "tensorboard":
                self._guarded(tracker.name, partial(tracker.log, dict(metrics), step=step + 1))

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
        for tracker in self.accelerator.trackers if self.is_main else []:
            self._guarded("trackers", tracker.finish)

    def _recorded(self, values: Mapping[str, float], step: int, epoch: float) -> dict[str, float]:
        """Adds a line to metrics.jsonl; returns it."""
        line = {"step": step, "epoch": round(epoch, 6), **values}
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return line

    def _track(self, line: Mapping[str, Any]) -> None:
        """Gives a line of metrics.jsonl to the trackers."""
        values = {tag: value for tag, value in line.items() if "/" in tag}
        self._guarded("trackers", lambda: self.accelerator.log(values, step=line["step"]))

    def _start_trackers(self, backends: Sequence[str], first: int, config: Mapping[str, Any]) -> None:
        # TensorBoard's own way to say that what was written from this step on is void
        settings = {"tensorboard": {"purge_step": first}} if "tensorboard" in backends else {}
        self.accelerator.init_trackers(self.folder.name, init_kwargs=settings)
        text = "".join(f"    {line}\n" for line in json.dumps(config, indent=2, ensure_ascii=False).splitlines())
        self._with_tensorboard(lambda board: board.add_text("config", text, first))

    def _with_tensorboard(self, write: Callable[[Any], Any]) -> None:
        def add() -> None:
            for tracker in self.accelerator.trackers:
                if tracker.name == "tensorboard":
                    write(tracker.writer)
                    tracker.writer.flush()

        if self.is_main:
            self._guarded("tensorboard", add)

    def _guarded(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a tracker is never worth a run
            if name not in self._failed:
                self._failed.add(name)
                self.say(f"warning: {name} failed and may miss values: {error}")


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
    temporary = path.with_suffix(".unfinished")
    temporary.write_text("".join(json.dumps(values) + "\n" for values in kept), encoding="utf-8")
    temporary.replace(path)
    return kept

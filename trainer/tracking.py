"""What a run tells while it goes: numbers to Accelerate's trackers and metrics.jsonl, lines and a bar to the console.

Always holds: metrics.jsonl has each step's numbers once, also after a resume; a tracker that fails is named once and
never stops a run. A figure is a `matplotlib.figure.Figure` of its own (no pyplot, so no global list of open figures and
no window system), and a label is drawn as the characters it consists of, never parsed as mathematics.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from tqdm import tqdm

if TYPE_CHECKING:  # the report imports this module too, and needs no torch
    from accelerate import Accelerator

INK, PALE = "#1f2933", "#9aa5b1"
# White to deep blue, even in lightness: reads the same to colour-blind readers and on a grey printer.
SHARE_COLORS = LinearSegmentedColormap.from_list("share", ["#f6f8fb", "#b9d3ea", "#5b9bcb", "#1f6aa5", "#0b3c6b"])
MAX_COUNTED_CLASSES = 30  # above this the counts would be too small to read, so colour alone speaks
MAX_FIGURE_INCHES = 20.0


def figure_label(text: str, max_length: int = 24) -> str:
    """Makes any text fit to be drawn: one line, only characters the font has, the middle cut out where it is too long.

    The middle goes because names that share a beginning ("comp.sys.mac", "comp.sys.ibm") differ at the end.
    """
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    line = "".join(char if font.get_char_index(ord(char)) else "\ufffd" for char in " ".join(text.split()))
    if len(line) <= max_length:
        return line
    head = max_length // 2
    return f"{line[:head]}…{line[len(line) - (max_length - head - 1) :]}"


def confusion_matrix_figure(matrix: npt.NDArray[Any], labels: Sequence[str]) -> Figure:
    """Draws a confusion matrix: a cell's colour is its share of the true class, its number the count of examples.

    Up to `MAX_COUNTED_CLASSES` classes the counts are printed; the figure grows with the classes up to
    `MAX_FIGURE_INCHES` on a side.

    Args:
        matrix: counts, rows true and columns predicted, [C, C].
        labels: class names in the order of the rows, [C]. Any text: long ones are shortened.

    Raises:
        ValueError: the matrix is not square or has another size than `labels`.
    """
    num_classes = len(labels)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"a confusion matrix of {num_classes} labels cannot have the shape {matrix.shape}")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)  # a class without examples is a row of zeros
    side = min(3.4 + 0.42 * num_classes, MAX_FIGURE_INCHES)
    font_size = float(np.clip(0.6 * 72 * (side - 2.5) / num_classes, 4.0, 9.0))

    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    colors = PowerNorm(0.5, vmin=0, vmax=1)  # confusions are small shares: spread those out
    image = axes.imshow(shares, cmap=SHARE_COLORS, norm=colors, interpolation="nearest")
    names = [figure_label(label) for label in labels]
    upright = num_classes <= 6 and max(map(len, names), default=0) <= 10
    axes.set_xticks(range(num_classes), names, parse_math=False, fontsize=font_size, rotation=0 if upright else 90)
    axes.set_yticks(range(num_classes), names, parse_math=False, fontsize=font_size)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    axes.tick_params(length=0, colors=INK)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, shrink=min(0.6, 3 / side), pad=0.02, ticks=[0, 0.1, 0.5, 1], format="{x:.0%}")
    bar.set_label("share of the true class", color=INK, fontsize=8)
    bar.ax.tick_params(length=0, labelsize=8, colors=INK)
    bar.outline.set_visible(False)

    if num_classes <= MAX_COUNTED_CLASSES:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if colors(shares[row, column]) > 0.6 else INK if count else PALE
            axes.text(column, row, f"{count:,}", ha="center", va="center_baseline", fontsize=font_size, color=color)
    return figure


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
        self._with_tensorboard(lambda board: board.add_figure(tag, confusion_matrix_figure(counts, label_names), step))

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

"""The figures of a run and its report.

Each figure is its own `matplotlib.figure.Figure`; pyplot would need global state and a window system. Labels are drawn
literally, never parsed as mathematics.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType

INK, PALE = "#1f2933", "#9aa5b1"
# White to dark blue with even lightness: also readable for color-blind readers and in gray print.
SHARE_COLORS = LinearSegmentedColormap.from_list("share", ["#f6f8fb", "#b9d3ea", "#5b9bcb", "#1f6aa5", "#0b3c6b"])
MAX_COUNTED_CLASSES = 30  # with more classes the counts would be too small to read
MAX_FIGURE_INCHES = 20.0
MAX_SHOWN_TARGETS = 8  # of a regression
BLUE, VERMILION, GREEN, GRAY = "#0072b2", "#d55e00", "#00805e", "#6b7785"  # Okabe and Ito, for color-blind readers
STYLE: dict[RcKeyType, Any] = {
    "axes.edgecolor": "#9aa5b1",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.xmargin": 0.02,
    "figure.constrained_layout.use": True,
    "grid.color": "#e4e8ee",
    "text.parse_math": False,
    "text.usetex": False,
    "xtick.color": "#9aa5b1",
    "xtick.labelcolor": INK,
    "ytick.major.size": 0,
}

# Panels of a figure: tag, title, color, number format.
LEARNING_RATE = [("train/learning_rate", "learning rate, highest {highest:.2g}", BLUE, ".2g")]
THROUGHPUT = [
    ("speed/examples_per_second", "examples / s, median {median:,.0f}", BLUE, ",.0f"),
    ("speed/tokens_per_second", "tokens / s, median {median:,.0f}", GREEN, ",.0f"),
    ("speed/padding_fraction", "padding fraction, median {median:.1%}", VERMILION, ".1%"),
]

Floats = npt.NDArray[np.float64]
Record = Mapping[str, Any]


def figure_label(text: str, max_length: int = 24) -> str:
    """Makes a text drawable: one line, only characters of the font, without the middle if it is too long.

    Names with a common beginning ("comp.sys.mac", "comp.sys.ibm") differ at the end, so the end stays.
    """
    font = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    line = "".join(char if font.get_char_index(ord(char)) else "\ufffd" for char in " ".join(text.split()))
    if len(line) <= max_length:
        return line
    head = max_length // 2
    return f"{line[:head]}…{line[len(line) - (max_length - head - 1) :]}"


def confusion_matrix_figure(matrix: npt.NDArray[Any], labels: Sequence[str]) -> Figure:
    """Draws a confusion matrix. Colors show shares of the true class, numbers show counts of examples.

    Args:
        matrix: counts, rows true and columns predicted, [C, C].
        labels: class names in the order of the rows, [C].
    """
    num_classes = len(labels)
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"a confusion matrix of {num_classes} labels cannot have the shape {matrix.shape}")
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)  # zeros for a class without examples
    side = min(3.4 + 0.42 * num_classes, MAX_FIGURE_INCHES)
    font_size = float(np.clip(0.6 * 72 * (side - 2.5) / num_classes, 4.0, 9.0))

    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.add_subplot()
    colors = PowerNorm(0.5, vmin=0, vmax=1)  # spreads the small shares of confusions
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


def residuals_figure(true: npt.NDArray[Any], predicted: npt.NDArray[Any], names: Sequence[str]) -> Figure:
    """Draws predicted numbers over true ones, and errors over predicted ones, a row for each target.

    Args:
        true: [N, C].
        predicted: [N, C].
        names: of the targets, [C]; the first `MAX_SHOWN_TARGETS` are drawn.
    """
    names = names[:MAX_SHOWN_TARGETS]
    figure = Figure(figsize=(10.4, 4.0 * len(names)))
    grid = figure.subplots(len(names), 2, squeeze=False)
    alpha = float(np.clip(200 / max(len(true), 1), 0.05, 0.6))
    for (left, right), name, x, y in zip(grid, names, true.T, predicted.T, strict=False):
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        left.plot(ends, ends, color=GRAY, linestyle=":", linewidth=1)
        left.plot(x, y, ".", color=BLUE, alpha=alpha, rasterized=True)
        left.set_xlabel(f"true {figure_label(name)}", parse_math=False)
        left.set_ylabel(f"predicted {figure_label(name)}", parse_math=False)
        right.axhline(0, color=GRAY, linestyle=":", linewidth=1)
        right.plot(y, y - x, ".", color=VERMILION, alpha=alpha, rasterized=True)
        right.set_xlabel(f"predicted {figure_label(name)}", parse_math=False)
        right.set_ylabel("predicted - true")
    return figure


def select_values(records: Sequence[Record], tag: str) -> tuple[Floats, Floats]:
    """Returns the steps and the finite values of a tag, [N] each."""
    points = [(record["step"], record[tag]) for record in records if isinstance(record.get(tag), int | float)]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def smooth(values: Floats) -> Floats:
    """Averages each value with its neighbors, 5 % of all values."""
    window = np.ones(len(values) // 20 | 1)
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")


def loss_figure(records: Sequence[Record]) -> Figure | None:
    """Draws the training loss, raw and smoothed, and the validation loss."""
    steps, losses = select_values(records, "train/loss")
    if not len(steps):
        return None
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
    smoothed = smooth(losses)
    axes.plot(steps, smoothed, color=BLUE, linewidth=2)
    names = [(smoothed[-1], f"train {smoothed[-1]:.3f}", BLUE)]
    names += _plot_points(axes, records, "validation/loss", "validation", VERMILION, ".3f")
    _label_lines(axes, records, names)
    return figure


def accuracy_figure(records: Sequence[Record], best_step: int, test_accuracy: float | None) -> Figure | None:
    """Draws validation accuracy and macro-F1, or correlations; the best step, and a line for the test accuracy."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.add_subplot(xlabel="step", ylabel="validation score")
    names = _plot_points(axes, records, "validation/f1_macro", "macro-F1", VERMILION, ".1%")
    names += _plot_points(axes, records, "validation/accuracy", "accuracy", BLUE, ".1%")
    correlations = _plot_points(axes, records, "validation/spearman", "Spearman", VERMILION, ".3f")
    correlations += _plot_points(axes, records, "validation/pearson", "Pearson", BLUE, ".3f")
    names += correlations
    if not names:
        return None
    if test_accuracy is not None:
        axes.axhline(test_accuracy, color=GREEN, linestyle=(0, (4, 3)), linewidth=1.5)
        names.append((test_accuracy, f"test {test_accuracy:.1%}", GREEN))
    steps, values = select_values(records, "validation/accuracy")
    for best in values[steps == best_step]:
        axes.axvline(best_step, color=GRAY, linestyle=":", linewidth=1)
        axes.plot(best_step, best, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK)
        axes.text(
            best_step, 0.02, f"best: step {best_step} ", transform=axes.get_xaxis_transform(), ha="right", fontsize=9
        )
    axes.margins(y=0.18)
    if not correlations:
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _label_lines(axes, records, names)
    return figure


def panels_figure(records: Sequence[Record], panels: Sequence[tuple[str, str, str, str]]) -> Figure | None:
    """Draws panels (see THROUGHPUT) one above the other, because their units differ. Skips panels without values."""
    present = [panel for panel in panels if len(select_values(records, panel[0])[0])]
    if not present:
        return None
    figure = Figure(figsize=(6.4, 4.2))
    grid = figure.subplots(len(present), sharex=True, squeeze=False)[:, 0]
    for axes, (tag, title, color, number) in zip(grid, present, strict=True):
        steps, values = select_values(records, tag)
        axes.plot(steps, values, color=color, linewidth=1.5)
        label = title.format(median=np.median(values), highest=values.max())
        axes.set_title(label, loc="left", fontsize=9, color=color)
        axes.set_ylim(0, values.max() * 1.15 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(6 // len(present) + 1))
        axes.yaxis.set_major_formatter(f"{{x:{number}}}")
    grid[-1].set_xlabel("step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _plot_points(
    axes: Axes, records: Sequence[Record], tag: str, name: str, color: str, number: str
) -> list[tuple[float, str, str]]:
    """Plots the values of a tag; returns its end label (value, text, color), or nothing without values."""
    steps, values = select_values(records, tag)
    if not len(steps):
        return []
    axes.plot(steps, values, "o-", color=color, linewidth=1.5, markersize=5, markeredgecolor="white")
    return [(values[-1], f"{name} {values[-1]:{number}}", color)]


def _label_lines(axes: Axes, records: Sequence[Record], names: Sequence[tuple[float, str, str]]) -> None:
    """Writes line names beside the line ends without overlaps, and epochs along the top."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    place = -math.inf
    for value, text, color in sorted(names):
        place = max((value - low) / (high - low), place + 0.075)
        axes.text(1.015, place, text, color=color, transform=axes.transAxes, va="center", fontsize=9)
    steps, epochs = select_values(records, "epoch")
    whole_epochs = np.arange(1, int(epochs.max(initial=0)) + 1)
    if len(whole_epochs):
        shown = whole_epochs[:: math.ceil(len(whole_epochs) / 8)]
        top = axes.secondary_xaxis("top")
        top.set_xticks(np.interp(shown, epochs, steps), [f"epoch {epoch}" for epoch in shown], fontsize=8)
        top.tick_params(labelcolor=GRAY)
        top.spines["top"].set_visible(False)

"""Figures that a run and its report share.

Always holds: a figure is a `matplotlib.figure.Figure` of its own (no pyplot, so no global list of open figures and no
window system), and a label is drawn as the characters it consists of, never parsed as mathematics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure

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

"""The report of a run: figures as PNG files and one self-contained HTML page, from the run folder's files alone.

What always holds: whatever part of a run exists is enough (an unfinished run, no test split), each file is replaced in
one move, and whatever stands in a text, label or setting is shown as text. The page asks for nothing outside itself.

    python trainer/report.py --run runs/NAME
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import base64
import csv
import heapq
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import jsonargparse
import matplotlib
import numpy as np
import numpy.typing as npt
import yaml
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType

from trainer.figures import INK, SHARE_COLORS, confusion_matrix_figure, figure_label

SPLITS = ("test", "validation", "train")  # the errors shown are those of the first one that was scored
NUM_ERRORS, NUM_CONFUSIONS = 25, 8
BLUE, VERMILION, GREEN, GREY = "#0072b2", "#d55e00", "#00805e", "#6b7785"  # after Okabe and Ito, safe for colour-blind
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

# Panels of a figure: tag, title, colour, number format.
LEARNING_RATE = [("train/learning_rate", "learning rate, highest {highest:.2g}", BLUE, ".2g")]
THROUGHPUT = [
    ("speed/examples_per_second", "examples / s, median {median:,.0f}", BLUE, ",.0f"),
    ("speed/tokens_per_second", "tokens / s, median {median:,.0f}", GREEN, ",.0f"),
    ("speed/padding_fraction", "padding fraction, median {median:.1%}", VERMILION, ".1%"),
]

Floats = npt.NDArray[np.float64]
Record = Mapping[str, Any]


PENDING_SUMMARY = "summary.pending.json"


class ReportError(Exception):
    """What the user can mend: the folder is no run folder, or a file in it is not what a run writes."""


@dataclass(frozen=True)
class Split:
    """What the run wrote about one scored split; an absent file leaves its part empty."""

    name: str
    metrics: Record
    labels: list[str]
    matrix: npt.NDArray[np.int64]
    """counts, rows true and columns predicted, [C, C]; labels are the names in this order"""
    errors: list[dict[str, str]]
    """rows of predictions.csv whose prediction is wrong, the most confident first, at most NUM_ERRORS"""


@dataclass(frozen=True)
class Run:
    """Everything the report reads of a run folder."""

    folder: Path
    config: Record
    environment: Record
    summary: Record
    records: list[Record]
    splits: list[Split]


def read_run(folder: Path) -> Run:
    """Reads a run folder; absent files leave empty parts.

    Raises:
        ReportError: no such folder, not a run folder, or a file that cannot be understood (named).
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; --run takes the folder of a run, such as runs/NAME")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise ReportError(f"{folder}: not a run folder (no config.yaml, metrics.jsonl or summary.json in it)")
    # run.py builds the report before it calls a run finished, which is what summary.json stands for
    summary = next((path for path in (folder / "summary.json", folder / PENDING_SUMMARY) if path.is_file()), None)
    return Run(
        folder=folder,
        config=_read_mapping(folder / "config.yaml"),
        environment=_read_mapping(folder / "environment.json"),
        summary=_read_mapping(summary) if summary is not None else {},
        records=read_records(folder / "metrics.jsonl"),
        splits=[read_split(folder / "evaluation" / name) for name in SPLITS if (folder / "evaluation" / name).is_dir()],
    )


def _read_mapping(path: Path) -> Record:
    """Reads a JSON or YAML file that holds a mapping; {} where there is no file."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(f"{path}: holds a {type(value).__name__}, a mapping was expected")
    return value


def read_records(path: Path) -> list[Record]:
    """Reads metrics.jsonl; a torn last line (the run was killed as it wrote) is left out.

    Raises:
        ReportError: any other line is not a JSON object with a "step".
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            float(record["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise ReportError(f"{path}, line {number}: not a JSON object with a step: {error}") from error
        records.append(record)
    return records


def read_split(folder: Path) -> Split:
    """Reads metrics.json, confusion_matrix.csv and predictions.csv of evaluation/<split>/, each where it exists."""
    path = folder / "confusion_matrix.csv"
    rows = list(_read_csv(path))[1:]
    try:
        labels = [row[0] for row in rows]
        matrix = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(labels), len(labels))
    except (ValueError, IndexError) as error:
        raise ReportError(f"{path}: not a square confusion matrix: {error}") from error
    metrics, errors = _read_mapping(folder / "metrics.json"), confident_errors(folder / "predictions.csv")
    return Split(folder.name, metrics, labels, matrix, errors)


def confident_errors(path: Path) -> list[dict[str, str]]:
    """Finds the wrong predictions of highest confidence in predictions.csv; ties stay in the file's order.

    Returns:
        rows by column name, the most confident first, at most NUM_ERRORS; none where there is no file.

    Raises:
        ReportError: a column is missing or a confidence is not a number.
    """
    rows = _read_csv(path)
    header = next(rows, [])
    named_rows = (dict(zip(header, row, strict=False)) for row in rows)
    try:
        wrong = (row for row in named_rows if row["label"] != row["prediction"])
        return heapq.nlargest(NUM_ERRORS, wrong, key=lambda row: float(row["confidence"]))
    except (ValueError, KeyError) as error:
        raise ReportError(f"{path}: not a table of predictions: {error}") from error


def _read_csv(path: Path) -> Iterator[list[str]]:
    """Yields the rows of a CSV file; none where there is no file."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            yield from csv.reader(file)


def averages(per_class: Mapping[str, Record]) -> dict[str, Record]:
    """Averages the scores of the classes: plain, and weighted by support. {} where no class has an example."""
    names, rows = ("precision", "recall", "f1"), list(per_class.values())
    supports = [row["support"] for row in rows]
    if not sum(supports):
        return {}
    table = np.array([[row[name] for name in names] for row in rows], dtype=np.float64)
    means = {"macro average": table.mean(axis=0), "weighted average": np.average(table, axis=0, weights=supports)}
    return {
        kind: {**dict(zip(names, mean.tolist(), strict=True)), "support": sum(supports)} for kind, mean in means.items()
    }


def top_confusions(split: Split) -> list[tuple[int, str, str, float]]:
    """Lists the most frequent confusions: count, true label, predicted label, share of the true class."""
    confusions = [
        (int(count), split.labels[row], split.labels[column], float(count / split.matrix[row].sum()))
        for (row, column), count in np.ndenumerate(split.matrix)
        if row != column and count
    ]
    return heapq.nlargest(NUM_CONFUSIONS, confusions, key=lambda confusion: confusion[0])


def series(records: Sequence[Record], tag: str) -> tuple[Floats, Floats]:
    """Picks the finite values of one tag: their steps and themselves, [N] each."""
    points = [(record["step"], record[tag]) for record in records if isinstance(record.get(tag), int | float)]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    finite = np.isfinite(values)
    return steps[finite], values[finite]


def smooth(values: Floats) -> Floats:
    """Averages each value with its neighbours, a twentieth of the series; fewer at the start, where the loss drops."""
    places = np.arange(len(values))
    reach = np.minimum(places, len(values) // 40)
    first, last = places - reach, np.minimum(places + reach, len(values) - 1)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    means: Floats = (sums[last + 1] - sums[first]) / (last + 1 - first)
    return means


def loss_figure(run: Run) -> Figure | None:
    """Draws the training loss of each logged step, raw and smoothed, and the validation loss."""
    steps, losses = series(run.records, "train/loss")
    if not len(steps):
        return None
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.add_subplot(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1)
    smoothed = smooth(losses)
    axes.plot(steps, smoothed, color=BLUE, linewidth=2)
    names = [(smoothed[-1], f"train {smoothed[-1]:.3f}", BLUE)]
    names += _plot_points(axes, run.records, "validation/loss", "validation", VERMILION, ".3f")
    _finish_steps(axes, run.records, names)
    return figure


def accuracy_figure(run: Run) -> Figure | None:
    """Draws validation accuracy and macro-F1 of each evaluation, the best step, and the test accuracy as a line."""
    figure = Figure(figsize=(6.4, 3.6))
    axes = figure.add_subplot(xlabel="step", ylabel="validation score")
    names = _plot_points(axes, run.records, "validation/f1_macro", "macro-F1", VERMILION, ".1%")
    names += _plot_points(axes, run.records, "validation/accuracy", "accuracy", BLUE, ".1%")
    if not names:
        return None
    test_accuracy = next((split.metrics.get("accuracy") for split in run.splits if split.name == "test"), None)
    if test_accuracy is not None:
        axes.axhline(test_accuracy, color=GREEN, linestyle=(0, (4, 3)), linewidth=1.5)
        names.append((test_accuracy, f"test {test_accuracy:.1%}", GREEN))
    steps, values = series(run.records, "validation/accuracy")
    for best in values[steps == run.summary.get("best_step")]:
        step = run.summary["best_step"]
        axes.axvline(step, color=GREY, linestyle=":", linewidth=1)
        axes.plot(step, best, "o", markersize=12, markerfacecolor="none", markeredgecolor=INK)
        axes.text(step, 0.02, f"best: step {step} ", transform=axes.get_xaxis_transform(), ha="right", fontsize=9)
    axes.margins(y=0.18)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    _finish_steps(axes, run.records, names)
    return figure


def panels_figure(records: Sequence[Record], panels: Sequence[tuple[str, str, str, str]]) -> Figure | None:
    """Draws panels (see THROUGHPUT) one above the other, as their units differ; those without values are left out."""
    present = [panel for panel in panels if len(series(records, panel[0])[0])]
    if not present:
        return None
    figure = Figure(figsize=(6.4, 4.2))
    grid = figure.subplots(len(present), sharex=True, squeeze=False)[:, 0]
    for axes, (tag, title, color, number) in zip(grid, present, strict=True):
        steps, values = series(records, tag)
        axes.plot(steps, values, color=color, linewidth=1.5)
        label = title.format(median=np.median(values), highest=values.max())
        axes.set_title(label, loc="left", fontsize=9, color=color)
        axes.set_ylim(0, values.max() * 1.15 or 1)
        axes.yaxis.set_major_locator(MaxNLocator(6 // len(present) + 1))
        axes.yaxis.set_major_formatter(f"{{x:{number}}}")
    grid[-1].set_xlabel("step")
    grid[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def classification_report_figure(per_class: Mapping[str, Record]) -> Figure:
    """Draws precision, recall, F1 (coloured by value) and support of each class and of the averages."""
    rows = [*per_class.items(), *averages(per_class).items()]
    height = min(1.0 + 0.34 * len(rows), 24.0)
    font_size = float(np.clip(0.6 * 72 * (height - 1) / len(rows), 4.0, 9.5))
    figure = Figure(figsize=(6.4, height))
    axes = figure.add_subplot()
    values = np.array([[row["precision"], row["recall"], row["f1"], np.nan] for _, row in rows], dtype=np.float64)
    colors = PowerNorm(3, vmin=0, vmax=1)  # most scores are near 1: spread those out
    axes.imshow(values, cmap=SHARE_COLORS, norm=colors, aspect="auto", interpolation="nearest")
    for (row, column), value in np.ndenumerate(values[:, :3]):
        color = "white" if colors(value) > 0.6 else INK
        axes.text(column, row, f"{value:.3f}", ha="center", va="center_baseline", fontsize=font_size, color=color)
    for row, (_, scores) in enumerate(rows):
        axes.text(3.35, row, f"{scores['support']:,}", ha="right", va="center_baseline", fontsize=font_size)
    axes.axhline(len(per_class) - 0.5, color="white", linewidth=4)
    axes.set_xticks(range(4), ["precision", "recall", "F1", "support"], fontsize=9.5)
    axes.set_yticks(range(len(rows)), [figure_label(name) for name, _ in rows], fontsize=font_size)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    return figure


def _plot_points(
    axes: Axes, records: Sequence[Record], tag: str, name: str, color: str, number: str
) -> list[tuple[float, str, str]]:
    """Plots one tag as joined points and returns its end label (value, text, colour); none where it has no values."""
    steps, values = series(records, tag)
    if not len(steps):
        return []
    axes.plot(steps, values, "o-", color=color, linewidth=1.5, markersize=5, markeredgecolor="white")
    return [(values[-1], f"{name} {values[-1]:{number}}", color)]


def _finish_steps(axes: Axes, records: Sequence[Record], names: Sequence[tuple[float, str, str]]) -> None:
    """Writes the names of the lines beside their ends, moved apart where they would overlap; epochs along the top."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.get_ylim()
    place = -math.inf
    for value, text, color in sorted(names):
        place = max((value - low) / (high - low), place + 0.075)
        axes.text(1.015, place, text, color=color, transform=axes.transAxes, va="center", fontsize=9)
    steps, epochs = series(records, "epoch")
    whole_epochs = np.arange(1, int(epochs.max(initial=0)) + 1)
    if len(whole_epochs):
        shown = whole_epochs[:: math.ceil(len(whole_epochs) / 8)]
        top = axes.secondary_xaxis("top")
        top.set_xticks(np.interp(shown, epochs, steps), [f"epoch {epoch}" for epoch in shown], fontsize=8)
        top.tick_params(labelcolor=GREY)
        top.spines["top"].set_visible(False)


def draw_figures(run: Run) -> dict[str, bytes]:
    """Draws every figure the run has values for: path inside the run folder -> PNG."""
    figures = {
        "figures/loss.png": loss_figure(run),
        "figures/accuracy.png": accuracy_figure(run),
        "figures/learning_rate.png": panels_figure(run.records, LEARNING_RATE),
        "figures/throughput.png": panels_figure(run.records, THROUGHPUT),
    }
    for split in run.splits:
        folder = f"evaluation/{split.name}"
        if per_class := split.metrics.get("per_class"):
            figures[f"{folder}/classification_report.png"] = classification_report_figure(per_class)
        if split.labels:
            figures[f"{folder}/confusion_matrix.png"] = confusion_matrix_figure(split.matrix, split.labels)
    pictures = {}
    for path, figure in figures.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160)
            pictures[path] = buffer.getvalue()
    return pictures


def render_page(run: Run, pictures: Mapping[str, bytes]) -> str:
    """Fills the template. Every value is escaped; control characters are shown as the replacement character."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # a part the run does not have is shown as a dash
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_number, share=_share, setting=_setting)
    environment.filters.update(averages=averages, top_confusions=top_confusions)
    images = {path: base64.b64encode(picture).decode() for path, picture in pictures.items()}
    page = environment.get_template("report.html.j2").render(run=run, images=images)
    return re.sub(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "\ufffd", page)


def _number(value: object, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "—"


def _share(part: object, digits: int = 2, whole: object = 1) -> str:
    if not isinstance(part, int | float) or not isinstance(whole, int | float) or not whole:
        return "—"
    return f"{_number(100 * part / whole, digits)}%"


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def build_report(folder: Path) -> Path:
    """Writes the figures and report.html of a run folder, each file whole or not at all; returns the page's path.

    Raises:
        ReportError: the folder is not a run folder, or a file in it cannot be understood.
        OSError: the folder cannot be written.
    """
    run = read_run(folder)
    with matplotlib.rc_context(STYLE):
        pictures = draw_figures(run)
    page = render_page(run, pictures).encode()
    for path, content in {**pictures, "report.html": page}.items():
        _write_atomically(folder / path, content)
    return folder / "report.html"


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def main() -> int:
    """Builds the report that the command line asks for; returns the exit code."""
    parser = jsonargparse.ArgumentParser(description="Writes the figures and report.html of a run folder.")
    parser.add_argument("--run", type=Path, required=True, help="the folder of a run, such as runs/quickstart")
    folder = parser.parse_args().run
    try:
        print(build_report(folder))
    except (ReportError, OSError) as error:
        print("error:", *str(error).split(), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

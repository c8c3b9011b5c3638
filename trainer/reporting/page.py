"""The report of a run: figures as PNG files and one self-contained HTML page, made from the run folder.

Missing files are fine (an unfinished run, no test split). Each file is replaced atomically. Texts, labels and settings
are always shown as text. The page loads nothing from outside.
"""

import base64
import csv
import heapq
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
import yaml

from trainer.errors import UserError, one_line
from trainer.files import read_json_lines, write_atomic
from trainer.reporting.figures import (
    LEARNING_RATE,
    STYLE,
    THROUGHPUT,
    Record,
    accuracy_figure,
    confusion_matrix_figure,
    loss_figure,
    panels_figure,
    residuals_figure,
)

SPLITS = ("test", "validation")  # the page shows the errors of the first scored split
NUM_ERRORS, NUM_CONFUSIONS = 25, 8


@dataclass(frozen=True)
class SplitFiles:
    """The files of one scored split. A missing file leaves its part empty."""

    name: str
    metrics: Record
    labels: list[str]
    matrix: npt.NDArray[np.int64]
    """counts, rows true and columns predicted, in the order of `labels`, [C, C]"""
    numbers: dict[str, npt.NDArray[np.float64]]
    """{target: true and predicted number of each example, [N, 2]}; of a regression"""
    errors: list[dict[str, str]]
    """wrong rows of predictions.csv, the most confident or the farthest off first, at most NUM_ERRORS"""


@dataclass(frozen=True)
class RunFiles:
    """All that the report reads from a run folder."""

    folder: Path
    config: Record
    environment: Record
    summary: Record
    records: Sequence[Record]
    splits: list[SplitFiles]


def read_run(folder: Path, summary: Record | None) -> RunFiles:
    """Reads a run folder. Reads summary.json only if no `summary` is given."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --run takes a run folder, such as runs/NAME")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise UserError(f"{folder} is not a run folder: it has no config.yaml, metrics.jsonl or summary.json")
    return RunFiles(
        folder=folder,
        config=_read_mapping(folder / "config.yaml"),
        environment=_read_mapping(folder / "environment.json"),
        summary=summary or _read_mapping(folder / "summary.json"),
        records=read_json_lines(folder / "metrics.jsonl"),
        splits=[read_split(folder / "evaluation" / name) for name in SPLITS if (folder / "evaluation" / name).is_dir()],
    )


def _read_mapping(path: Path) -> Record:
    """Reads a mapping from a JSON or YAML file; returns {} if the file does not exist."""
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        return dict(yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text))
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def read_split(folder: Path) -> SplitFiles:
    """Reads the metrics, confusion matrix, residuals and predictions in evaluation/<split>/, if they exist."""
    path = folder / "confusion_matrix.csv"
    rows = list(_read_csv(path))[1:]
    try:
        labels = [row[0] for row in rows]
        matrix = np.array([row[1:] for row in rows], dtype=np.int64).reshape(len(labels), len(labels))
    except (ValueError, IndexError) as error:
        raise UserError(f"{path}: not a square confusion matrix: {error}") from error
    numbers = read_residuals(folder / "residuals.csv")
    predictions, metrics = folder / "predictions.csv", _read_mapping(folder / "metrics.json")
    errors = find_large_errors(predictions, numbers) if numbers else find_confident_errors(predictions)
    return SplitFiles(folder.name, metrics, labels, matrix, numbers, errors)


def read_residuals(path: Path) -> dict[str, npt.NDArray[np.float64]]:
    """Reads true and predicted numbers by target, [N, 2] each; {} if the file does not exist."""
    pairs: dict[str, list[list[float]]] = {}
    try:
        for target, true, predicted in itertools.islice(_read_csv(path), 1, None):
            pairs.setdefault(target, []).append([float(true), float(predicted)])
        if len(set(map(len, pairs.values()))) > 1:
            raise ValueError("targets have different numbers of rows")
    except ValueError as error:
        raise UserError(f"{path}: not a table of residuals: {error}") from error
    return {target: np.array(values) for target, values in pairs.items()}


def find_large_errors(path: Path, numbers: Mapping[str, npt.NDArray[np.float64]]) -> list[dict[str, str]]:
    """Finds the rows of predictions.csv whose numbers are farthest off, at most NUM_ERRORS.

    An error counts in standard deviations of its target, and the largest of a row counts.
    """
    each = [np.abs(pairs[:, 1] - pairs[:, 0]) / (pairs[:, 0].std() or 1.0) for pairs in numbers.values()]
    sizes = np.max(each, axis=0)
    worst = np.argsort(-sizes, kind="stable")[:NUM_ERRORS].tolist()
    rows = _read_csv(path)
    header, wanted = next(rows, []), set(worst)
    found = {place: dict(zip(header, row, strict=False)) for place, row in enumerate(rows) if place in wanted}
    return [found[place] | {"error": f"{sizes[place]:.2f}"} for place in worst if place in found]


def find_confident_errors(path: Path) -> list[dict[str, str]]:
    """Finds the wrong predictions with the highest confidence in predictions.csv, at most NUM_ERRORS.

    Ties keep the order of the file. Returns no rows if there is no file, or if its task has no confidence.
    """
    rows = _read_csv(path)
    header = next(rows, [])
    if "prediction" in header and "confidence" not in header:
        return []
    named_rows = (dict(zip(header, row, strict=False)) for row in rows)
    try:
        wrong = (row for row in named_rows if row["label"] != row["prediction"])
        return heapq.nlargest(NUM_ERRORS, wrong, key=lambda row: float(row["confidence"]))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table of predictions: {error}") from error


def _read_csv(path: Path) -> Iterator[list[str]]:
    """Yields the rows of a CSV file; none if it does not exist."""
    csv.field_size_limit(2**31 - 1)  # the default limit is 128 KiB
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            yield from csv.reader(file)


def compute_averages(metrics: Record) -> dict[str, Record]:
    """Averages a split's scores over the classes that occur, and weighted by support; returns {} without examples."""
    names, rows = ("precision", "recall", "f1"), metrics["per_class"].values()
    support = sum(row.get("support", 0) for row in rows)
    if not support:
        return {}
    macro = {name: metrics.get(f"{name}_macro", math.nan) for name in names}
    weighted = {name: sum(row[name] * row["support"] for row in rows) / support for name in names}
    return {"macro average": {**macro, "support": support}, "weighted average": {**weighted, "support": support}}


def find_top_confusions(split: SplitFiles) -> list[tuple[int, str, str, float]]:
    """Finds the most frequent confusions: count, true label, predicted label, share of the true class."""
    confusions = [
        (int(count), split.labels[row], split.labels[column], float(count / split.matrix[row].sum()))
        for (row, column), count in np.ndenumerate(split.matrix)
        if row != column and count
    ]
    return heapq.nlargest(NUM_CONFUSIONS, confusions, key=lambda confusion: confusion[0])


def draw_figures(run: RunFiles) -> dict[str, bytes]:
    """Draws all figures for which the run has values. Returns {path in the run folder: PNG}."""
    test_accuracy = next((split.metrics.get("accuracy") for split in run.splits if split.name == "test"), None)
    figures = {
        "figures/loss.png": loss_figure(run.records),
        "figures/accuracy.png": accuracy_figure(run.records, run.summary.get("best_step", 0), test_accuracy),
        "figures/learning_rate.png": panels_figure(run.records, LEARNING_RATE),
        "figures/throughput.png": panels_figure(run.records, THROUGHPUT),
    }
    for split in run.splits:
        if split.labels:
            path = f"evaluation/{split.name}/confusion_matrix.png"
            figures[path] = confusion_matrix_figure(split.matrix, split.labels)
        if split.numbers:
            true, predicted = np.stack(list(split.numbers.values()), axis=-1).transpose(1, 0, 2)
            figures[f"evaluation/{split.name}/residuals.png"] = residuals_figure(true, predicted, list(split.numbers))
    pictures = {}
    for path, figure in figures.items():
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=160)
            pictures[path] = buffer.getvalue()
    return pictures


def render_page(run: RunFiles, pictures: Mapping[str, bytes]) -> str:
    """Fills the template. Escapes all values and replaces control characters."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,  # missing values are shown as a dash
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=_format_number, share=_format_share, setting=_format_setting)
    environment.filters.update(averages=compute_averages, top_confusions=find_top_confusions)
    images = {path: base64.b64encode(picture).decode() for path, picture in pictures.items()}
    page = environment.get_template("page.html.j2").render(run=run, images=images)
    return re.sub(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "\ufffd", page)


def _format_number(value: object, digits: int = 0) -> str:
    """Shows decimals, or as many digits of a small number; a dash for anything else."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return "—"
    is_tiny = digits > 0 and 0 < abs(value) < 10.0 ** (1 - digits)
    return f"{value:.{digits}g}" if is_tiny else f"{value:,.{digits}f}"


def _format_share(part: object, digits: int = 2, whole: object = 1) -> str:
    if not isinstance(part, int | float) or not isinstance(whole, int | float) or not whole:
        return "—"
    return f"{_format_number(100 * part / whole, digits)}%"


def _format_setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def build_report(folder: Path, summary: Record | None = None) -> Path:
    """Writes the figures and report.html into a run folder; returns the path of the page.

    A run passes its `summary`, because it writes summary.json last.
    """
    run = read_run(folder, summary)
    with matplotlib.rc_context(STYLE):
        pictures = draw_figures(run)
    page = render_page(run, pictures).encode()
    for path, content in {**pictures, "report.html": page}.items():
        write_atomic(folder / path, content)
    return folder / "report.html"

"""The report of a run: figures as PNG files and one self-contained HTML page, from the run folder's files alone.

What always holds: whatever part of a run exists is enough (an unfinished run, no test split), each file is replaced in
one move, and whatever stands in a text, label or setting is shown as text. The page asks for nothing outside itself.
"""

import base64
import csv
import heapq
import io
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
import numpy.typing as npt
import yaml

from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.reporting.figures import (
    LEARNING_RATE,
    STYLE,
    THROUGHPUT,
    accuracy_figure,
    averages,
    classification_report_figure,
    confusion_matrix_figure,
    loss_figure,
    panels_figure,
)

SPLITS = ("test", "validation", "train")  # the errors shown are those of the first one that was scored
NUM_ERRORS, NUM_CONFUSIONS = 25, 8
Record = Mapping[str, Any]


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


def read_run(folder: Path, summary: Record | None) -> Run:
    """Reads a run folder; absent files leave empty parts. Without a `summary` it is read, too.

    Raises:
        UserError: no such folder, not a run folder, or a file that cannot be understood (named).
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --run takes the folder of a run, such as runs/NAME")
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl", "summary.json")):
        raise UserError(f"{folder}: not a run folder (no config.yaml, metrics.jsonl or summary.json in it)")
    return Run(
        folder=folder,
        config=_read_mapping(folder / "config.yaml"),
        environment=_read_mapping(folder / "environment.json"),
        summary=summary or _read_mapping(folder / "summary.json"),
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
        raise UserError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, a mapping was expected")
    return value


def read_records(path: Path) -> list[Record]:
    """Reads metrics.jsonl; a torn last line (the run was killed as it wrote) is left out.

    Raises:
        UserError: any other line is not a JSON object with a "step".
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
            raise UserError(f"{path}, line {number}: not a JSON object with a step: {error}") from error
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
        raise UserError(f"{path}: not a square confusion matrix: {error}") from error
    metrics, errors = _read_mapping(folder / "metrics.json"), confident_errors(folder / "predictions.csv")
    return Split(folder.name, metrics, labels, matrix, errors)


def confident_errors(path: Path) -> list[dict[str, str]]:
    """Finds the wrong predictions of highest confidence in predictions.csv; ties stay in the file's order.

    Returns:
        rows by column name, the most confident first, at most NUM_ERRORS; none where there is no file.

    Raises:
        UserError: a column is missing or a confidence is not a number.
    """
    rows = _read_csv(path)
    header = next(rows, [])
    named_rows = (dict(zip(header, row, strict=False)) for row in rows)
    try:
        wrong = (row for row in named_rows if row["label"] != row["prediction"])
        return heapq.nlargest(NUM_ERRORS, wrong, key=lambda row: float(row["confidence"]))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: not a table of predictions: {error}") from error


def _read_csv(path: Path) -> Iterator[list[str]]:
    """Yields the rows of a CSV file; none where there is no file."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 128 KiB
    if path.is_file():
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            yield from csv.reader(file)


def top_confusions(split: Split) -> list[tuple[int, str, str, float]]:
    """Lists the most frequent confusions: count, true label, predicted label, share of the true class."""
    confusions = [
        (int(count), split.labels[row], split.labels[column], float(count / split.matrix[row].sum()))
        for (row, column), count in np.ndenumerate(split.matrix)
        if row != column and count
    ]
    return heapq.nlargest(NUM_CONFUSIONS, confusions, key=lambda confusion: confusion[0])


def draw_figures(run: Run) -> dict[str, bytes]:
    """Draws every figure the run has values for: path inside the run folder -> PNG."""
    test_accuracy = next((split.metrics.get("accuracy") for split in run.splits if split.name == "test"), None)
    figures = {
        "figures/loss.png": loss_figure(run.records),
        "figures/accuracy.png": accuracy_figure(run.records, run.summary.get("best_step", 0), test_accuracy),
        "figures/learning_rate.png": panels_figure(run.records, LEARNING_RATE),
        "figures/throughput.png": panels_figure(run.records, THROUGHPUT),
    }
    for split in run.splits:
        folder = f"evaluation/{split.name}"
        if split.metrics.get("per_class"):
            figures[f"{folder}/classification_report.png"] = classification_report_figure(split.metrics)
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
    page = environment.get_template("page.html.j2").render(run=run, images=images)
    return re.sub(r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\U0010ffff]", "\ufffd", page)


def _number(value: object, digits: int = 0) -> str:
    return f"{value:,.{digits}f}" if isinstance(value, int | float) and math.isfinite(value) else "—"


def _share(part: object, digits: int = 2, whole: object = 1) -> str:
    if not isinstance(part, int | float) or not isinstance(whole, int | float) or not whole:
        return "—"
    return f"{_number(100 * part / whole, digits)}%"


def _setting(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def build_report(folder: Path, summary: Record | None = None) -> Path:
    """Writes the figures and report.html of a run folder, each file whole or not at all; returns the page's path.

    A run builds it before it writes its `summary`, the last of its files.

    Raises:
        UserError: the folder is not a run folder, or a file in it cannot be understood.
        OSError: the folder cannot be written.
    """
    run = read_run(folder, summary)
    with matplotlib.rc_context(STYLE):
        pictures = draw_figures(run)
    page = render_page(run, pictures).encode()
    for path, content in {**pictures, "report.html": page}.items():
        write_atomic(folder / path, content)
    return folder / "report.html"

"""The options of predict.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from jsonargparse.typing import PositiveInt

from trainer.config.labels import describe_look_alikes
from trainer.config.schema import Config, Format, Source, resolve
from trainer.errors import UserError


@dataclass(frozen=True)
class Copy:
    """An unchanged copy of the run's backbone in another place."""

    name: str | None = None
    """hub id, local folder or package:NAME/dir; null = as in training"""
    revision: str | None = None
    """branch, tag or commit of a hub model; null = the commit of the training"""


@dataclass(frozen=True)
class Options(Format):
    """What to score, with what, and how to write it; null = as in the run."""

    run: list[str]
    """folders of finished runs"""
    input: str
    """file or glob (csv, json, parquet, pkl, ...) with the run's text columns; if it has labels it is scored"""
    output: str
    """csv or jsonl file to write"""
    layout: Literal["full", "contest"] = "full"
    """full = id, prediction, confidence and a probability per class; contest = ID,Label with the labels of the
    training data, or those of label_names"""
    id_column: str | None = None
    """column with the ids; null = a column called ID, in any case, or else the row; '' = the row, counted from 0"""
    ignore_labels: bool = False
    """true = do not read the label column"""
    model: Copy = field(default_factory=Copy)
    precision: Literal["no", "bf16", "fp16"] = "no"
    """precision of the computation; no = fp32"""
    max_tokens: PositiveInt = 4096
    """token budget of one batch on one process, with padding"""
    quiet: bool = False
    """true = print errors only; stdout holds the metrics in any case"""


def source_of(options: Options) -> Source:
    """How to read the input; null fields are the run's."""
    return Source(path=options.input, **{item.name: getattr(options, item.name) for item in fields(Format)})


@dataclass(frozen=True)
class FinishedRun:
    """A run that predicts."""

    folder: Path
    config: Config
    label_names: list[str]
    """name of each logit, [C]"""


def check_runs_agree(runs: list[FinishedRun], options: Options) -> None:
    """Refuses runs whose predictions cannot be averaged.

    Raises:
        UserError: another task, other classes, or other columns with the text.
    """
    first = runs[0]
    own = resolve(first.config.data.train or "", first.config.data)
    for run in runs[1:]:
        both = f"{first.folder} and {run.folder}"
        if run.config.task.type != first.config.task.type:
            types = f"{first.config.task.type} and {run.config.task.type}"
            raise UserError(f"--run: {both} have different tasks ({types}); average runs of one task")
        for here, there in ((first, run), (run, first)):
            if missing := [name for name in there.label_names if name not in here.label_names]:
                hint = describe_look_alikes(missing[0], here.label_names)
                reason = f"{there.folder} has {missing[0]!r} and {here.folder} does not{hint}"
                raise UserError(f"--run: {reason}; average runs of the same classes, labels or targets")
        other = resolve(run.config.data.train or "", run.config.data)
        for name in ("text_columns", "text_pair_columns"):
            if getattr(options, name) is None and getattr(own, name) != getattr(other, name):
                columns = f"{getattr(own, name)} and {getattr(other, name)}"
                raise UserError(
                    f"--run: {both} read different columns ({columns}); name the input's: --{name} '[NAME]'"
                )
        if bool(own.text_pair_columns) != bool(other.text_pair_columns):
            raise UserError(f"--run: of {both} one has pairs of texts; average runs of single texts, or of pairs")

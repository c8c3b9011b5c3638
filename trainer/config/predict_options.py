"""The options of predict.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from jsonargparse.typing import PositiveInt

from trainer.config.schema import Format, Source


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

    run: str
    """folder of a finished run"""
    input: str
    """file or glob (csv, tsv, json, jsonl, parquet, ...) with the run's text columns; if it has labels it is scored"""
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

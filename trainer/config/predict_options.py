"""The options of predict.py. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import PositiveInt


@dataclass(frozen=True)
class Copy:
    """An unchanged copy of the run's backbone in another place."""

    name: str | None = None
    """hub id, local folder or package:NAME/dir; null = as in training"""
    revision: str | None = None
    """branch, tag or commit of a hub model; null = the commit of the training"""


@dataclass(frozen=True)
class Options:
    """What to score, with what, and how to write it."""

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
    column_names: list[str] | None = None
    """column names of an input without a header; [] = the first row is the header; null = as in the run"""
    delimiter: str | None = None
    """field separator of csv and tsv files; null = the run's, or else by the name of the input"""
    encoding: str | None = None
    """encoding of csv, tsv, json and jsonl files; null = the run's"""
    quoting: Literal["single_line", "multi_line", "none"] | None = None
    """meaning of quotes in csv and tsv files (see data.quoting); null = the run's"""
    text_columns: list[str] | None = None
    """columns with the text; null = the run's"""
    text_pair_columns: list[str] | None = None
    """columns with the second text of a pair; null = the run's"""
    label_column: str | None = None
    """column with the labels, if there are any; null = the run's"""
    label_names: str | None = None
    """{label in the input: class name}, or [names for numbers counted from 0]; null = the run's"""
    ignore_labels: bool = False
    """true = do not read the label column"""
    model: Copy = field(default_factory=Copy)
    precision: Literal["no", "bf16", "fp16"] = "no"
    """precision of the computation; no = fp32"""
    max_tokens: PositiveInt = 4096
    """token budget of one batch on one process, with padding"""
    quiet: bool = False
    """true = print errors only; stdout holds the metrics in any case"""

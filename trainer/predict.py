"""A finished run's adapter on a file: labels and probabilities out, in the order of the rows.

    python trainer/predict.py --run runs/NAME --input FILE.csv --output PREDICTIONS.csv

Always holds: every row is scored exactly once, on any number of processes. By default the arithmetic is fp32 on the
backbone's original weights, so the numbers are those of plain PEFT.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first on sys.path; there our modules could hide a library's
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import glob
import json
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import jsonargparse
from jsonargparse.typing import PositiveInt

from trainer.config import NO_COLUMN, Config, Source, UserError, completed, main_guard, set_environment
from trainer.options import load_finished_run

OUTPUT_TYPES = (".csv", ".jsonl")


@dataclass(frozen=True)
class Copy:
    """The backbone, where it is no longer where it was trained on."""

    name: str | None = None
    """hub id, local folder or package:NAME/dir of an unchanged copy; null = as in training"""
    revision: str | None = None
    """branch, tag or commit of a hub model; null = the commit of the training"""


@dataclass(frozen=True)
class Options:
    """What to score, with what, and how to write it."""

    run: str
    """folder of a finished run"""
    input: str
    """csv, tsv, json, jsonl or parquet file (or glob) with the run's text columns; with labels it is also scored"""
    output: str
    """csv or jsonl file to write"""
    layout: Literal["full", "contest"] = "full"
    """full = id, prediction, confidence and a probability per class; contest = ID,Label with class numbers from 0"""
    id_column: str | None = None
    """column of the input that holds the ids; null = the row, counted from 0"""
    column_names: list[str] | None = None
    """names of the columns of an input without a header; [] = its first row is the header; null = as the run's data"""
    text_columns: list[str] | None = None
    """columns that hold the text; null = the run's"""
    text_pair_columns: list[str] | None = None
    """columns that hold the second text of a pair; null = the run's"""
    label_column: str | None = None
    """column that holds the labels, where there are any; null = the run's"""
    label_names: list[str | int] | dict[str, str | int] | None = None
    """{label in the input: class name}, or names for numbers counted from 0; null = the run's"""
    ignore_labels: bool = False
    """true = do not read the label column"""
    model: Copy = field(default_factory=Copy)
    precision: Literal["no", "bf16", "fp16"] = "no"
    """arithmetic; no = fp32"""
    max_tokens: PositiveInt = 4096
    """tokens of one batch on one process, padding included"""
    quiet: bool = False
    """true = nothing on stderr but errors; stdout has the metrics alone in any case"""


def main() -> int:
    """Scores what the command line asks for; returns the exit code."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = jsonargparse.ArgumentParser(
        prog="predict.py", description="Predicts the labels of a file.", exit_on_error=False, allow_abbrev=False
    )
    parser.add_class_arguments(Options, as_group=False)
    try:
        options = Options(**vars(parser.instantiate(parser.parse_args())))
    except jsonargparse.ArgumentError as error:
        raise UserError(" ".join(str(error).split())) from None
    return predict(options)


def predict(options: Options) -> int:
    """Scores and writes; returns the exit code.

    Raises:
        UserError: no finished run, unreadable input, or an output of no known type.
    """
    config, label_names = load_finished_run(Path(options.run), options.model.name, options.model.revision)
    output = _output(options, config)
    set_environment()

    from trainer.adapter import find_trained_backbone, load_plain
    from trainer.backbone import silence_libraries
    from trainer.checkpoint import write_atomic
    from trainer.data import load_for_prediction
    from trainer.evaluation import score_split
    from trainer.metrics import classification_metrics
    from trainer.model import COMPUTE_TYPES
    from trainer.packed import PackedForward, PaddedForward, why_not_packed
    from trainer.processes import choose_precision, together
    from trainer.tokenising import tokenise

    silence_libraries()
    split, ids, warnings = load_for_prediction(
        _source(options), config.data, label_names, options.id_column, options.quiet
    )
    backbone, unverified = find_trained_backbone(Path(options.run), config.model, label_names)
    examples = tokenise(split, backbone.tokenizer, config.data.max_length, options.quiet)
    precision = choose_precision(options.precision)
    same = {"the input": examples.fingerprint(), "the backbone": backbone.fingerprint}
    with together(precision, same) as (accelerator, _):
        model = load_plain(backbone, Path(options.run) / "adapter", COMPUTE_TYPES[options.precision])
        model.to(accelerator.device)
        packed = config.model.packed is not False and why_not_packed(model) is None
        logits = score_split(
            PackedForward(model, None) if packed else PaddedForward(model),
            examples,
            accelerator,
            max_tokens=options.max_tokens,
            pad_token_id=backbone.tokenizer.pad_token_id,
            num_labels=len(label_names),
            progress=None if options.quiet or not accelerator.is_main_process else "predicting",
        )
    if accelerator.is_main_process:
        write_atomic(output, _rendered(options, ids, logits, label_names))
        if not options.quiet:
            for line in [*warnings, *unverified]:
                print(f"warning: {line}", file=sys.stderr)
            print(f"{len(ids)} predictions: {output}", file=sys.stderr)
        if split.labels is not None:
            scores = classification_metrics(logits, split.labels, label_names)
            print(json.dumps(scores, indent=2, ensure_ascii=False))
    return 0


def _output(options: Options, config: Config) -> Path:
    """The file to write, which must not be the input, data of the run, or a part of it."""
    output = Path(options.output)
    if output.suffix.lower() not in OUTPUT_TYPES:
        raise UserError(f"--output: {output} must end in {' or '.join(OUTPUT_TYPES)}")
    if not output.parent.is_dir():
        raise UserError(f"--output: no folder {output.parent}")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise UserError(f"--output: {output} cannot be written")
    if Path(options.run).resolve() in output.resolve().parents:
        raise UserError(f"--output: {output} lies in the run's folder; give another file")
    splits = (config.data.train, config.data.validation, config.data.test)
    used = [completed(split, config.data).path for split in splits if split]
    for what, patterns in (("the input", [options.input]), ("data of the run", used)):
        paths = [path for pattern in patterns for path in (pattern, *glob.glob(pattern)) if Path(path).exists()]
        if output.exists() and any(output.samefile(path) for path in paths):
            raise UserError(f"--output: {output} is {what}; give another file")
    return output


def _source(options: Options) -> Source:
    """The input's layout; what it leaves open is the run's."""
    return Source(
        path=options.input,
        column_names=options.column_names,
        text_columns=options.text_columns,
        text_pair_columns=options.text_pair_columns,
        label_column=NO_COLUMN if options.ignore_labels else options.label_column,
        label_names=options.label_names,
    )


def _rendered(options: Options, ids: list[str], logits: Any, label_names: list[str]) -> str:
    """The output file's text."""
    from trainer.evaluation import csv_text, predictions

    header = ["id", "prediction", "confidence", *(f"probability:{name}" for name in label_names)]
    rows: list[list[Any]] = [
        [example, name, max(shares), *shares]
        for example, (name, shares) in zip(ids, predictions(logits, label_names), strict=True)
    ]
    if options.layout == "contest":
        header = ["ID", "Label"]
        rows = [[row[0], label_names.index(row[1])] for row in rows]
    if options.output.lower().endswith(".jsonl"):
        return "".join(json.dumps(dict(zip(header, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    return csv_text([header, *[[f"{v:.6f}" if isinstance(v, float) else v for v in row] for row in rows]])


if __name__ == "__main__":
    sys.exit(main_guard(main, result_on_stdout=True))

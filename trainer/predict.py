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

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import jsonargparse
from jsonargparse.typing import PositiveInt

from trainer.config.labels import describe_look_alikes, is_number, match_labels, quoted
from trainer.config.loading import load_finished_run, parse_label_names
from trainer.config.schema import Config, Source, find_format_problems, resolve
from trainer.distributed.environment import read_environment, set_environment
from trainer.errors import UserError, main_guard

if TYPE_CHECKING:  # importing them takes seconds, and --help needs none of them
    import numpy as np

    from trainer.data.tokens import Examples
    from trainer.model.backbone import Backbone
    from trainer.packed.forward import Padding

OUTPUT_TYPES = (".csv", ".jsonl")
HEADERS = {"full": ("id", "prediction"), "contest": ("ID", "Label")}


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
    """csv, tsv, json, jsonl, parquet, ... file (or glob) with the run's text columns; with labels it is also scored"""
    output: str
    """csv or jsonl file to write"""
    layout: Literal["full", "contest"] = "full"
    """full = id, prediction, confidence and a probability per class; contest = ID,Label with the labels of the
    training data, or those of label_names"""
    id_column: str | None = None
    """column of the input that holds the ids; null = a column called ID, in any case, else the row; '' = the row,
    counted from 0"""
    column_names: list[str] | None = None
    """names of the columns of an input without a header; [] = its first row is the header; null = as the run's data"""
    delimiter: str | None = None
    """what separates the fields of csv and tsv; null = the run's, or by the name of the input"""
    encoding: str | None = None
    """encoding of csv, tsv, json and jsonl; null = the run's"""
    quoting: Literal["single_line", "multi_line", "none"] | None = None
    """what a quote means in csv and tsv (see data.quoting); null = the run's"""
    text_columns: list[str] | None = None
    """columns that hold the text; null = the run's"""
    text_pair_columns: list[str] | None = None
    """columns that hold the second text of a pair; null = the run's"""
    label_column: str | None = None
    """column that holds the labels, where there are any; null = the run's"""
    label_names: str | None = None
    """{label in the input: class name}, or [names for numbers counted from 0]; null = the run's"""
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
        told = re.sub('Parser key "([^"]*)":', r"--\1:", " ".join(str(error).split()))
        a_word = r"Does not validate .*\[list\[str\].* <class 'str'> Given value: (.*)"
        raise UserError(re.sub(a_word, r"'\1' is no list; write [\1]", told)) from None
    read_environment()
    return predict(options)


def predict(options: Options) -> int:
    """Scores and writes; returns the exit code.

    Raises:
        UserError: no finished run, unreadable input, or an output of no known type.
    """
    config, label_names = load_finished_run(Path(options.run), options.model.name, options.model.revision)
    if problems := list(find_format_problems("--", options.delimiter, options.encoding)):
        raise UserError("\n".join(problems))
    from trainer.data.sources import check_places

    check_places({"input": options.input})
    output = _output(options, config)
    set_environment()

    from trainer.data.corpus import id_columns, load_for_prediction
    from trainer.data.tokens import tokenise
    from trainer.files import write_atomic
    from trainer.model.adapter import find_trained_backbone
    from trainer.model.backbone import silence_libraries
    from trainer.packed.forward import Padding
    from trainer.tasks import TASKS
    from trainer.tasks.task import measure

    silence_libraries()
    source, task = _source(options), TASKS[config.task.type]
    _refuse_other_classes(source, label_names)
    summary = _summary(Path(options.run))
    labels, what_labels = labels_to_write(options, config, summary, label_names)
    id_column, what_ids = _id_column(options, id_columns(source, config.data) if options.id_column is None else [])
    split, ids, warnings = load_for_prediction(
        source, config.data, task, label_names, id_column, options.ignore_labels, options.quiet
    )
    backbone = find_trained_backbone(Path(options.run), config.model, label_names)
    examples = tokenise(split, backbone.tokenizer, config.data.max_length, options.quiet)
    padding = Padding(**summary.get("padding", {}))
    may_pack = config.model.packed is not False and padding.packs
    logits, is_main_process = _score(options, backbone, examples, padding, may_pack, len(label_names))
    assert len(ids) == len(split) == len(logits), "a row was lost"
    if is_main_process:
        columns = task.prediction_columns(logits, label_names)
        write_atomic(output, _rendered(options, ids, columns, dict(zip(label_names, labels, strict=True))))
        id_field, label_field = HEADERS[options.layout]
        told = [f"{len(ids)} predictions: {output}", f"{id_field} {what_ids}; {label_field} {what_labels}"]
        if not options.quiet:
            print(*(f"warning: {line}" for line in warnings), *told, sep="\n", file=sys.stderr)
        if split.labels is not None:
            scores = measure(task, logits, split.labels, label_names)
            print(json.dumps(scores, indent=2, ensure_ascii=False))
    return 0


def _score(
    options: Options, backbone: Backbone, examples: Examples, padding: Padding, may_pack: bool, num_labels: int
) -> tuple[np.ndarray, bool]:
    """Scores the examples on all processes; returns the logits [N, C], and whether this is the main process."""
    from trainer.distributed.session import choose_precision, join_processes
    from trainer.model.adapter import load_trained_model
    from trainer.model.build import COMPUTE_TYPES
    from trainer.packed.forward import PackedForward, PaddedForward, why_not_packed
    from trainer.training.scoring import score_split

    precision = choose_precision(options.precision)
    same = {"the input": examples.fingerprint(), "the backbone": backbone.fingerprint}
    with join_processes(precision, same) as (accelerator, _):
        model = load_trained_model(backbone, Path(options.run) / "adapter", COMPUTE_TYPES[options.precision])
        model.to(accelerator.device)
        logits = score_split(
            PackedForward(model, None) if may_pack and why_not_packed(model) is None else PaddedForward(model, padding),
            examples,
            accelerator,
            max_tokens=options.max_tokens,
            pad_token_id=backbone.tokenizer.pad_token_id,
            num_labels=num_labels,
            progress=None if options.quiet or not accelerator.is_main_process else "predicting",
        )
        return logits, accelerator.is_main_process


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
    from trainer.data.sources import files_of

    used = [resolve(split, config.data).path for split in splits if split]
    for what, patterns in (("the input", [options.input]), ("data of the run", used)):
        paths: list[str] = []
        for pattern in patterns:
            with contextlib.suppress(ValueError, KeyError):  # a folder that is no table any more
                paths += [path for path in files_of(pattern) if Path(path).exists()]
        if output.exists() and any(output.samefile(path) for path in paths):
            raise UserError(f"--output: {output} is {what}; give another file")
    return output


def _source(options: Options) -> Source:
    """The input's layout; what it leaves open is the run's."""
    return Source(
        path=options.input,
        column_names=options.column_names,
        delimiter=options.delimiter,
        encoding=options.encoding,
        quoting=options.quoting,
        text_columns=options.text_columns,
        text_pair_columns=options.text_pair_columns,
        label_column=options.label_column,
        label_names=parse_label_names(options.label_names) if options.label_names is not None else None,
    )


def _refuse_other_classes(source: Source, label_names: list[str]) -> None:
    given = source.label_names or ()
    names = list(given.values()) if isinstance(given, dict) else given
    for name in names:
        if not match_labels([name], label_names):
            hint = describe_look_alikes(name, label_names)
            raise UserError(f"--label_names: {name!r} is not a class of the run; classes: {quoted(label_names)}{hint}")


def _id_column(options: Options, found: list[str]) -> tuple[str | None, str]:
    """The column of the ids, None for the row's number, and what the output holds in words."""
    if options.id_column is not None:
        found = [options.id_column] if options.id_column else []
    if len(found) == 1:
        return found[0], f"holds column {found[0]!r} of the input"
    several = f", since {quoted(found)} could hold ids (see --id_column)" if found else ""
    return None, f"holds the row, counted from 0{several}"


def _summary(run: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--run: {run}: summary.json cannot be read: {error}") from None


def labels_to_write(
    options: Options, config: Config, summary: dict[str, Any], label_names: list[str]
) -> tuple[list[str], str]:
    """The label that the output holds for each class [C], and a sentence that says which labels these are."""
    from trainer.tasks import TASKS

    if options.layout == "full":
        return label_names, "holds the names of the classes"
    configured = resolve(config.data.train or "", config.data).label_names
    given = parse_label_names(options.label_names) if options.label_names is not None else None
    mappings: list[tuple[str, Any]] = [
        ("--label_names", given),
        ("the training data", summary.get("label_values")),
        ("data.label_names", configured),  # a run of an earlier version has no other record
    ]
    if configured is None or all(map(is_number, label_names)):
        mappings.append(("the training data", {name: name for name in label_names}))
    return TASKS[config.task.type].contest_labels(mappings, label_names)


def _rendered(options: Options, ids: list[str], columns: dict[str, list[Any]], written: dict[str, Any]) -> str:
    """The output file's text; `written` has what stands for each class."""
    from trainer.training.scoring import predictions_csv

    in_json = options.output.lower().endswith(".jsonl")
    if options.layout == "contest":
        if in_json and all(re.fullmatch("0|-?[1-9][0-9]*", label) for label in written.values()):
            written = {name: int(label) for name, label in written.items()}
        table = {"ID": ids, "Label": [written.get(name, name) for name in columns["prediction"]]}
    else:
        table = {"id": ids, **columns}
    if not in_json:
        return predictions_csv(table)
    rows = (dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    sys.exit(main_guard(main, result_on_stdout=True))

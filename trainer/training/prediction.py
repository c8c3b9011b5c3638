"""Finished runs score a file: predictions of every row, in the order of the rows.

Always holds: each row is scored exactly once on any number of processes. By default this computes in fp32 on the
backbone's original weights, so the numbers equal those of plain PEFT. Several runs are averaged, and only one model is
in memory at a time.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from trainer.config.labels import describe_look_alikes, match_labels, plural, quoted
from trainer.config.predict_options import FinishedRun, Options, source_of
from trainer.config.schema import Source, TaskConfig, chosen_overlap
from trainer.data.corpus import find_id_columns, load_for_prediction
from trainer.data.rows import TextSplit
from trainer.data.tokens import Examples, tokenize
from trainer.distributed.session import choose_precision, join_processes
from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.model.adapter import find_trained_backbone, load_constants, load_task, load_trained_model
from trainer.model.backbone import Backbone, silence_libraries
from trainer.model.build import COMPUTE_TYPES
from trainer.packed.forward import Padding, build_forward
from trainer.tasks import make_task
from trainer.tasks.shares import Shares, class_shares, describe_shares, find_shift
from trainer.tasks.task import Constants, Task, measure
from trainer.training.scoring import predictions_csv, refuse_broken_logits, score_split

HEADERS = {"full": ("id", "prediction"), "contest": ("ID", "Label")}
"""by layout: the columns of ids and of predictions"""


@dataclass(frozen=True)
class Member:
    """A run, and the input as its model reads it."""

    run: FinishedRun
    constants: Constants
    """of the task"""
    backbone: Backbone
    padding: Padding
    examples: Examples


def predict_file(options: Options, runs: list[FinishedRun]) -> None:
    """Scores the input, writes the output and, if the input has labels, prints its metrics.

    Predicts the mean of all runs. The first run says how the input is read, and what its labels are.
    """
    silence_libraries()
    first, source = runs[0], source_of(options)
    config, label_names = first.config, first.label_names
    task, summary = load_task(first.folder / "adapter", config.task, label_names), read_summary(first.folder)
    check_label_names(source, label_names, task.noun)
    labels, about_labels = choose_labels(options, task, summary, label_names)
    found = find_id_columns(source, config.data) if options.id_column is None else []
    id_column, about_ids = choose_id_column(options, found)
    split, ids, warnings = load_for_prediction(
        source, config.data, task, label_names, id_column, options.ignore_labels, options.quiet
    )
    members = [make_member(run, split, task.problem_type, options.quiet) for run in runs]
    each, is_main_process = _score(options, members)
    if not is_main_process:
        return
    for logits in each:
        refuse_broken_logits(logits, split.rows, "input", "--precision bf16 or no")
    task, logits = average(config.task, members, each)
    assert len(ids) == len(split) == len(logits), "a row was lost"
    columns = task.prediction_columns(logits, label_names)
    text = render_predictions(options, ids, columns, dict(zip(label_names, labels, strict=True)))
    write_atomic(Path(options.output).resolve(), text, is_shared=True)  # a link stays one
    shares = class_shares(task, logits, label_names, summary.get("data", {}).get("train", {}))
    if not options.quiet:
        id_field, label_field = HEADERS[options.layout]
        about_columns = f"{id_field} {about_ids}; {label_field} {about_labels}"
        lines = describe_output(options, len(ids), shares, warnings, about_columns)
        print(*lines, sep="\n", file=sys.stderr)
    if split.targets is not None:
        measured = {**measure(task, logits, split.targets, label_names), "class_shares": shares}
        print(json.dumps(measured, indent=2, ensure_ascii="utf" not in (sys.stdout.encoding or "").lower()))


def describe_output(
    options: Options, num_rows: int, shares: Shares, warnings: list[str], about_columns: str
) -> list[str]:
    """Lines for the user about what was written."""
    mean = f" (mean of {len(options.run)} runs)" if len(options.run) > 1 else ""
    return [
        *(f"warning: {line}" for line in [*warnings, find_shift(shares, num_rows)] if line),
        f"{num_rows} predictions{mean}: {options.output}",
        *([describe_shares(shares)] if shares else []),
        about_columns,
    ]


def make_member(run: FinishedRun, split: TextSplit, problem_type: str, quiet: bool) -> Member:
    """Finds the backbone of a run, without its weights, and makes tokens of the input."""
    backbone = find_trained_backbone(run.folder, run.config.model, run.label_names, problem_type)
    data = run.config.data
    examples = tokenize(split, backbone.tokenizer, data.max_length, quiet, overlap=chosen_overlap(data))
    padding = Padding(**read_summary(run.folder).get("padding", {}))
    constants = load_constants(run.folder / "adapter", run.config.task, run.label_names)
    return Member(run, constants, backbone, padding, examples)


def average(config: TaskConfig, members: list[Member], each: list[np.ndarray]) -> tuple[Task, np.ndarray]:
    """The task and the logits that predict the mean of what the members predict; those of a single one unchanged."""
    constants = [member.constants for member in members]
    if len(members) == 1:
        return make_task(config, constants[0]), each[0]
    logits, averaged = make_task(config).average(each, constants, members[0].run.label_names)
    return make_task(config, averaged), logits


def _score(options: Options, members: list[Member]) -> tuple[list[np.ndarray], bool]:
    """Scores the examples with one model after the other, on all processes.

    Returns:
        the logits of each member [N, C] in the label order of the first, and whether this is the main process.
    """
    precision = choose_precision(options.precision)
    facts: dict[str, str] = {}
    for i, member in enumerate(members, start=1):
        facts[f"the input of run {i}"] = member.examples.fingerprint()
        facts[f"the backbone of run {i}"] = member.backbone.identity.fingerprint
    with join_processes(precision, facts) as (accelerator, _):
        each = [_score_with(member, options, accelerator) for member in members]
        names = [member.run.label_names for member in members]
        order = [[own.index(name) for name in names[0]] for own in names]
        return [logits[:, own] for logits, own in zip(each, order, strict=True)], accelerator.is_main_process


def _score_with(member: Member, options: Options, accelerator: Accelerator) -> np.ndarray:
    """Loads the model of a run, and scores the examples; frees the model at the end."""
    run, backbone = member.run, member.backbone
    model = load_trained_model(backbone, run.folder / "adapter", COMPUTE_TYPES[options.precision])
    model.to(accelerator.device)
    return score_split(
        build_forward(model, backbone.tokenizer.pad_token_id, run.config.model.packed, member.padding),
        member.examples,
        accelerator,
        max_tokens=options.max_tokens,
        num_labels=len(run.label_names),
        progress=None if options.quiet or not accelerator.is_main_process else "predicting",
    )


def check_label_names(source: Source, label_names: list[str], noun: str) -> None:
    """Refuses `--label_names` that name no class of the run; `noun` is what the task calls them."""
    given = source.label_names or ()
    for name in given.values() if isinstance(given, dict) else given:
        if not match_labels([name], label_names):
            hint = describe_look_alikes(name, label_names)
            known = f"{plural(noun)}: {quoted(label_names)}"
            raise UserError(f"--label_names: {name!r} is not a {noun} of the run; {known}{hint}")


def choose_id_column(options: Options, found: list[str]) -> tuple[str | None, str]:
    """The column of the ids, None for the row's number; and a sentence about it."""
    if options.id_column is not None:
        found = [options.id_column] if options.id_column else []
    if len(found) == 1:
        return found[0], f"holds column {found[0]!r} of the input"
    several = f", since {quoted(found)} could hold ids (see --id_column)" if found else ""
    return None, f"holds the row, counted from 0{several}"


def read_summary(run: Path) -> dict[str, Any]:
    """summary.json of a finished run."""
    try:
        return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--run: {run}: summary.json cannot be read: {error}") from None


def choose_labels(
    options: Options, task: Task, summary: dict[str, Any], label_names: list[str]
) -> tuple[list[str], str]:
    """The label that the output holds for each class [C], and a sentence about them."""
    given, recorded = options.label_names, summary.get("label_values")
    mappings = [("--label_names", given), ("the training data", recorded)] if options.layout == "contest" else []
    return task.output_labels(mappings, label_names)


def render_predictions(options: Options, ids: list[str], columns: dict[str, list[Any]], labels: dict[str, Any]) -> str:
    """The text of the output; `labels` is {class name: what a contest's file holds for it}."""
    table: dict[str, list[Any]] = {"id": ids, **columns}
    in_json = options.output.lower().endswith(".jsonl")
    if options.layout == "contest":
        are_names = labels.keys() >= set(columns["prediction"])
        if in_json and are_names and all(re.fullmatch("0|-?[1-9][0-9]*", label) for label in labels.values()):
            labels = {name: int(label) for name, label in labels.items()}
        table = {"ID": ids, "Label": [labels.get(name, name) for name in columns["prediction"]]}
    if not in_json:
        return predictions_csv(table)
    rows = (dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True))
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

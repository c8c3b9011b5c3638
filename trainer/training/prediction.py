"""A finished run scores a file: predictions of every row, in the order of the rows.

Always holds: each row is scored exactly once on any number of processes. By default this computes in fp32 on the
backbone's original weights, so the numbers equal those of plain PEFT.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.labels import describe_look_alikes, match_labels, plural, quoted
from trainer.config.predict_options import Options, source_of
from trainer.config.schema import Config, Source, chosen_overlap
from trainer.data.corpus import find_id_columns, load_for_prediction
from trainer.data.tokens import Examples, tokenize
from trainer.distributed.session import choose_precision, join_processes
from trainer.errors import UserError
from trainer.files import write_atomic
from trainer.model.adapter import find_trained_backbone, load_task, load_trained_model
from trainer.model.backbone import Backbone, silence_libraries
from trainer.model.build import COMPUTE_TYPES
from trainer.packed.forward import Padding, build_forward
from trainer.tasks.task import Task, measure
from trainer.training.scoring import predictions_csv, score_split

HEADERS = {"full": ("id", "prediction"), "contest": ("ID", "Label")}
"""by layout: the columns of ids and of predictions"""


def predict_file(options: Options, config: Config, label_names: list[str]) -> None:
    """Scores the input, writes the output and, if the input has labels, prints its metrics.

    `config` and `label_names` are those of the run.
    """
    silence_libraries()
    run, source = Path(options.run), source_of(options)
    task = load_task(run / "adapter", config.task, label_names)
    check_label_names(source, label_names, task.noun)
    summary = read_summary(run)
    labels, about_labels = choose_labels(options, task, summary, label_names)
    found = find_id_columns(source, config.data) if options.id_column is None else []
    id_column, about_ids = choose_id_column(options, found)
    split, ids, warnings = load_for_prediction(
        source, config.data, task, label_names, id_column, options.ignore_labels, options.quiet
    )
    backbone = find_trained_backbone(run, config.model, label_names, task.problem_type)
    examples = tokenize(
        split, backbone.tokenizer, config.data.max_length, options.quiet, overlap=chosen_overlap(config.data)
    )
    padding = Padding(**summary.get("padding", {}))
    logits, is_main_process = _score(options, config, backbone, examples, padding, len(label_names))
    assert len(ids) == len(split) == len(logits), "a row was lost"
    if not is_main_process:
        return
    columns = task.prediction_columns(logits, label_names)
    text = render_predictions(options, ids, columns, dict(zip(label_names, labels, strict=True)))
    write_atomic(Path(options.output), text)
    if not options.quiet:
        id_field, label_field = HEADERS[options.layout]
        lines = [f"{len(ids)} predictions: {options.output}", f"{id_field} {about_ids}; {label_field} {about_labels}"]
        print(*(f"warning: {line}" for line in warnings), *lines, sep="\n", file=sys.stderr)
    if split.targets is not None:
        print(json.dumps(measure(task, logits, split.targets, label_names), indent=2, ensure_ascii=False))


def _score(
    options: Options, config: Config, backbone: Backbone, examples: Examples, padding: Padding, num_labels: int
) -> tuple[np.ndarray, bool]:
    """Scores the examples on all processes; returns the logits [N, C], and whether this is the main process."""
    precision = choose_precision(options.precision)
    same = {"the input": examples.fingerprint(), "the backbone": backbone.identity.fingerprint}
    with join_processes(precision, same) as (accelerator, _):
        model = load_trained_model(backbone, Path(options.run) / "adapter", COMPUTE_TYPES[options.precision])
        model.to(accelerator.device)
        logits = score_split(
            build_forward(model, backbone.tokenizer.pad_token_id, config.model.packed, padding),
            examples,
            accelerator,
            max_tokens=options.max_tokens,
            num_labels=num_labels,
            progress=None if options.quiet or not accelerator.is_main_process else "predicting",
        )
        return logits, accelerator.is_main_process


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

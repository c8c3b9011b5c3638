"""The splits of a run: checked texts with the targets of a task.

Always holds: a split has no empty text unless it is kept on purpose, only known labels, and the order of its source.
Messages about the data name the file and the row, and come before any weights are loaded. No row is removed:
duplicates are counted, and a hold-out keeps equal texts in one split.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.config.labels import INVISIBLE, look_alikes, plural, quoted
from trainer.config.schema import DataConfig, ResolvedSource, Source, TaskConfig, resolve
from trainer.data.formats import Columns
from trainer.data.rows import Table, TextSplit, read_table
from trainer.data.sources import find_origin, for_each, option_name
from trainer.errors import UserError
from trainer.tasks import Task, find_task, make_task
from trainer.tasks.task import Constants

MISSING_IDS = {"", "nan", "none", "null", "nat", "<na>"}
"""what libraries write for a missing value"""


@dataclass(frozen=True)
class Corpus:
    """All splits of a run, with one order of label names."""

    task: TaskConfig
    """with the type that the labels of train show"""
    constants: Constants
    """of the task, known before step 1"""
    label_names: list[str]
    """name of each logit, [C]"""
    label_values: dict[str, str]
    """{label of the training data: class name}; for a class that train lacks, the label that would mean it"""
    splits: dict[str, TextSplit]
    counts: dict[str, dict[str, Any]]
    """{split: numbers of examples, labels, and duplicates in train or rows that are also in train}"""
    warnings: list[str]
    """what the user should know, a line each"""


def load_corpus(config: DataConfig, task_config: TaskConfig, seed: int, quiet: bool = False) -> Corpus:
    """Reads and checks all splits of a run. Holds out a validation split if none is named."""
    named = [name for name in ("train", "validation", "test") if getattr(config, name) is not None]
    sources = {name: resolve(getattr(config, name), config) for name in named}
    _refuse_mixed_pairs(sources)
    separator = task_config.separator
    tables = for_each(named, lambda name: read_table(name, sources[name], quiet=quiet, separator=separator))
    train_labels = tables["train"].labels
    assert train_labels is not None, "read_table refuses a split without labels"
    found = find_task(task_config, train_labels)
    task = make_task(found)
    label_names, doubt = task.name_labels(train_labels)
    try:
        splits, counts, warnings = _make_splits(tables, config.validation_fraction, task, label_names, seed)
    except UserError as error:
        raise UserError("\n".join(filter(None, [doubt, str(error)]))) from None
    if doubt and len(label_names) > 20:  # a few rows with a class each are somebody's first try
        warnings.insert(0, doubt)
    if alike := look_alikes(label_names):
        shown = "; ".join(map(quoted, alike[:3])) + ("; ..." if len(alike) > 3 else "")
        warnings.append(f"{plural(task.noun)} differ only in {INVISIBLE}: {shown}")
    label_values = task.label_values(train_labels, label_names)
    constants = task.fit(splits["train"].known_targets, label_names) if task.fit is not None else {}
    return Corpus(found, constants, label_names, label_values, splits, counts, warnings)


def load_for_prediction(
    source: Source,
    config: DataConfig,
    task: Task,
    label_names: list[str],
    id_column: str | None,
    ignore_labels: bool = False,
    quiet: bool = False,
) -> tuple[TextSplit, list[str], list[str]]:
    """Reads one file with the label names of a finished run.

    Returns:
        The split, with labels if the file has them; the id of each example [N]; and warnings. The ids come from
        `id_column`, or are the rows counted from 0.
    """
    trained = resolve(config.train or "", config)
    full = resolve(source, trained)
    if bool(full.text_pair_columns) != bool(trained.text_pair_columns):
        has, lacks = ("the run", "--input") if trained.text_pair_columns else ("--input", "the run")
        raise UserError(f"--text_pair_columns: {has} has pairs of texts and {lacks} has single texts; both must agree")
    # every row gets a prediction
    full = replace(full, empty_text="keep")
    if ignore_labels:
        full = replace(full, label_column=None, label_columns=[])
    labels_required = bool(source.label_column or source.label_columns) and not ignore_labels
    table = read_table("input", full, labels_required, id_column, quiet, task.separator)
    warnings: list[str] = []
    split = _encode_labels(table, task, label_names, warnings)
    if table.ids is None:
        return split, [str(row) for row in split.rows], warnings
    return split, _check_ids(table, table.ids, f"--input: {full.path}: column {id_column!r}", warnings), warnings


def find_id_columns(source: Source, config: DataConfig) -> list[str]:
    """Finds the columns of an input that are called ID, in any case, and hold neither texts nor labels."""
    full = resolve(source, resolve(config.train or "", config))
    used = {*full.text_columns, *full.text_pair_columns, full.label_column, *full.label_columns}
    columns: Columns = next((columns for _, (_, columns) in find_origin("input", full).read_chunks([]) if columns), {})
    return [column for column in columns if column.strip().casefold() == "id" and column not in used]


def _refuse_mixed_pairs(sources: dict[str, ResolvedSource]) -> None:
    pairs = [name for name, source in sources.items() if source.text_pair_columns]
    single = [name for name in sources if name not in pairs]
    if pairs and single:
        raise UserError(
            f"{option_name(pairs[0])} has pairs of texts and {option_name(single[0])} has single texts; set "
            f"{option_name(single[0])}.text_pair_columns, or leave it out of {option_name(pairs[0])} too"
        )


def _make_splits(
    tables: dict[str, Table], validation_fraction: float, task: Task, label_names: list[str], seed: int
) -> tuple[dict[str, TextSplit], dict[str, dict[str, Any]], list[str]]:
    """Encodes the labels, holds out the validation split, and counts; returns the splits, the counts and warnings."""
    warnings: list[str] = []
    splits = for_each(tables, lambda name: _encode_labels(tables[name], task, label_names, warnings))
    texts = _number_texts(splits)
    warnings += _find_texts_with_two_labels(tables["train"], splits["train"], texts["train"])
    if "validation" not in splits and validation_fraction > 0:
        train, train_texts = splits.pop("train"), texts.pop("train")
        is_held = _hold_out(task.strata(train.known_targets), train_texts, validation_fraction, seed)
        parts = {"train": np.flatnonzero(~is_held), "validation": np.flatnonzero(is_held)}
        splits = {name: train.take(name, part) for name, part in parts.items()} | splits
        texts = {name: train_texts[part] for name, part in parts.items()} | texts
        held_out = task.count_labels(splits["validation"].known_targets, label_names)
        of_all = task.count_labels(train.known_targets, label_names)
        if rare := [name for name, count in of_all.items() if count and not held_out[name]]:
            warnings.append(f"too few rows to hold one out for validation: {quoted(rare)}")
    if fault := task.find_fault(splits["train"].known_targets, label_names):
        raise UserError(f"data.train: {splits['train'].path} {fault}")
    counts: dict[str, dict[str, Any]] = {}
    is_in_train = np.zeros(1 + max(numbers.max() for numbers in texts.values()), dtype=bool)
    is_in_train[texts["train"]] = True
    for name, split in splits.items():
        counts[name] = {"num_examples": len(split), "label_counts": task.count_labels(split.known_targets, label_names)}
        counts[name] |= {"num_in_train": int(is_in_train[texts[name]].sum())} if name != "train" else {}
    counts["train"]["num_duplicates"] = len(splits["train"]) - int(is_in_train.sum())
    if absent := [name for name, count in counts["train"]["label_counts"].items() if not count]:
        warnings.append(f"data.train has no example of {quoted(absent)}")
    return splits, counts, warnings


def _encode_labels(table: Table, task: Task, label_names: list[str], warnings: list[str]) -> TextSplit:
    """Encodes the labels of a table, and passes on its warnings."""
    warnings += table.warnings
    if table.labels is None:
        return table.split
    targets, doubts = task.encode(table.labels, label_names)
    warnings += doubts
    return replace(table.split, targets=targets)


def _hold_out(strata: np.ndarray, first: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Chooses the examples to hold out, bool [N]: a fraction of every stratum, see `Task.strata`.

    Of strata that overlap, an example is drawn in its first one, and each is filled up to its share. Rows of equal text
    stay together, in the stratum of the first of them: `first` [N] has its position. Without such rows, the choice
    depends on the strata and the seed alone.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5B117]))
    copies = np.bincount(first, minlength=len(strata))
    held = np.zeros(len(strata), dtype=bool)
    groups = strata if strata.ndim == 1 else strata.argmax(axis=1)
    found, sizes = np.unique(groups, return_counts=True)
    parts = np.split(np.argsort(groups, kind="stable"), np.cumsum(sizes)[:-1])
    for group, members in zip(found, parts, strict=True):
        num_wanted, num_held = int(len(members) * fraction + 0.5), 0
        if strata.ndim > 1:
            num_wanted = int(strata[:, group].sum() * fraction + 0.5) - int(copies[held & strata[:, group]].sum())
        drawn = generator.permutation(members[first[members] == members])
        drawn = drawn[copies[drawn] <= 2 * num_wanted][:num_wanted]
        for member, num_copies in zip(drawn.tolist(), copies[drawn].tolist(), strict=True):
            if num_held + num_copies / 2 <= num_wanted:  # else the stratum is closer to its share without them
                held[member] = True
                num_held += num_copies
    held = held[first]
    if not held.any() or held.all():
        together = ", equal texts together" if copies.max() > 1 else ""
        raise UserError(
            f"data.validation_fraction: {fraction} of {len(strata)} examples, stratified{together}, leaves train "
            "or validation empty; change it, or name data.validation"
        )
    return held


def _number_texts(splits: dict[str, TextSplit]) -> dict[str, np.ndarray]:
    """Numbers the examples of all splits from 0; an equal text has the number of the first one, int64 [N] a split."""
    digests = np.concatenate([split.digests for split in splits.values()])
    content = pa.py_buffer(np.ascontiguousarray(digests))
    array = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(digests), [None, content])
    codes = array.dictionary_encode().indices.to_numpy()
    first = np.empty(codes.max() + 1, dtype=np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # the last value that is written stays
    numbers = first[codes]
    ends = np.cumsum([len(split) for split in splits.values()])
    return dict(zip(splits, np.split(numbers, ends[:-1]), strict=True))


def _find_texts_with_two_labels(table: Table, train: TextSplit, first: np.ndarray) -> list[str]:
    """Warns of equal texts with different labels."""
    differs = train.known_targets != train.known_targets[first]
    others = np.flatnonzero(differs.reshape(len(train), -1).any(axis=1))
    if not len(others):
        return []
    rows = f"{table.describe_row(first[others[0]])} and {table.describe_row(others[0])}"
    return [f"data.train: texts with different labels: {len(np.unique(first[others])):,}, first in {rows}"]


def _check_ids(table: Table, ids: list[str], where: str, warnings: list[str]) -> list[str]:
    """Restores ids that a column of floats held: 100.0 becomes 100. Refuses ids that have lost digits."""
    are_floats = all(re.fullmatch(r"-?[0-9]+\.0+", text) for text in ids)
    whole = [text.partition(".")[0] for text in ids] if are_floats else ids
    first_rows: dict[str, int] = {}
    repeated = []
    fix = "--id_column '' uses row numbers"
    for row, text in enumerate(whole):
        if text.strip().lower() in MISSING_IDS:
            raise UserError(f"{where}: {table.describe_row(row)} has no id ({text!r}); {fix}")
        if re.fullmatch(r"-?[0-9]([.,][0-9]+)?[eE]\+[0-9]+", text) or (are_floats and abs(float(text)) >= 2**53):
            reason = f"{ids[row]!r} has lost digits; write the ids as text, or {fix}"
            raise UserError(f"{where}: {table.describe_row(row)}: {reason}")
        if first_rows.setdefault(text, row) != row:
            repeated.append(row)
    if are_floats:
        warnings.append(f"{where}: ids such as {ids[0]!r} are written as {whole[0]!r}")
    if repeated:
        text = whole[repeated[0]]
        rows = f"{table.describe_row(first_rows[text])} and {table.describe_row(repeated[0])}"
        warnings.append(f"{where}: repeated ids: {len(repeated):,}, first {text!r} in {rows}")
    return whole

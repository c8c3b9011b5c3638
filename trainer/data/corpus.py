"""Reading examples: hub data set or local file -> checked texts and targets, in splits.

Always holds: a split that leaves this module has no empty text, and only known labels; its order is the file's. What is
wrong with the data is said with the file and the row (counted from 1, the header not counted) before any weight is
loaded. Nothing is removed: duplicates are counted and reported, and a hold-out keeps equal texts in one split.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainer.config.labels import INVISIBLE, look_alikes, quoted
from trainer.config.schema import DataConfig, ResolvedSource, Source, resolve
from trainer.data.formats import Columns
from trainer.data.rows import Table, Texts, read_table
from trainer.data.sources import find_origin, for_each, option_name
from trainer.errors import UserError
from trainer.tasks.task import LabelColumn, Task

MISSING_IDS = {"", "nan", "none", "null", "nat", "<na>"}  # as libraries write a value that is missing


@dataclass(frozen=True)
class TextSplit:
    """One split as read: N texts (or pairs) with the targets of a task."""

    name: str
    """train, validation, test, or the file's name when predicting"""
    source: str
    """where it was read"""
    texts: Texts
    """[N]"""
    text_pairs: Texts | None
    """[N], or None for single texts"""
    labels: np.ndarray | None
    """targets, [N] or [N, C]; None for an unlabelled file"""
    rows: np.ndarray
    """row of each example in its source, counted from 0, int64 [N]"""
    digests: np.ndarray
    """128 bits of hash of each text or pair, uint64 [N, 2]"""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, name: str, positions: np.ndarray) -> TextSplit:
        """The examples at `positions`, as a split of its own."""
        rows = self.rows[positions]
        return replace(
            self,
            name=name,
            texts=replace(self.texts, rows=rows),
            text_pairs=self.text_pairs and replace(self.text_pairs, rows=rows),
            labels=self.labels[positions] if self.labels is not None else None,
            rows=rows,
            digests=self.digests[positions],
        )


@dataclass(frozen=True)
class Corpus:
    """All splits of a run, with one order of label names."""

    label_names: list[str]
    """of each logit, [C]"""
    label_values: dict[str, str]
    """{label of the training data: class name}; for a class that train lacks, the label that would mean it"""
    label_counts: dict[str, dict[str, int]]
    """{split: {class: number of examples}}"""
    splits: dict[str, TextSplit]
    equal_texts: dict[str, np.ndarray]
    """{split: a number for each example, equal for equal texts of all splits; -1 for a text that occurs once}"""
    warnings: list[str]
    """what the user should know, a line each"""

    def summary(self) -> dict[str, dict[str, Any]]:
        """Counts per split: examples, labels, duplicates within train, rows of the others found in train."""
        counts: dict[str, dict[str, Any]] = {
            name: {"num_examples": len(split), "label_counts": self.label_counts[name]}
            for name, split in self.splits.items()
        }
        in_train = np.unique(self.equal_texts["train"])
        in_train = in_train[in_train >= 0]
        for name, numbers in self.equal_texts.items():
            num_repeated = int(np.isin(numbers, in_train).sum())
            if name == "train":
                counts[name]["num_duplicates"] = num_repeated - len(in_train)
            else:
                counts[name]["num_in_train"] = num_repeated
        return counts


def load_corpus(config: DataConfig, task: Task, seed: int, quiet: bool = False) -> Corpus:
    """Reads and checks every split of a run; holds out the validation fraction where no validation is named.

    Raises:
        UserError: anything wrong with the data, every split's problem on a line of its own.
    """
    warnings: list[str] = []
    named = [name for name in ("train", "validation", "test") if getattr(config, name) is not None]
    sources = {name: resolve(getattr(config, name), config) for name in named}
    _refuse_mixed_pairs(sources)
    tables = for_each(named, lambda name: read_table(name, sources[name], quiet=quiet))
    label_names, doubt = task.name_labels(_label_column(tables["train"]))
    try:
        splits = for_each(tables, lambda name: _checked(tables[name], task, label_names, warnings))
        _refuse_fault(task, splits["train"], label_names)
        equal_texts = _equal_texts(splits)
        first = _first_of_equals(equal_texts["train"])
        warnings += _two_labels(tables["train"], splits["train"], first)
        if "validation" not in splits and config.validation_fraction > 0:
            train, numbers = splits.pop("train"), equal_texts.pop("train")
            held = _hold_out(task.strata(_targets(train)), first, config.validation_fraction, seed)
            parts = {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}
            splits = {name: train.take(name, part) for name, part in parts.items()} | splits
            equal_texts = {name: numbers[part] for name, part in parts.items()} | equal_texts
            held_out = task.count_labels(_targets(splits["validation"]), label_names)
            of_all = task.count_labels(_targets(train), label_names)
            if rare := [name for name, count in of_all.items() if count and not held_out[name]]:
                warnings.append(f"too few rows to hold one out for validation: {quoted(rare)}")
        _refuse_fault(task, splits["train"], label_names)
    except UserError as error:
        raise UserError(f"{doubt}\n{error}" if doubt else str(error)) from None
    counts = {name: task.count_labels(_targets(split), label_names) for name, split in splits.items()}
    if absent := [name for name, count in counts["train"].items() if not count]:
        warnings.append(f"data.train has no example of {quoted(absent)}")
    if doubt and len(label_names) > 20:  # a few rows with a class each are somebody's first try
        warnings.insert(0, doubt)
    if alike := look_alikes(label_names):
        shown = "; ".join(map(quoted, alike[:3])) + ("; ..." if len(alike) > 3 else "")
        warnings.append(f"classes differ only in {INVISIBLE}: {shown}")
    label_values = task.label_values(_label_column(tables["train"]), label_names)
    return Corpus(label_names, label_values, counts, splits, equal_texts, warnings)


def load_for_prediction(
    source: Source,
    config: DataConfig,
    task: Task,
    label_names: list[str],
    id_column: str | None,
    ignore_labels: bool = False,
    quiet: bool = False,
) -> tuple[TextSplit, list[str], list[str]]:
    """Reads one file with a finished run's label names; labels may be absent.

    Returns:
        the split; the id of each example, from `id_column` or its row counted from 0, [N]; and warnings.

    Raises:
        UserError: as `load_corpus`.
    """
    trained = resolve(config.train or "", config)
    full = resolve(source, trained)
    if bool(full.text_pair_columns) != bool(trained.text_pair_columns):
        has, lacks = ("the run", "--input") if trained.text_pair_columns else ("--input", "the run")
        raise UserError(f"--text_pair_columns: {has} has pairs of texts and {lacks} has single texts; both must agree")
    # each row of the input gets its prediction
    full = replace(full, empty_text="keep", label_column=None if ignore_labels else full.label_column)
    labels_required = source.label_column is not None and not ignore_labels
    table = read_table("input", full, labels_required, id_column, quiet)
    warnings: list[str] = []
    split = _checked(table, task, label_names, warnings)
    if table.ids is None:
        return split, [str(row) for row in split.rows], warnings
    return split, _whole_ids(table, table.ids, f"--input: {full.path}: column {id_column!r}", warnings), warnings


def id_columns(source: Source, config: DataConfig) -> list[str]:
    """The columns of an input that are called ID, in any case, and hold neither texts nor labels.

    Raises:
        UserError: an input that cannot be read.
    """
    full = resolve(source, resolve(config.train or "", config))
    used = {*full.text_columns, *full.text_pair_columns, full.label_column}
    columns: Columns = next((columns for _, (_, columns) in find_origin("input", full).read_chunks([]) if columns), {})
    return [column for column in columns if column.strip().casefold() == "id" and column not in used]


# --- checking ---------------------------------------------------------------------------------------------------------


def _refuse_mixed_pairs(sources: dict[str, ResolvedSource]) -> None:
    """All splits hold pairs of texts, or none does."""
    pairs = [name for name, source in sources.items() if source.text_pair_columns]
    single = [name for name in sources if name not in pairs]
    if pairs and single:
        raise UserError(
            f"{option_name(pairs[0])} has pairs of texts and {option_name(single[0])} has single texts; set "
            f"{option_name(single[0])}.text_pair_columns, or leave it out of {option_name(pairs[0])} too"
        )


def _label_column(table: Table) -> LabelColumn:
    source, codes = table.origin.source, table.label_codes
    return LabelColumn(
        option=table.origin.option,
        path=source.path,
        name=source.label_column or "",
        values=table.label_values,
        codes=codes if codes is not None else np.full(len(table.texts), -1),
        given_names=source.label_names,
        stored_names=table.origin.class_names,
        describe_row=table.describe_row,
    )


def _targets(split: TextSplit) -> np.ndarray:
    assert split.labels is not None
    return split.labels


def _refuse_fault(task: Task, train: TextSplit, label_names: list[str]) -> None:
    if fault := task.find_fault(_targets(train), label_names):
        raise UserError(f"data.train: {train.source} {fault}")


def _checked(table: Table, task: Task, label_names: list[str], warnings: list[str]) -> TextSplit:
    """A table's texts and targets.

    Raises:
        UserError: empty texts, missing or unknown labels; how many, and the first rows.
    """
    if table.problem is not None:
        raise UserError(table.problem)
    warnings += table.warnings
    labels = None
    if table.label_codes is not None:
        labels, doubts = task.encode(_label_column(table), label_names)
        warnings += doubts
        if _is_first_alone(table, table.label_codes):
            first = table.label_values[table.label_codes[0]]
            warnings.append(f"{table.origin.option}: is row 1 a header? Its label {first!r} is in no other row")
    rows = table.texts.rows
    return TextSplit(
        table.origin.name, table.origin.source.path, table.texts, table.text_pairs, labels, rows, table.digests
    )


def _is_first_alone(table: Table, codes: np.ndarray) -> bool:
    """Whether the first row of a file read without a header has a label of its own, and most others share theirs."""
    is_few = 2 * len(table.label_values) <= len(codes)
    return bool(table.origin.source.column_names) and is_few and np.count_nonzero(codes == codes[0]) == 1


def _hold_out(strata: np.ndarray, first: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Chooses the examples to hold out, bool [N]: a fraction of every stratum.

    Rows of equal text stay together, in the stratum of the first of them. Without such rows, the choice depends on the
    strata and the seed alone.

    Args:
        strata: number of the stratum of each example, int64 [N].
        first: position of the first example of the same text, [N].
        fraction: of the rows of every stratum.
        seed: of the run.
    """
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5B117]))
    copies = np.bincount(first, minlength=len(strata))
    held = np.zeros(len(strata), dtype=bool)
    sizes = np.unique(strata, return_counts=True)[1]
    for members in np.split(np.argsort(strata, kind="stable"), np.cumsum(sizes)[:-1]):
        num_wanted, num_held = int(len(members) * fraction + 0.5), 0
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
            f"data.validation_fraction: {fraction} of {len(strata)} examples, class by class{together}, leaves train "
            "or validation empty; change it, or name data.validation"
        )
    return held


def _equal_texts(splits: dict[str, TextSplit]) -> dict[str, np.ndarray]:
    """`Corpus.equal_texts` of these splits."""
    digests = np.concatenate([split.digests for split in splits.values()])
    suspects = _suspects(digests)
    numbers = np.full(len(digests), -1)
    numbers[suspects] = _numbered(digests[suspects])
    ends = np.cumsum([len(split) for split in splits.values()])
    return dict(zip(splits, np.split(numbers, ends[:-1]), strict=True))


def _first_of_equals(numbers: np.ndarray) -> np.ndarray:
    """Position of the first example of the same text, from `Corpus.equal_texts` of a split, int64 [N]."""
    first, repeated = np.arange(len(numbers)), np.flatnonzero(numbers >= 0)
    if len(repeated):
        firsts = np.zeros(numbers.max() + 1, dtype=np.int64)
        firsts[numbers[repeated[::-1]]] = repeated[::-1]  # the last that is written stays
        first[repeated] = firsts[numbers[repeated]]
    return first


def _two_labels(table: Table, train: TextSplit, first: np.ndarray) -> Iterator[str]:
    """A warning where one text has more than one label."""
    differs = _targets(train) != _targets(train)[first]
    others = np.flatnonzero(differs.reshape(len(train), -1).any(axis=1))
    if len(others):
        rows = f"{table.describe_row(first[others[0]])} and {table.describe_row(others[0])}"
        yield f"data.train: texts with more than one label: {len(np.unique(first[others])):,}, first in {rows}"


def _whole_ids(table: Table, ids: list[str], where: str, warnings: list[str]) -> list[str]:
    """Ids as they were before a column of floats held them: 100.0 becomes 100.

    Raises:
        UserError: ids that are missing, or have lost digits.
    """
    are_floats = all(re.fullmatch(r"-?[0-9]+\.0+", text) for text in ids)
    whole = [text.partition(".")[0] for text in ids] if are_floats else ids
    rows: dict[str, int] = {}
    repeated = []
    fix = "--id_column '' takes the row's number"
    for row, text in enumerate(whole):
        if text.strip().lower() in MISSING_IDS:
            raise UserError(f"{where}: {table.describe_row(row)} has no id ({text!r}); {fix}")
        if re.fullmatch(r"-?[0-9]([.,][0-9]+)?[eE]\+[0-9]+", text) or (are_floats and abs(float(text)) >= 2**53):
            raise UserError(
                f"{where}: {table.describe_row(row)}: {ids[row]!r} has lost digits; write the ids as text, or {fix}"
            )
        if rows.setdefault(text, row) != row:
            repeated.append(row)
    if are_floats:
        warnings.append(f"{where}: ids such as {ids[0]!r} are written as {whole[0]!r}")
    if repeated:
        text, again = whole[repeated[0]], table.describe_row(repeated[0])
        told = f"repeated ids: {len(repeated):,}, first {text!r} in {table.describe_row(rows[text])} and {again}"
        warnings.append(f"{where}: {told}")
    return whole


def _suspects(digests: np.ndarray) -> np.ndarray:
    """Positions of the digests [N, 2] whose first half occurs more than once: few, so that few are compared in full."""
    halves = np.ascontiguousarray(digests[:, 0])
    ordered = np.sort(halves)
    repeated = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(repeated) == 0:
        return np.zeros(0, dtype=np.int64)
    nearest = np.minimum(np.searchsorted(repeated, halves), len(repeated) - 1)
    return np.flatnonzero(repeated[nearest] == halves)


def _numbered(digests: np.ndarray) -> np.ndarray:
    """A number below N for each digest [N, 2], equal where digests are: int64 [N]."""
    if len(digests) == 0:
        return np.zeros(0, dtype=np.int64)
    order = np.lexsort(digests.T)
    ordered = digests[order]
    is_new = (ordered[1:] != ordered[:-1]).any(axis=1)
    numbers = np.zeros(len(digests), dtype=np.int64)
    numbers[order[1:]] = np.cumsum(is_new)
    return numbers

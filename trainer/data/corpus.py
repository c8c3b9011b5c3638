"""Reading examples: hub data set or local file -> checked texts and class numbers, in splits.

Always holds: a split that leaves this module has no empty text, and only known labels; its order is the file's. What is
wrong with the data is said with the file and the row (counted from 1, the header not counted) before any weight is
loaded. Nothing is removed: duplicates are counted and reported, and a hold-out keeps equal texts in one split.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trainer.config.labels import (
    INVISIBLE,
    describe_look_alikes,
    is_number,
    label_text,
    look_alikes,
    match_labels,
    quoted,
    short,
)
from trainer.config.schema import DataConfig, ResolvedSource, Source, resolve
from trainer.data.formats import Columns
from trainer.data.rows import Table, Texts, read_table
from trainer.data.sources import find_origin, for_each, option_name
from trainer.errors import UserError

MISSING_IDS = {"", "nan", "none", "null", "nat", "<na>"}  # as libraries write a value that is missing


@dataclass(frozen=True)
class TextSplit:
    """One split as read: N texts (or pairs) with class numbers."""

    name: str
    """train, validation, test, or the file's name when predicting"""
    source: str
    """where it was read"""
    texts: Texts
    """[N]"""
    text_pairs: Texts | None
    """[N], or None for single texts"""
    labels: np.ndarray | None
    """class numbers, int64 [N]; None for an unlabelled file"""
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
    """All splits of a run, with one order of classes."""

    label_names: list[str]
    """class number -> name, [C]"""
    label_values: dict[str, str]
    """{label of the training data: class name}; where train lacks a class, the label that would mean it"""
    splits: dict[str, TextSplit]
    equal_texts: dict[str, np.ndarray]
    """{split: a number for each example, equal for equal texts of all splits; -1 for a text that occurs once}"""
    warnings: list[str]
    """what the user should know, a line each"""

    def summary(self) -> dict[str, dict[str, Any]]:
        """Counts per split: examples, labels, duplicates within train, rows of the others found in train."""
        counts: dict[str, dict[str, Any]] = {}
        for name, split in self.splits.items():
            labels = split.labels if split.labels is not None else np.zeros(0, dtype=np.int64)
            per_class = np.bincount(labels, minlength=len(self.label_names)).tolist()
            counts[name] = {
                "num_examples": len(split),
                "label_counts": dict(zip(self.label_names, per_class, strict=True)),
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


def load_corpus(config: DataConfig, seed: int, quiet: bool = False) -> Corpus:
    """Reads and checks every split of a run; holds out the validation fraction where no validation is named.

    Raises:
        UserError: anything wrong with the data, every split's problem on a line of its own.
    """
    warnings: list[str] = []
    named = [name for name in ("train", "validation", "test") if getattr(config, name) is not None]
    sources = {name: resolve(getattr(config, name), config) for name in named}
    _refuse_mixed_pairs(sources)
    tables = for_each(named, lambda name: read_table(name, sources[name], quiet=quiet))
    label_names, doubt = _label_names(tables["train"])
    try:
        splits = for_each(tables, lambda name: _checked(tables[name], label_names, warnings))
        _refuse_single_class(splits["train"], label_names)
        equal_texts = _equal_texts(splits)
        first = _first_of_equals(equal_texts["train"])
        warnings += _two_labels(tables["train"], splits["train"], first)
        if "validation" not in splits and config.validation_fraction > 0:
            train, numbers = splits.pop("train"), equal_texts.pop("train")
            held = _hold_out(train, first, config.validation_fraction, seed)
            parts = {"train": np.flatnonzero(~held), "validation": np.flatnonzero(held)}
            splits = {name: train.take(name, part) for name, part in parts.items()} | splits
            equal_texts = {name: numbers[part] for name, part in parts.items()} | equal_texts
            nowhere = _absent(train, label_names)
            rare = [name for name in _absent(splits["validation"], label_names) if name not in nowhere]
            if rare:
                warnings.append(f"too few rows to hold one out for validation: {_few(rare)}")
        _refuse_single_class(splits["train"], label_names)
    except UserError as error:
        raise UserError(f"{doubt}\n{error}" if doubt else str(error)) from None
    if absent := _absent(splits["train"], label_names):
        warnings.append(f"data.train has no example of {_few(absent)}")
    if doubt and len(label_names) > 20:  # a few rows with a class each are somebody's first try
        warnings.insert(0, doubt)
    if alike := look_alikes(label_names):
        shown = "; ".join(map(quoted, alike[:3])) + ("; ..." if len(alike) > 3 else "")
        warnings.append(f"classes differ only in {INVISIBLE}: {shown}")
    return Corpus(label_names, _label_values(tables["train"], label_names), splits, equal_texts, warnings)


def load_for_prediction(
    source: Source,
    config: DataConfig,
    label_names: list[str],
    id_column: str | None,
    ignore_labels: bool = False,
    quiet: bool = False,
) -> tuple[TextSplit, list[str], list[str]]:
    """Reads one file with a finished run's classes; labels may be absent.

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
    split = _checked(table, label_names, warnings)
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


def _as_text(value: Any) -> str:
    """A class as a configuration names it, as `label_text` has those of the rows."""
    return label_text(value) or str(value)


def _label_names(train: Table) -> tuple[list[str], str | None]:
    """Class names in order, and why they may not be classes.

    The order is as configured, else as the data set says, else as found in train, sorted.
    """
    configured = train.origin.source.label_names or train.origin.class_names
    if configured:
        names = configured.values() if isinstance(configured, dict) else configured
        return list(dict.fromkeys(map(_as_text, names))), None
    found, num_rows = train.label_values, len(train.texts)
    doubt = None
    are_amounts = all(map(is_number, found)) and any("." in text for text in found)
    if len(found) > max(4, num_rows // 2) or (are_amounts and len(found) > 20):
        doubt = (
            f"{train.origin.option} has {len(found)} classes in {num_rows} rows; does column "
            f"{train.origin.source.label_column!r} hold the classes (data.label_column)?"
        )
    return sorted(found, key=lambda text: (0, float(text), text) if is_number(text) else (1, 0, text)), doubt


def _label_values(train: Table, label_names: list[str]) -> dict[str, str]:
    """{label of the training data: class name}; where train lacks a class, the label that would mean it."""
    meaning = _meaning(train, set(train.label_values), label_names)
    values = {value: meaning[label] for value, label in match_labels(train.label_values, meaning).items()}
    present = set(values.values())
    values |= {label: number for label, number in meaning.items() if number not in present}
    return {value: label_names[number] for value, number in values.items()}


def _refuse_mixed_pairs(sources: dict[str, ResolvedSource]) -> None:
    """All splits hold pairs of texts, or none does."""
    pairs = [name for name, source in sources.items() if source.text_pair_columns]
    single = [name for name in sources if name not in pairs]
    if pairs and single:
        raise UserError(
            f"{option_name(pairs[0])} has pairs of texts and {option_name(single[0])} has single texts; set "
            f"{option_name(single[0])}.text_pair_columns, or leave it out of {option_name(pairs[0])} too"
        )


def _checked(table: Table, label_names: list[str], warnings: list[str]) -> TextSplit:
    """A table's texts and class numbers.

    Raises:
        UserError: empty texts, missing or unknown labels; how many, and the first rows.
    """
    if table.problem is not None:
        raise UserError(table.problem)
    warnings += table.warnings
    labels = None
    if table.label_codes is not None:
        labels = _class_numbers(table, table.label_codes, label_names, warnings)
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


def _class_numbers(table: Table, codes: np.ndarray, label_names: list[str], warnings: list[str]) -> np.ndarray:
    """Positions in `table.label_values` -> class numbers [N]."""
    found = set(table.label_values)
    meaning = _meaning(table, found, label_names)
    matched = match_labels(found, meaning)
    numbers = np.array([meaning[matched[value]] if value in matched else -1 for value in table.label_values])[codes]
    unknown = np.flatnonzero(numbers < 0)
    if len(unknown):
        first = table.label_values[codes[unknown[0]]]
        row = table.describe_row(unknown[0])
        told = f"{len(unknown)} of {len(codes)} labels are unknown, first {short(first)} in {row}"
        raise UserError(_unknown_label(table, told, first, label_names, meaning))
    if _could_count_otherwise(found, meaning):
        read = ", ".join(f"{value} = {label_names[meaning[matched[value]]]}" for value in sorted(found)[:4])
        warnings.append(f"{table.origin.option}: its labels could count from 0 or from 1; they were read as {read}")
    return numbers


def _meaning(table: Table, found: set[str], label_names: list[str]) -> dict[str, int]:
    """What the values of a label column stand for: {value: class number}.

    A split is read in one way throughout: by its own mapping or its own list of names, or all as names, or all as
    numbers counted from 0. The last only where no class is itself called by a number: classes found as 1 to 4 in train
    never meet a test split that counts from 0.
    """
    names = {name: i for i, name in enumerate(label_names)}
    given: Any = table.origin.source.label_names or table.origin.class_names or {}
    if isinstance(given, list):
        # a hub's numbers always count from 0
        counted = given is table.origin.class_names or list(map(_as_text, given)) != label_names
        given = dict(enumerate(given)) if counted else {}
    own = {_as_text(value): _as_text(name) for value, name in given.items()}
    if own and (len(match_labels(found, own)) == len(found) or not match_labels(found, names)):
        classes = match_labels(own.values(), names)
        strangers = sorted(set(own.values()) - set(classes))
        if strangers:
            has = "label_names maps to" if table.origin.source.label_names else "its stored class names have"
            told = f"{has} {strangers[0]!r}, which is not a class of train: {_few(names)} (see label_names)"
            raise UserError(f"{table.origin.option}: {told}")
        return {value: names[classes[name]] for value, name in own.items()}
    if all(map(is_number, found)) and not any(map(is_number, names)):
        return {str(i): i for i in range(len(label_names))}
    return names


def _could_count_otherwise(found: set[str], meaning: dict[str, int]) -> bool:
    """Whether the labels found are numbers that fit a count from 0 as well as one from 1."""
    for first, telling in ((0, "0"), (1, str(len(meaning)))):
        if set(meaning) == {str(first + i) for i in range(len(meaning))}:
            return telling not in found
    return False


def _unknown_label(table: Table, told: str, label: str, label_names: list[str], meaning: dict[str, int]) -> str:
    message = f"{table.origin.option}: {table.origin.source.path}: {told}; known: {_few(meaning)}"
    message += describe_look_alikes(label, meaning)
    message += "; --ignore_labels true reads none" if table.origin.name == "input" else ""
    count = len(label_names)
    counts_from = [n for n in (0, 1) if set(table.label_values) <= {str(n + i) for i in range(count)}]
    if counts_from and count <= 20:
        first = counts_from[0]
        words = [name if re.fullmatch(r"\w[\w /.-]*", name) else json.dumps(name) for name in label_names]
        example = shlex.quote(f"{{{', '.join(f'{first + i}: {word}' for i, word in enumerate(words))}}}")
        flag = "--label_names" if table.origin.name == "input" else f"--{table.origin.option}.label_names"
        message += f"\n{table.origin.option} counts its labels from {first}; map them: {flag} {example}"
    return message


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(map(short, names[:12])) + (f", ... ({len(names)})" if len(names) > 12 else "")


def _refuse_single_class(train: TextSplit, label_names: list[str]) -> None:
    assert train.labels is not None
    present = set(np.flatnonzero(np.bincount(train.labels)).tolist())
    if len(present) < 2:
        name = label_names[next(iter(present))]
        raise UserError(f"data.train: {train.source} has a single class, {name!r}; a classifier needs two")


def _absent(split: TextSplit, label_names: list[str]) -> list[str]:
    """The classes of which a labelled split has no example."""
    assert split.labels is not None
    counts = np.bincount(split.labels, minlength=len(label_names))
    return [name for name, count in zip(label_names, counts, strict=True) if count == 0]


def _hold_out(train: TextSplit, first: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Which examples to hold out, bool [N]: a fraction of every class.

    Rows of equal text stay together, in the class of the first of them. Without such rows, the choice is a function of
    the labels and the seed alone.

    Args:
        train: N examples.
        first: position of the first example of the same text, [N].
        fraction: of the rows of every class.
        seed: of the run.
    """
    assert train.labels is not None
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5B117]))
    copies = np.bincount(first, minlength=len(train))
    held = np.zeros(len(train), dtype=bool)
    sizes = np.unique(train.labels, return_counts=True)[1]
    for members in np.split(np.argsort(train.labels, kind="stable"), np.cumsum(sizes)[:-1]):
        num_wanted, num_held = int(len(members) * fraction + 0.5), 0
        drawn = generator.permutation(members[first[members] == members])
        drawn = drawn[copies[drawn] <= 2 * num_wanted][:num_wanted]
        for member, num_copies in zip(drawn.tolist(), copies[drawn].tolist(), strict=True):
            if num_held + num_copies / 2 <= num_wanted:  # else the class is closer to its share without them
                held[member] = True
                num_held += num_copies
    held = held[first]
    if not held.any() or held.all():
        together = ", equal texts together" if copies.max() > 1 else ""
        raise UserError(
            f"data.validation_fraction: {fraction} of {len(train)} examples, class by class{together}, leaves train or "
            "validation empty; change it, or name data.validation"
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
    assert train.labels is not None
    others = np.flatnonzero(train.labels != train.labels[first])
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

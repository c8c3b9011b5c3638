"""Reading examples: hub data set or local file -> checked texts and labels -> token ids.

Always holds: a split that leaves this module has no empty text, only known labels, and no padding; its order is the
file's. What is wrong with the data is said with the file and the row (counted from 1, the header not counted) before
any weight is loaded. Nothing is removed: duplicates are counted and reported.

Tokenising follows the fast tokenizers of `tokenizers`; its result is kept by `datasets` under a hash of the texts, the
tokenizer and the settings, so a second run starts at once and a changed file can never meet an old cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
from filelock import FileLock
from transformers import PreTrainedTokenizerBase

from trainer.config import DataConfig, Source, UserError
from trainer.reading import Table, completed, read_table

SHOWN = 5  # how many rows an error names
_Part = TypeVar("_Part")


@dataclass(frozen=True)
class TextSplit:
    """One split as read: N texts (or pairs) with class numbers."""

    name: str
    """train, validation, test, or the file's name when predicting"""
    source: str
    """where it was read"""
    texts: list[str]
    """[N]"""
    text_pairs: list[str] | None
    """[N], or None for single texts"""
    labels: np.ndarray | None
    """class numbers, int64 [N]; None for an unlabelled file"""
    rows: np.ndarray
    """row of each example in its source, counted from 0, int64 [N]"""

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, name: str, positions: np.ndarray) -> TextSplit:
        """The examples at `positions`, as a split of its own."""
        return dataclasses.replace(
            self,
            name=name,
            texts=[self.texts[i] for i in positions],
            text_pairs=[self.text_pairs[i] for i in positions] if self.text_pairs is not None else None,
            labels=self.labels[positions] if self.labels is not None else None,
            rows=self.rows[positions],
        )


@dataclass(frozen=True)
class Corpus:
    """All splits of a run, with one order of classes."""

    label_names: list[str]
    """class number -> name, [C]"""
    splits: dict[str, TextSplit]
    warnings: list[str]
    """what the user should know, a line each"""

    def summary(self) -> dict[str, dict[str, Any]]:
        """Counts per split: examples, labels, duplicates within train, rows of test found in train."""
        counts: dict[str, dict[str, Any]] = {}
        for name, split in self.splits.items():
            per_class = Counter(split.labels.tolist() if split.labels is not None else [])
            counts[name] = {
                "num_examples": len(split),
                "label_counts": {label: per_class[i] for i, label in enumerate(self.label_names)},
            }
        train = self.splits["train"]
        train_keys = set(_keys(train))
        counts["train"]["num_duplicates"] = len(train) - len(train_keys)
        if "test" in self.splits:
            counts["test"]["num_in_train"] = sum(key in train_keys for key in _keys(self.splits["test"]))
        return counts


@dataclass(frozen=True)
class Examples:
    """One tokenised split: N examples end to end, without padding."""

    tokens: np.ndarray
    """token ids of all examples, int32 [sum of lengths]"""
    offsets: np.ndarray
    """example i is tokens[offsets[i]:offsets[i + 1]], int64 [N + 1]"""
    token_types: np.ndarray | None
    """segment of each token for text pairs, int8 [sum of lengths]; None where the model uses none"""
    labels: np.ndarray
    """class numbers, int64 [N]; zeros for an unlabelled file"""
    lengths: np.ndarray
    """tokens per example after truncation, int64 [N]"""

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """SHA-256 over tokens, boundaries and labels: equal exactly where two splits train alike."""
        digest = hashlib.sha256()
        types = () if self.token_types is None else (self.token_types,)
        for array in (self.tokens, self.offsets, self.labels, *types):
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def load_corpus(config: DataConfig, seed: int) -> Corpus:
    """Reads and checks every split of a run; holds out the validation fraction where no validation is named.

    Raises:
        UserError: anything wrong with the data, every split's problem on a line of its own.
    """
    warnings: list[str] = []
    named = [name for name in ("train", "validation", "test") if getattr(config, name) is not None]
    tables = _for_each(named, lambda name: read_table(name, completed(getattr(config, name), config)))
    label_names = _label_names(tables["train"], warnings)
    splits = _for_each(tables, lambda name: _checked(tables[name], label_names, warnings))
    if "validation" not in splits and config.validation_fraction > 0:
        held = _hold_out(splits["train"], config.validation_fraction, seed)
        splits = held | {name: split for name, split in splits.items() if name not in held}
    _check_classes(splits["train"], label_names, warnings)
    return Corpus(label_names, splits, warnings)


def load_for_prediction(
    source: Source, config: DataConfig, label_names: list[str], id_column: str | None
) -> tuple[TextSplit, list[str], list[str]]:
    """Reads one file with a finished run's classes; labels may be absent.

    Returns:
        the split; the id of each example, from `id_column` or its row counted from 0, [N]; and warnings.

    Raises:
        UserError: as `load_corpus`.
    """
    table = read_table("input", completed(source, config), labels_required=False, extra=id_column)
    warnings: list[str] = []
    split = _checked(table, label_names, warnings)
    return split, [str(value) for value in (table.columns[id_column] if id_column else split.rows)], warnings


def tokenise(split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, quiet: bool = False) -> Examples:
    """Token ids of a split, from the cache where this very text was tokenised before in this very way.

    Args:
        split: N examples.
        tokenizer: a fast tokenizer.
        max_length: tokens per example at most, special tokens included.
        quiet: no progress bar.
    """
    with_types = split.text_pairs is not None and "token_type_ids" in tokenizer.model_input_names
    key = _cache_key(split, tokenizer, max_length)
    table = _cached_map(split, key, quiet, lambda batch: _encode(batch, tokenizer, max_length, with_types)).data
    lengths = pa.compute.list_value_length(table.column("input_ids")).to_numpy().astype(np.int64)
    types = pa.compute.list_flatten(table.column("token_type_ids")).to_numpy() if with_types else None
    return Examples(
        tokens=pa.compute.list_flatten(table.column("input_ids")).to_numpy(),
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        token_types=types,
        labels=split.labels if split.labels is not None else np.zeros(len(split), dtype=np.int64),
        lengths=lengths,
    )


# --- checking ---------------------------------------------------------------------------------------------------------


def _for_each(names: Iterable[str], part: Callable[[str], _Part]) -> dict[str, _Part]:
    """{name: part(name)}; what is wrong with several is said together."""
    parts: dict[str, _Part] = {}
    problems: list[str] = []
    for name in names:
        try:
            parts[name] = part(name)
        except UserError as error:
            problems.append(str(error))
    if problems:
        raise UserError("\n".join(problems))
    return parts


def _label_text(value: Any) -> str | None:
    """A label as text; whole numbers read alike from csv ("1"), json (1) and parquet (1.0). None where missing."""
    if value is None or value != value:
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?[0-9]{1,9}", text) is not None


def _label_names(train: Table, warnings: list[str]) -> list[str]:
    """Class names in order: as configured, else as the hub says, else as found in train, sorted."""
    configured = train.layout.label_names or train.class_names
    if configured:
        names = configured.values() if isinstance(configured, dict) else configured
        return [str(name) for name in dict.fromkeys(names)]
    values = train.columns[train.layout.label_column or ""]
    found = {text for text in map(_label_text, values) if text is not None}
    if len(found) > max(20, len(values) // 2):
        warnings.append(
            f"{train.where} has {len(found)} classes in {len(values)} rows; does column "
            f"{train.layout.label_column!r} hold the classes (data.label_column)?"
        )
    return sorted(found, key=lambda text: (0, int(text), text) if _is_number(text) else (1, 0, text))


def _checked(table: Table, label_names: list[str], warnings: list[str]) -> TextSplit:
    """A table's texts and class numbers.

    Raises:
        UserError: empty texts, missing or unknown labels; how many, and the first rows.
    """
    texts = _joined(table, table.layout.text_columns or [])
    pairs = _joined(table, table.layout.text_pair_columns) if table.layout.text_pair_columns else None
    labels = None
    if table.has_labels:
        column = table.layout.label_column or ""
        _refuse_what_is_no_text(table, column)
        values = [_label_text(value) for value in table.columns[column]]
        _refuse_missing(table, "label", [i for i, value in enumerate(values) if value is None])
        labels = _class_numbers(table, [value or "" for value in values], label_names, warnings)
    return TextSplit(table.name, table.source, texts, pairs, labels, np.arange(len(texts)))


def _joined(table: Table, columns: Sequence[str]) -> list[str]:
    parts: list[list[str]] = []
    for column in columns:
        _refuse_what_is_no_text(table, column)
        parts.append(["" if v is None or v != v else str(v).strip() for v in table.columns[column]])
    texts = [" ".join(filter(None, row)) for row in zip(*parts, strict=True)]
    _refuse_missing(table, f"text ({', '.join(columns)})", [i for i, text in enumerate(texts) if not text])
    return texts


def _refuse_what_is_no_text(table: Table, column: str) -> None:
    for index, value in enumerate(table.columns[column]):
        if isinstance(value, list | dict | bytes):
            kind = f"a {type(value).__name__}, no text"
        elif isinstance(value, str) and not value.isascii() and re.search("[\ud800-\udfff]", value):
            kind = "half a character (a lone surrogate such as \\ud83d)"
        else:
            continue
        raise UserError(f"{table.where}: {table.source}: row {index + 1}: column {column!r} holds {kind}")


def _refuse_missing(table: Table, what: str, rows: list[int]) -> None:
    if rows:
        first = ", ".join(str(row + 1) for row in rows[:SHOWN])
        more = ", ..." if len(rows) > SHOWN else ""
        count = f"{len(rows)} row{'s have' if len(rows) > 1 else ' has'}"
        raise UserError(f"{table.where}: {table.source}: {count} an empty or missing {what}: row {first}{more}")


def _class_numbers(table: Table, values: list[str], label_names: list[str], warnings: list[str]) -> np.ndarray:
    """Values of the label column -> class numbers [N]."""
    found = set(values)
    meaning = _meaning(table, found, label_names)
    unknown = [i for i, value in enumerate(values) if value not in meaning]
    if unknown:
        raise UserError(_unknown_label(table, values, unknown, label_names, meaning))
    if _could_count_otherwise(found, meaning):
        read = ", ".join(f"{value} = {label_names[meaning[value]]}" for value in sorted(found)[:4])
        warnings.append(f"{table.where}: its labels could count from 0 or from 1; they were read as {read}")
    return np.array([meaning[value] for value in values], dtype=np.int64)


def _meaning(table: Table, found: set[str], label_names: list[str]) -> dict[str, int]:
    """What the values of a label column stand for: {value: class number}.

    A split is read in one way throughout: by its own mapping or its own list of names, or all as names, or all as
    numbers counted from 0. The last only where no class is itself called by a number: classes found as 1 to 4 in train
    never meet a test split that counts from 0.
    """
    names = {name: i for i, name in enumerate(label_names)}
    own = table.layout.label_names or table.class_names or {}
    if isinstance(own, list):
        own = {str(i): str(name) for i, name in enumerate(own)} if [str(name) for name in own] != label_names else {}
    if own and (found <= set(own) or not found & set(names)):
        strangers = sorted({str(name) for name in own.values()} - set(names))
        if strangers:
            raise UserError(
                f"{table.where}: label_names maps to {strangers[0]!r}, which is no class of train: {_few(names)}"
            )
        return {str(value): names[str(name)] for value, name in own.items()}
    if all(map(_is_number, found)) and not any(map(_is_number, names)):
        return {str(i): i for i in range(len(label_names))}
    return names


def _could_count_otherwise(found: set[str], meaning: dict[str, int]) -> bool:
    """Whether the labels found are numbers that fit a count from 0 as well as one from 1."""
    for first, telling in ((0, "0"), (1, str(len(meaning)))):
        if set(meaning) == {str(first + i) for i in range(len(meaning))}:
            return telling not in found
    return False


def _unknown_label(
    table: Table, values: list[str], unknown: list[int], label_names: list[str], meaning: dict[str, int]
) -> str:
    message = (
        f"{table.where}: {table.source}: {len(unknown)} of {len(values)} labels are unknown, first "
        f"{values[unknown[0]]!r} in row {unknown[0] + 1}; known: {_few(meaning)}"
    )
    count = len(label_names)
    counts_from = [n for n in (0, 1) if set(values) <= {str(n + i) for i in range(count)}]
    if counts_from and count <= 20:
        first = counts_from[0]
        example = ", ".join(f"{first + i}: {name}" for i, name in enumerate(label_names))
        option = "--label_names" if table.name == "input" else f"--{table.where}.label_names"
        message += f"\n{table.where} counts its labels from {first}; map them: {option} '{{{example}}}'"
    return message


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:12])) + (f", ... ({len(names)})" if len(names) > 12 else "")


def _check_classes(train: TextSplit, label_names: list[str], warnings: list[str]) -> None:
    assert train.labels is not None
    present = set(train.labels.tolist())
    if len(present) < 2:
        name = label_names[next(iter(present))]
        raise UserError(f"data.train: {train.source} has a single class, {name!r}; a classifier needs two")
    absent = [name for i, name in enumerate(label_names) if i not in present]
    if absent:
        warnings.append(f"data.train has no example of {_few(absent)}")


def _hold_out(train: TextSplit, fraction: float, seed: int) -> dict[str, TextSplit]:
    """Train without, and validation with, a fraction of every class; a function of the labels and the seed alone."""
    assert train.labels is not None
    generator = np.random.Generator(np.random.Philox(key=[seed, 0x5B117]))
    held = np.zeros(len(train), dtype=bool)
    for label in np.unique(train.labels):
        members = np.flatnonzero(train.labels == label)
        held[generator.permutation(members)[: int(len(members) * fraction + 0.5)]] = True
    if not held.any() or held.all():
        raise UserError(
            f"data.validation_fraction: {fraction} of {len(train)} examples leaves train or validation empty; "
            "change it, or name data.validation"
        )
    return {
        "train": train.take("train", np.flatnonzero(~held)),
        "validation": train.take("validation", np.flatnonzero(held)),
    }


def _keys(split: TextSplit) -> Iterator[bytes]:
    pairs = split.text_pairs if split.text_pairs is not None else [""] * len(split)
    for text, pair in zip(split.texts, pairs, strict=True):
        # with its length, so that no text that holds a \0 reads like another pair
        yield hashlib.blake2b(f"{len(text)}\0{text}{pair}".encode("utf-8", "surrogatepass"), digest_size=16).digest()


# --- tokenising -------------------------------------------------------------------------------------------------------


def _encode(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int, with_types: bool
) -> dict[str, Any]:
    encoded = tokenizer(
        batch["text"],
        batch.get("text_pair"),
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
        return_token_type_ids=with_types,
    )
    return dict(encoded)


def _cache_key(split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # set by earlier calls, so not part of what the tokenizer is
    settings.pop("truncation", None)
    settings.pop("padding", None)
    header = [type(tokenizer).__name__, settings, max_length, tokenizer.model_input_names, split.text_pairs is None, 2]
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for key in _keys(split):
        digest.update(key)
    return digest.hexdigest()[:32]


def _cached_map(split: TextSplit, key: str, quiet: bool, encode: Callable[..., dict[str, Any]]) -> datasets.Dataset:
    """The split through `encode`, or what an earlier run kept of it."""
    columns = {"text": split.texts} | ({"text_pair": split.text_pairs} if split.text_pairs is not None else {})
    source = datasets.Dataset.from_dict(columns)
    settings: dict[str, Any] = {
        "batched": True,
        "remove_columns": list(columns),
        "new_fingerprint": key,
        "desc": f"tokenising {split.name}",
    }
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "isotrain"
    if quiet or not sys.stderr.isatty() or os.environ.get("LOCAL_RANK", "0") != "0":
        datasets.disable_progress_bars()
    try:
        if not _is_writable(folder):  # a read-only home: slower the second time, nothing worse
            return source.map(encode, keep_in_memory=True, **settings)
        path = folder / f"{key}.arrow"
        with FileLock(f"{path}.lock"):
            if path.exists() and not _is_complete(path, len(split)):
                path.unlink()
            return source.map(encode, cache_file_name=str(path), load_from_cache_file=True, **settings)
    finally:
        datasets.enable_progress_bars()


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _is_complete(path: Path, num_examples: int) -> bool:
    try:
        return len(datasets.Dataset.from_file(str(path))) == num_examples
    except (pa.ArrowException, OSError):
        return False

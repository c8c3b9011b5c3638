"""Labels that are names of classes: their order, and the class that each label of a source means.

Always holds: a source is read in one way throughout. It is read by its own mapping or list of names, or all its labels
are names, or all are numbers counted from 0.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.config.labels import describe_look_alikes, is_number, label_text, match_labels, plural, quoted
from trainer.errors import UserError
from trainer.tasks.task import LabelColumn, Mappings


def name_classes(train: LabelColumn, noun: str = "class") -> tuple[list[str], str | None]:
    """Class names in order, and why the column may not hold classes. `noun` is what messages call them.

    The order is that of label_names, else that stored with the data. Otherwise the labels that occur are sorted.
    """
    if names := train.given_names or train.stored_names:
        return list(dict.fromkeys(map(_as_text, names.values() if isinstance(names, dict) else names))), None
    found, doubt = train.texts(), None
    if len(found) > max(4, len(train.codes) // 2):
        doubt = (
            f"{train.option} has {len(found)} {plural(noun)} in {len(train.codes)} rows; does column "
            f"{train.columns[0]!r} hold the {plural(noun)} (data.label_column)?"
        )
    return sorted(found, key=lambda text: (0, float(text), text) if is_number(text) else (1, 0, text)), doubt


def class_numbers(column: LabelColumn, label_names: list[str], noun: str = "class") -> tuple[np.ndarray, list[str]]:
    """The class number of each example, int64 [N], and warnings.

    Raises:
        UserError: a label that means no class.
    """
    meaning, found = _meaning(column, label_names, noun), column.texts()
    matched = match_labels(found, meaning)
    numbers = [meaning[matched[value]] if value in matched else -1 for value in found]
    targets = np.array(numbers)[column.codes]
    if len(unknown := np.flatnonzero(targets < 0)):
        raise UserError(_describe_unknown(column, unknown, label_names, meaning))
    if not _could_count_otherwise(found, meaning):
        return targets, []
    read = ", ".join(f"{value} = {label_names[meaning[matched[value]]]}" for value in sorted(found)[:4])
    return targets, [f"{column.option}: its labels could count from 0 or from 1; they were read as {read}"]


def class_values(train: LabelColumn, label_names: list[str]) -> dict[str, str]:
    """{label of the training data: class name}; for a class that train lacks, the label that would mean it."""
    meaning = _meaning(train, label_names, "class")
    values = {value: meaning[label] for value, label in match_labels(train.texts(), meaning).items()}
    present = set(values.values())
    values |= {label: number for label, number in meaning.items() if number not in present}
    return {value: label_names[number] for value, number in values.items()}


def named_weights(class_weights: Mapping[str, float] | None, label_names: list[str], noun: str = "class") -> np.ndarray:
    """The weight of each class, float64 [C]; 1 for a class that is not named.

    Raises:
        UserError: a class that does not exist or is named twice, or a weight below 0.
    """
    weights = class_weights or {}
    matched = match_labels(weights, label_names)
    if unknown := sorted(set(weights) - set(matched)):
        hint = describe_look_alikes(unknown[0], label_names)
        raise UserError(f"optim.class_weights: {unknown[0]!r} is not a {noun}; {plural(noun)}: {label_names}{hint}")
    if len(set(matched.values())) < len(matched):
        raise UserError(f"optim.class_weights: {list(weights)} name a {noun} twice; {plural(noun)}: {label_names}")
    if any(not 0 <= weight < float("inf") for weight in weights.values()):
        raise UserError("optim.class_weights: weights must be at least 0")
    named = {label: weights[word] for word, label in matched.items()}
    return np.array([float(named.get(name, 1.0)) for name in label_names])


def output_labels(mappings: Mappings, label_names: list[str]) -> tuple[list[str], str]:
    """The label that a file of predictions holds for each class [C], and a sentence that says which labels these are.

    It follows the first mapping that has every class. It holds class names if there is none, if several labels mean
    one class, or if only the class names are numbers.
    """
    reason = ""
    for origin, given in mappings:
        classes = match_labels(given.values(), label_names) if isinstance(given, dict) else {}
        if set(classes.values()) != set(label_names):
            continue
        values = {_as_text(value): classes[name] for value, name in given.items() if name in classes}
        labels_of = {name: [value for value, own in values.items() if own == name] for name in label_names}
        labels = [own[0] for own in labels_of.values()]
        several = [f"{origin} mean {name!r} ({quoted(own)})" for name, own in labels_of.items() if len(own) > 1]
        are_names_numbers = all(map(is_number, label_names)) and not all(map(is_number, labels))
        if not several and not are_names_numbers:
            return labels, f"holds the labels of {origin}: {quoted(labels)}"
        reason = f", since several labels of {several[0]}" if several else ", which are numbers"
        break
    return label_names, f"holds the names of the classes{reason}: {quoted(label_names)}"


def _as_text(value: Any) -> str:
    """A class as a configuration names it, spelled as `label_text` spells the labels of rows."""
    return label_text(value) or str(value)


def _meaning(column: LabelColumn, label_names: list[str], noun: str) -> dict[str, int]:
    """What the labels of a column stand for: {label: class number}.

    Numbers count from 0 only if no class name is a number. So classes found as 1 to 4 in train never meet a test split
    that counts from 0.
    """
    names = {name: i for i, name in enumerate(label_names)}
    found, given = column.texts(), column.given_names or column.stored_names or {}
    if isinstance(given, list):
        # stored numbers always count from 0
        is_counted = not column.given_names or list(map(_as_text, given)) != label_names
        given = {str(i): name for i, name in enumerate(given)} if is_counted else {}
    own = {_as_text(value): _as_text(name) for value, name in given.items()}
    if own and (len(match_labels(found, own)) == len(found) or not match_labels(found, names)):
        classes = match_labels(own.values(), names)
        if strangers := sorted(set(own.values()) - set(classes)):
            has = "label_names maps to" if column.given_names else "its stored class names have"
            raise UserError(
                f"{column.option}: {has} {strangers[0]!r}, which is not a {noun} of train: {quoted(label_names)} "
                "(see label_names)"
            )
        return {value: names[classes[name]] for value, name in own.items()}
    if all(map(is_number, found)) and not any(map(is_number, names)):
        return {str(i): i for i in range(len(label_names))}
    return names


def _could_count_otherwise(found: Sequence[str], meaning: dict[str, int]) -> bool:
    """Whether the labels found are numbers that fit a count from 0 as well as one from 1."""
    for first, telling in ((0, "0"), (1, str(len(meaning)))):
        if set(meaning) == {str(first + i) for i in range(len(meaning))}:
            return telling not in found
    return False


def _describe_unknown(column: LabelColumn, unknown: np.ndarray, label_names: list[str], meaning: dict[str, int]) -> str:
    """Names the first of the examples `unknown`, what is known and, if the labels count, a mapping to use."""
    found, is_input = column.texts(), column.option == "--input"
    label = found[column.codes[unknown[0]]]
    message = (
        f"{column.option}: {column.path}: {len(unknown)} of {len(column.codes)} labels are unknown, first "
        f"{quoted([label])} in {column.describe_row(int(unknown[0]))}; known: {quoted(list(meaning))}"
        f"{describe_look_alikes(label, meaning)}{'; --ignore_labels true ignores labels' if is_input else ''}"
    )
    count = len(label_names)
    counts_from = [n for n in (0, 1) if set(found) <= {str(n + i) for i in range(count)}]
    if counts_from and count <= 20:
        words = [name if re.fullmatch(r"\w[\w /.-]*", name) else json.dumps(name) for name in label_names]
        example = ", ".join(f"{counts_from[0] + i}: {word}" for i, word in enumerate(words))
        flag = "--label_names" if is_input else f"--{column.option}.label_names"
        message += f"\n{column.option} counts its labels from {counts_from[0]}; map them: {flag} "
        message += shlex.quote(f"{{{example}}}")
    return message

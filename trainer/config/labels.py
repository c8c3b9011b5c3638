"""How a label is spelled, and when two spellings mean one label.

Always holds: labels with different spellings are different classes. Another spelling of a number or truth value finds
its class only if no class has that spelling. Imports nothing of the package.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

MAX_SHOWN_LABELS = 12  # in a message
INVISIBLE = "case, spaces, invisible characters or Unicode form"
_SHORT = reprlib.Repr()
_SHORT.maxstring = 60
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?")
# invisible characters that Unicode does not count as format characters: fillers and variation selectors
_FILLERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f]")


def label_text(value: Any) -> str | None:
    """A label as text; None if it is missing.

    A whole number has one spelling, from csv ("1", "1.0"), json (1) and parquet (1.0). The truth values of json and
    parquet become "true" and "false". Other text stays as it is.
    """
    if value is None or value != value:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip()
    if text.endswith("0") and re.fullmatch(r"-?[0-9]{1,15}\.0+", text):
        text = str(int(float(text)))
    return text or None


def is_number(text: str) -> bool:
    """Whether a label is a number, such as 3, -1, +1 or 0.5."""
    return re.fullmatch(r"[+-]?[0-9]{1,15}(\.[0-9]+)?", text) is not None


def match_labels(words: Iterable[Any], labels: Iterable[str]) -> dict[Any, str]:
    """{word: the label that it means}, without words that mean none.

    A word means the label with its spelling, or else the only label that is the same number or truth value.

    Example: words ["1.0", "False", "x"], labels ["1", "false"] -> {"1.0": "1", "False": "false"}
    """
    exact = set(labels)
    times = Counter(map(_value_of, exact))
    by_value = {_value_of(label): label for label in exact if times[_value_of(label)] == 1}
    found = {}
    for word in words:
        text = label_text(word) or str(word)
        if text not in exact:
            text = by_value.get(_value_of(text), "")
        if text:
            found[word] = text
    return found


def _value_of(text: str) -> str:
    """One text for all spellings of a truth value or number: False and false, 1e3 and 1000; but not 007 and 7."""
    if text.lower() in {"true", "false"}:
        return text.lower()
    if len(text) <= 15 and _NUMBER.fullmatch(text):  # a float holds 15 digits
        number = float(text)
        return str(int(number)) if number.is_integer() else repr(number)
    return text


def look_alikes(labels: Iterable[str]) -> list[list[str]]:
    """Groups of labels that differ only in case, spaces, invisible characters or Unicode form."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault("".join(_visible(label).casefold().split()), []).append(label)
    return [group for group in groups.values() if len(group) > 1]


def describe_look_alikes(word: str, labels: Iterable[str]) -> str:
    """The end of a message about an unknown label: the labels that look like it; "" if there are none."""
    alike = [group for group in look_alikes([word, *labels]) if word in group]
    return f"; {quoted(alike[0])} differ only in {INVISIBLE}" if alike else ""


def plural(noun: str) -> str:
    """The plural of what a label is called: classes, labels, targets."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def quoted(labels: Sequence[str]) -> str:
    """The first labels, for a message. They are escaped if two look the same; long ones lose their middle."""
    shown = labels[:MAX_SHOWN_LABELS]
    quote = ascii if len(set(map(_visible, shown))) < len(shown) else _SHORT.repr
    more = f", ... ({len(labels)})" if len(labels) > MAX_SHOWN_LABELS else ""
    return ", ".join(label if is_number(label) else quote(label) for label in shown) + more


def _visible(text: str) -> str:
    """A text without its invisible characters, in one Unicode form."""
    plain = unicodedata.normalize("NFKC", _FILLERS.sub("", text))
    return "".join(character for character in plain if unicodedata.category(character) not in {"Cc", "Cf"})

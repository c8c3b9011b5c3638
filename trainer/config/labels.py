"""How a label is spelled, and when two spellings mean one label.

Always holds: two labels that differ in their spelling are two classes. Another spelling of a number or a truth value
finds its class only where no class is spelled so itself. Imports nothing of the package.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

SHOWN = 12  # how many labels a message names
INVISIBLE = "case, spaces, invisible characters or Unicode form"
_SHORT = reprlib.Repr()
_SHORT.maxstring = 60
_NUMBER = re.compile(r"[+-]?(0|[1-9][0-9]*|(?=\.[0-9]))(\.[0-9]*)?([eE][+-]?[0-9]{1,2})?")
# invisible characters that Unicode does not call format characters: fillers, selectors of another glyph
_FILLERS = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\ufe00-\ufe0f]")


def label_text(value: Any) -> str | None:
    """A label as text; None where missing.

    Whole numbers are alike from csv ("1", "1.0"), json (1) and parquet (1.0). The truth values of json and parquet are
    spelled "true" and "false". Other text stays as it is.
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
    """{word: the label that it means}, without the words that mean none.

    A word means the label of its own spelling; else the only label that is the same number or truth value.

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
    """The same for two spellings of one truth value or number: False and false, 1e3 and 1000; not 007 and 7."""
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
    """An addition to the message that a word is none of the labels, where it looks like one of them."""
    alike = [group for group in look_alikes([word, *labels]) if word in group]
    return f"; {quoted(alike[0])} differ only in {INVISIBLE}" if alike else ""


def short(label: str) -> str:
    """A label in quotes for a message, without its middle where it is long."""
    return _SHORT.repr(label)


def quoted(labels: Sequence[str]) -> str:
    """Some labels for a message, with escapes where two of them would look the same."""
    shown = labels[:SHOWN]
    same = len({_visible(label) for label in shown}) < len(shown)
    more = f", ... ({len(labels)})" if len(labels) > SHOWN else ""
    return ", ".join(label if is_number(label) else ascii(label) if same else short(label) for label in shown) + more


def _visible(text: str) -> str:
    """A text without what cannot be seen, in one Unicode form."""
    plain = unicodedata.normalize("NFKC", _FILLERS.sub("", text))
    return "".join(character for character in plain if unicodedata.category(character) not in {"Cc", "Cf"})

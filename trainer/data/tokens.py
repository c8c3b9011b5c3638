"""Texts -> token ids, cached for the next start.

Always holds: the tokens are those of the tokenizer's own call, in the order of the split, without padding. They are
cached under a hash of the texts, the tokenizer and the settings, and mapped into memory, not loaded.

A long text is cut, or becomes several *windows*: the tokenizer's own overflowing pieces, which overlap, each with its
special tokens. All windows of an example but the last have `window_length` tokens. So offsets and lengths of windows
follow from those of the examples.

The workers are threads: fast tokenizers release Python's lock while they work.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.cache import load_or_create, release_memory
from trainer.data.rows import TextSplit, progress_bar
from trainer.errors import UserError

TOKENS_FORMAT = 5
"""version of the cached tokens; a new number makes every start tokenize again"""
TEXTS_PER_TASK = 256
"""texts that a worker takes at a time: their tokens fit a processor's cache"""
HASHED_NUMBERS = 2**24
"""numbers of an array that are hashed at a time"""
TYPES = {"tokens": np.int32, "lengths": np.int64, "token_types": np.int8}
"""types of the cached arrays, each a file"""

ANY_LENGTH = 2**31 - 1
"""a window length that no example reaches, so each example is one window"""

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Examples:
    """One tokenized split: N examples end to end, without padding; an example is one window or several."""

    tokens: np.ndarray
    """token ids of all examples, int32 [sum of lengths]"""
    offsets: np.ndarray
    """example i is tokens[offsets[i]:offsets[i + 1]], int64 [N + 1]"""
    token_types: np.ndarray | None
    """segment of each token of text pairs, int8 [sum of lengths]; None if the model uses none"""
    targets: np.ndarray
    """of the task, [N] or [N, C]; zeros [N] for an unlabelled file"""
    lengths: np.ndarray
    """tokens per example, over all of its windows, int64 [N]"""
    window_length: int = ANY_LENGTH
    """tokens of each window but the last of its example"""

    def __len__(self) -> int:
        return len(self.lengths)

    def fingerprint(self) -> str:
        """SHA-256 over tokens, boundaries and targets: equal exactly if two splits train alike."""
        digest = hashlib.sha256()
        if (self.lengths > self.window_length).any():
            digest.update(str(self.window_length).encode())
        types = () if self.token_types is None else (self.token_types,)
        for array in (self.tokens, self.offsets, self.targets, *types):
            for start in range(0, len(array), HASHED_NUMBERS):
                digest.update(np.ascontiguousarray(array[start : start + HASHED_NUMBERS]).data)
                release_memory(getattr(array.base, "obj", None))  # of a cached array
        return digest.hexdigest()


def tokenize(
    split: TextSplit,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    quiet: bool = False,
    workers: int | None = None,
    overlap: int | None = None,
) -> Examples:
    """Tokenizes a split with a fast tokenizer, or takes its tokens from the cache.

    `max_length` counts special tokens too. A longer text is cut. With `overlap` it becomes windows that share so many
    tokens. `workers` threads run at the same time; None = one for each core.

    Raises:
        UserError: no window would begin behind the one before it.
    """
    assert overlap is None or split.text_pairs is None, "find_problems refuses windows of pairs"
    room = max_length - tokenizer.num_special_tokens_to_add()
    if overlap is not None and overlap >= room:
        raise UserError(f"data.window_overlap: {overlap} must be below {room}, the tokens of text in a window")
    with_types = split.text_pairs is not None and "token_type_ids" in tokenizer.model_input_names
    names = [name for name in TYPES if name != "token_types" or with_types]

    def make_parts() -> Iterator[Arrays]:
        return _encode(split, tokenizer, max_length, overlap, names, quiet, workers or num_cores())

    entry = load_or_create(
        cache_name(split, tokenizer, max_length, overlap),
        lambda folder: write_parts(folder, names, make_parts()),
        quiet,
    )
    if entry is not None:
        arrays = {name: np.frombuffer(entry[name], TYPES[name]) for name in names}
    else:
        parts = list(make_parts())
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in names}
    return Examples(
        tokens=arrays["tokens"],
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"])]),
        token_types=arrays.get("token_types"),
        targets=split.targets if split.targets is not None else np.zeros(len(split), dtype=np.int64),
        lengths=arrays["lengths"],
        window_length=ANY_LENGTH if overlap is None else max_length,
    )


def num_windows(lengths: np.ndarray, window_length: int) -> np.ndarray:
    """Windows of examples of these lengths, as of `Examples`."""
    return -(-lengths // window_length)


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_name(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, overlap: int | None = None
) -> str:
    """Names the cache entry of a split's tokens."""
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # earlier calls set these two
    settings.pop("truncation", None)
    settings.pop("padding", None)
    own = (tokenizer.model_input_names, tokenizer.truncation_side, tokenizer.split_special_tokens)
    header = [type(tokenizer).__name__, *own, settings, max_length, split.text_pairs is None, TOKENS_FORMAT]
    header += [] if overlap is None else [overlap]
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(split.digests).data)
    return f"{digest.hexdigest()[:32]}.tokens"


def write_parts(folder: Path, names: list[str], parts: Iterator[Arrays]) -> None:
    """Writes arrays to files, a part at a time."""
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in names}
        for part in parts:
            for name in names:
                files[name].write(part[name].data)


def _encode(
    split: TextSplit,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    overlap: int | None,
    names: list[str],
    quiet: bool,
    workers: int,
) -> Iterator[Arrays]:
    """Tokenizes the split in parts, in order."""
    # an ordinary call sets truncation and all else in the backend, which the workers then only read
    first = split.text_pairs[:1] if split.text_pairs is not None else None
    tokenizer(split.texts[:1], first, truncation=True, max_length=max_length, stride=overlap or 0)
    backend = tokenizer.backend_tokenizer
    # some tokenizers give an empty text no tokens, and a model needs one
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, 0)
    blank = [next(number for number in special if number is not None)]

    def encode(start: int) -> Arrays:
        part = slice(start, start + TEXTS_PER_TASK)
        texts: list[Any] = split.texts[part]
        if split.text_pairs is not None:
            texts = list(zip(texts, split.text_pairs[part], strict=True))
        encodings = backend.encode_batch_fast(texts)
        windows = [[encoding, *(encoding.overflowing if overlap is not None else ())] for encoding in encodings]
        assert all(len(window) == max_length for each in windows for window in each[:-1]), "a window is not full"
        ids = [list(chain.from_iterable(window.ids for window in each)) or blank for each in windows]
        values = {
            "tokens": chain.from_iterable(ids),
            "lengths": map(len, ids),
            "token_types": chain.from_iterable(encoding.type_ids or [0] for encoding in encodings),
        }
        return {name: np.fromiter(values[name], TYPES[name]) for name in names}

    pool = ThreadPoolExecutor(workers)
    try:
        with progress_bar(f"tokenizing {split.name}", "texts", len(split), quiet) as bar:
            for arrays in pool.map(encode, range(0, len(split), TEXTS_PER_TASK)):
                yield arrays
                bar.update(TEXTS_PER_TASK)
    finally:
        pool.shutdown(cancel_futures=True)

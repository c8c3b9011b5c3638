"""Texts -> token ids, kept for the next start.

Always holds: the tokens are those of the tokenizer's own call, in the order of the split, without padding. They are
kept in the cache of `datasets` under a hash of the texts, the tokenizer and the settings, so a second run starts at
once and a changed file can never meet old tokens; there they are plain arrays, mapped into memory and not loaded. A
hash of their content lies beside them: damaged tokens are made again.

Follows the fast tokenizers of `tokenizers`, which let go of Python's lock while they work: the workers are threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.corpus import TextSplit
from trainer.data.rows import cache_folder, forget, progress, say_without_cache
from trainer.files import lock_cache_entry, publish, share

HASH = "sha256"  # file beside the arrays
AT_ONCE = 256  # texts a worker takes at a time: their tokens fit a processor's cache
BLOCK = 2**24  # numbers of an array that are hashed at a time
TYPES = {"tokens": np.int32, "lengths": np.int64, "token_types": np.int8}  # of the kept arrays, a file each

Arrays = dict[str, np.ndarray]


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
            for start in range(0, len(array), BLOCK):
                digest.update(np.ascontiguousarray(array[start : start + BLOCK]).data)
                _forget(array)
        return digest.hexdigest()


def tokenise(
    split: TextSplit,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    quiet: bool = False,
    workers: int | None = None,
) -> Examples:
    """Token ids of a split, from the cache where this very text was tokenised before in this very way.

    Args:
        split: N examples.
        tokenizer: a fast tokenizer.
        max_length: tokens per example at most, special tokens included.
        quiet: no progress bar.
        workers: texts tokenised at the same time; None = one for each core.
    """
    with_types = split.text_pairs is not None and "token_type_ids" in tokenizer.model_input_names
    names = list(TYPES) if with_types else list(TYPES)[:2]
    folder = cache_folder(quiet)
    arrays: Arrays | None = None

    def parts() -> Iterator[Arrays]:
        return _encoded(split, tokenizer, max_length, with_types, quiet, workers or num_cores())

    if folder is not None:
        path = folder / _cache_key(split, tokenizer, max_length)
        try:
            with lock_cache_entry(path, quiet) as part:
                arrays = _kept(path, names) or _keep(path, part, names, parts())
        except OSError as error:
            say_without_cache(folder, error, quiet)
    if arrays is None:  # as in a read-only home: slower the second time, nothing worse
        made = list(parts())
        arrays = {name: np.concatenate([part[name] for part in made]) for name in names}
    return Examples(
        tokens=arrays["tokens"],
        offsets=np.concatenate([[0], np.cumsum(arrays["lengths"])]),
        token_types=arrays.get("token_types"),
        labels=split.labels if split.labels is not None else np.zeros(len(split), dtype=np.int64),
        lengths=arrays["lengths"],
    )


def num_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- encoding ---------------------------------------------------------------------------------------------------------


def _encoded(
    split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int, with_types: bool, quiet: bool, workers: int
) -> Iterator[Arrays]:
    """The split in parts, in order, `workers` of them at a time."""
    # an ordinary call sets truncation and all else as the tokenizer wants them; the workers only read
    first = split.text_pairs[:1] if split.text_pairs is not None else None
    tokenizer(split.texts[:1], first, truncation=True, max_length=max_length)
    backend = tokenizer.backend_tokenizer
    # of a text without tokens: some tokenizers add none, and a model needs one
    special = (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id, tokenizer.pad_token_id, 0)
    blank = [next(number for number in special if number is not None)]

    def encode(start: int) -> Arrays:
        some = slice(start, start + AT_ONCE)
        texts = split.texts[some]
        pairs = split.text_pairs[some] if split.text_pairs is not None else None
        encodings = backend.encode_batch_fast(texts if pairs is None else list(zip(texts, pairs, strict=True)))
        ids = [encoding.ids or blank for encoding in encodings]
        part = {"tokens": _flat(ids), "lengths": list(map(len, ids))}
        if with_types:
            part["token_types"] = _flat([encoding.type_ids or [0] for encoding in encodings])
        return {name: np.fromiter(values, TYPES[name]) for name, values in part.items()}

    waiting: deque[Future[Arrays]] = deque()
    with (
        progress(f"tokenising {split.name}", "texts", len(split), quiet) as bar,
        ThreadPoolExecutor(workers) as pool,
    ):
        for start in range(0, len(split), AT_ONCE):
            waiting.append(pool.submit(encode, start))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
                bar.update(AT_ONCE)
        while waiting:
            yield waiting.popleft().result()


def _flat(lists: list[list[int]]) -> Iterator[int]:
    return chain.from_iterable(lists)


# --- kept arrays ------------------------------------------------------------------------------------------------------


def _cache_key(split: TextSplit, tokenizer: PreTrainedTokenizerBase, max_length: int) -> str:
    settings = json.loads(tokenizer.backend_tokenizer.to_str())
    # set by earlier calls, so not part of what the tokenizer is
    settings.pop("truncation", None)
    settings.pop("padding", None)
    own = [type(tokenizer).__name__, tokenizer.model_input_names, tokenizer.truncation_side]
    own.append(tokenizer.split_special_tokens)
    header = [*own, settings, max_length, split.text_pairs is None, 4]
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(split.digests).data)
    return digest.hexdigest()[:32]


def _keep(path: Path, unfinished: Path, names: list[str], parts: Iterator[Arrays]) -> Arrays:
    """Writes the arrays into a folder of their own, a part at a time, and maps them; all of them or none are there."""
    shutil.rmtree(unfinished, ignore_errors=True)  # of a process that was killed
    unfinished.mkdir()
    try:
        with contextlib.ExitStack() as stack:
            files = {name: stack.enter_context(open(unfinished / name, "wb")) for name in names}
            hashes = {name: hashlib.sha256() for name in names}
            for part in parts:
                for name, array in part.items():
                    files[name].write(array.data)
                    hashes[name].update(array.data)
        (unfinished / HASH).write_text(_whole_hash(path, [hashes[name] for name in names]))
        share(unfinished)
        publish(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return {name: _mapped(path / name, TYPES[name]) for name in names}


def _kept(path: Path, names: list[str]) -> Arrays | None:
    """The arrays in a folder, mapped; None where one is absent or not what was written."""
    try:
        hashes = []
        for name in names:
            with open(path / name, "rb") as file:
                hashes.append(hashlib.file_digest(file, "sha256"))
        if (path / HASH).read_text() != _whole_hash(path, hashes):
            return None
        return {name: _mapped(path / name, TYPES[name]) for name in names}
    except (OSError, ValueError):
        return None


def _whole_hash(path: Path, hashes: list[Any]) -> str:
    """One hash for all arrays of a folder, and for the name of the folder, which says what they are the tokens of."""
    return hashlib.sha256(path.name.encode() + b"".join(each.digest() for each in hashes)).hexdigest()


def _mapped(path: Path, kind: type) -> np.ndarray:
    return np.memmap(path, kind, mode="r") if path.stat().st_size else np.zeros(0, kind)


def _forget(array: np.ndarray) -> None:
    """Gives the memory of a mapped array back."""
    if isinstance(array, np.memmap):
        forget(array.base)  # type: ignore[arg-type]

"""Examples as the tensors that a model takes: padded to one length, or packed end to end.

Always holds: an example's tokens are the same in both, and nothing else of it reaches the model. All windows of an
example are in one micro-batch, so its logits are their mean there (`average_windows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainer.compat import on_device
from trainer.data.tokens import Examples, num_windows

WINDOW_BITS = 40  # a window's number is above these bits of its example's id; the first window has number 0


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device: B examples in W windows, padded to L tokens or packed into T."""

    ids: np.ndarray
    """example ids, int64 [B]"""
    owners: np.ndarray
    """position in `ids` of each window's example, int64 [W]"""
    window_ids: np.ndarray
    """what dropout's masks depend on: a function of the example and the window alone, int64 [W]"""
    lengths: np.ndarray
    """tokens per window, int64 [W]"""
    inputs: dict[str, torch.Tensor]
    """input_ids and, for pairs, token_type_ids; int64, padded [W, L] with attention_mask, packed [T]"""
    targets: torch.Tensor
    """of the task, [B] or [B, C]"""
    weights: torch.Tensor
    """weights in the loss, float64 [B]"""


def collate_packed(examples: Examples, ids: np.ndarray, weights: np.ndarray, device: torch.device) -> Batch:
    """Puts the examples `ids` [B] on the device, end to end."""
    windows = _windows_of(examples, ids)
    return _batch(examples, ids, weights, device, windows, _token_arrays(examples, windows))


def collate_padded(
    examples: Examples, ids: np.ndarray, weights: np.ndarray, device: torch.device, pad_token_id: int, left: bool
) -> Batch:
    """Puts the examples `ids` [B] on the device, each padded to the longest; `left` pads before the tokens."""
    windows = _windows_of(examples, ids)
    is_token = np.arange(windows.lengths.max()) < windows.lengths[:, None]
    is_token = is_token[:, ::-1] if left else is_token
    padded = {"attention_mask": is_token.astype(np.int64)}
    for name, array in _token_arrays(examples, windows).items():
        padded[name] = np.full(is_token.shape, pad_token_id if name == "input_ids" else 0, dtype=np.int64)
        padded[name][is_token] = array
    return _batch(examples, ids, weights, device, windows, padded)


def average_windows(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
    """The logits of each example, [B, C]: the mean of those of its windows, [W, C], summed in fp64."""
    num_examples = len(batch.ids)
    if len(batch.owners) == num_examples:
        return logits
    owners, counts = (
        on_device(array, logits.device)
        for array in (batch.owners, np.bincount(batch.owners, minlength=num_examples)[:, None])
    )
    sums = torch.zeros(num_examples, logits.shape[1], dtype=torch.float64, device=logits.device)
    means = sums.index_add(0, owners, logits.double()) / counts
    return means.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass(frozen=True)
class _Windows:
    """The W windows of a micro-batch, [W] each."""

    owners: np.ndarray
    ids: np.ndarray
    starts: np.ndarray
    """first token in `Examples.tokens`"""
    lengths: np.ndarray


def _windows_of(examples: Examples, ids: np.ndarray) -> _Windows:
    """The windows of these examples, in the order of the examples, or the longest first if one has several."""
    counts = num_windows(examples.lengths[ids], examples.window_length)
    owners = np.repeat(np.arange(len(ids)), counts)
    numbers = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
    before = numbers * examples.window_length
    lengths = np.minimum(examples.lengths[ids][owners] - before, examples.window_length)
    order = np.argsort(-lengths, kind="stable") if len(owners) > len(ids) else np.arange(len(ids))
    owners, numbers, before, lengths = owners[order], numbers[order], before[order], lengths[order]
    window_ids = ids[owners] + (numbers << WINDOW_BITS)
    return _Windows(owners, window_ids, examples.offsets[ids][owners] + before, lengths)


def _token_arrays(examples: Examples, windows: _Windows) -> dict[str, np.ndarray]:
    """Tokens and, for pairs, segments of the windows end to end, int64 [T] each."""
    spans = zip(windows.starts, windows.lengths, strict=True)
    positions = np.concatenate([np.arange(start, start + length) for start, length in spans])
    arrays = {"input_ids": examples.tokens[positions].astype(np.int64)}
    if examples.token_types is not None:
        arrays["token_type_ids"] = examples.token_types[positions].astype(np.int64)
    return arrays


def _batch(
    examples: Examples,
    ids: np.ndarray,
    weights: np.ndarray,
    device: torch.device,
    windows: _Windows,
    inputs: dict[str, np.ndarray],
) -> Batch:
    return Batch(
        ids=ids,
        owners=windows.owners,
        window_ids=windows.ids,
        lengths=windows.lengths,
        inputs={name: on_device(array, device) for name, array in inputs.items()},
        targets=on_device(examples.targets[ids], device),
        weights=on_device(weights, device),
    )

"""Examples as the tensors that a model takes: padded to one length, or packed end to end.

Always holds: an example's tokens are the same in both, and nothing else of it reaches the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from trainer.compat import on_device
from trainer.data.tokens import Examples


@dataclass(frozen=True)
class Batch:
    """A micro-batch on its device: B examples, padded to L tokens or packed into T."""

    ids: np.ndarray
    """example ids, int64 [B]"""
    lengths: np.ndarray
    """tokens per example, int64 [B]"""
    inputs: dict[str, torch.Tensor]
    """input_ids and, for pairs, token_type_ids; int64, padded [B, L] with attention_mask, packed [T]"""
    targets: torch.Tensor
    """of the task, [B] or [B, C]"""
    weights: torch.Tensor
    """weights in the loss, float64 [B]"""


def collate_packed(examples: Examples, ids: np.ndarray, weights: np.ndarray, device: torch.device) -> Batch:
    """Puts the examples `ids` [B] on the device, end to end."""
    return _batch(examples, ids, weights, device, _token_arrays(examples, ids))


def collate_padded(
    examples: Examples, ids: np.ndarray, weights: np.ndarray, device: torch.device, pad_token_id: int, left: bool
) -> Batch:
    """Puts the examples `ids` [B] on the device, each padded to the longest; `left` pads before the tokens."""
    lengths = examples.lengths[ids]
    is_token = np.arange(lengths.max()) < lengths[:, None]
    is_token = is_token[:, ::-1] if left else is_token
    padded = {"attention_mask": is_token.astype(np.int64)}
    for name, array in _token_arrays(examples, ids).items():
        padded[name] = np.full(is_token.shape, pad_token_id if name == "input_ids" else 0, dtype=np.int64)
        padded[name][is_token] = array
    return _batch(examples, ids, weights, device, padded)


def _token_arrays(examples: Examples, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens and, for pairs, segments of the examples end to end, int64 [T] each."""
    spans = zip(examples.offsets[ids], examples.lengths[ids], strict=True)
    positions = np.concatenate([np.arange(start, start + length) for start, length in spans])
    arrays = {"input_ids": examples.tokens[positions].astype(np.int64)}
    if examples.token_types is not None:
        arrays["token_type_ids"] = examples.token_types[positions].astype(np.int64)
    return arrays


def _batch(
    examples: Examples, ids: np.ndarray, weights: np.ndarray, device: torch.device, inputs: dict[str, np.ndarray]
) -> Batch:
    return Batch(
        ids=ids,
        lengths=examples.lengths[ids],
        inputs={name: on_device(array, device) for name, array in inputs.items()},
        targets=on_device(examples.targets[ids], device),
        weights=on_device(weights, device),
    )

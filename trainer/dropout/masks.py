"""Which units dropout drops: masks computed on the device that drops, from (seed, step, example, site, position).

Always holds: which units of an example stay does not depend on its rank, its padding, its place in a batch, or the
device.

The random words are SplitMix64's, see splitmix.py. A word of one stream is the key of a stream below it: seed,
step, example, site. A unit takes a byte of a word. It is dropped where the byte is below a threshold. 256 p is rarely
whole (p = 0.1: 25.6), so the threshold is 25 or 26. It is drawn for each example and site, so that a unit is dropped
with probability p to within 2**-57.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trainer.compat import on_device
from trainer.randomness.splitmix import GAMMA, random_words

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a unit
UNITS_PER_WORD = 8
# A row of units begins 2**20 words after the row before it, however long they are; so does a head after a head's rows.
AXIS_BITS = 20
ROW = (np.array([GAMMA]) << AXIS_BITS)[0]


@dataclass(frozen=True)
class Site:
    """One dropout call: what it drops of an example of n tokens.

    `tokens`: [n, width]; `attention`: [width heads, n, n]; `pooled`: [width].
    """

    kind: str
    width: int
    p: float
    """probability that a unit is dropped"""


@dataclass(frozen=True)
class Mask:
    """What one dropout call drops."""

    keep: torch.Tensor
    """bool, of the shape of what is masked: where a unit stays"""
    scale: float
    """factor on the units that stay, 1 / (1 - p)"""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x with the dropped units 0 and the others as they are, not scaled."""
        bits = BITS[x.element_size()]  # integers are several times faster to multiply
        return self.keep.view(torch.int8).to(bits, copy=True).mul_(x.view(bits)).view(x.dtype)


def masked(x: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """`mask.apply(x)`; x itself where there is no mask."""
    return x if mask is None else mask.apply(x)


def dropped(x: torch.Tensor, mask: Mask | None, residual: torch.Tensor | None = None) -> torch.Tensor:
    """x with the dropped units 0 and the others scaled, or x itself without a mask; plus the residual."""
    if mask is None:
        return x if residual is None else x + residual
    result: torch.Tensor = _Drop.apply(x, mask, residual)
    return result


class _Drop(torch.autograd.Function):
    """See `dropped`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: Mask, residual: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(mask.keep)  # so that gradient checkpointing can drop it
        ctx.scale, ctx.dtype = mask.scale, x.dtype
        kept = mask.apply(x)
        return kept.mul_(mask.scale) if residual is None else torch.add(residual, kept, alpha=mask.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor | None]:
        (keep,) = ctx.saved_tensors
        mask = Mask(keep, ctx.scale)
        grad_x = mask.apply(gradient.to(ctx.dtype)).mul_(mask.scale)
        return grad_x, None, gradient if ctx.needs_input_grad[2] else None


def unkeyed_mask(x: torch.Tensor, p: float) -> Mask:
    """The mask that torch's own dropout would draw now."""
    return Mask(torch.nn.functional.dropout(torch.ones(x.shape, device=x.device), p) != 0, 1 / (1 - p))


class Masks:
    """The masks of a micro-batch of B examples."""

    def __init__(self, sites: Sequence[Site], seed: int, step: int, ids: np.ndarray, lengths: np.ndarray) -> None:
        """`ids` and `lengths` in tokens, int64 [B]."""
        self._sites, self._lengths = sites, lengths
        key = np.zeros(1, dtype=np.int64)
        for number in (seed, step):
            key = random_words(key, np.array([number]))
        self._keys = random_words(random_words(key, ids), np.arange(len(sites))[:, None])  # [S, B]
        rates = np.array([round(site.p * 2**56) for site in sites], dtype=np.int64)[:, None]
        uniform = (random_words(self._keys, np.array([-1])) >> 16) & (2**48 - 1)
        self._thresholds = (rates + uniform) >> 48  # [S, B], 0 to 256

    def keep(self, number: int, shape: tuple[int, ...], first: int, device: torch.device) -> torch.Tensor:
        """`Mask.keep` of site `number`, on the device; `shape` and `first` are as in `DropoutKeys.mask`."""
        site, keys, thresholds = self._sites[number], self._keys[number], self._thresholds[number]
        if site.kind == "tokens" and len(shape) == 2:  # tokens end to end
            starts = np.repeat(np.cumsum(self._lengths) - self._lengths, self._lengths)
            keys, thresholds = np.repeat(keys, self._lengths), np.repeat(thresholds, self._lengths)
            keys = keys + (np.arange(len(starts)) - starts) * ROW
        else:
            rows = np.zeros((), dtype=np.int64)
            for size in shape[1:-1]:
                rows = (rows[..., None] << AXIS_BITS) + np.arange(size)
            examples, one_each = slice(first, first + shape[0]), (shape[0], *[1] * rows.ndim)
            keys = keys[examples].reshape(one_each) + rows * ROW
            thresholds = thresholds[examples].reshape(one_each)
        words = torch.arange(-(-shape[-1] // UNITS_PER_WORD), device=device)
        units = random_words(on_device(keys[..., None], device), words).view(torch.uint8)
        # in place, which is many times faster on a CPU; a byte holds no 256, which a threshold may be
        if site.p < 0.5:
            units.ge_(on_device(thresholds.astype(np.uint8)[..., None], device))
        else:
            units.gt_(on_device((thresholds - 1).astype(np.uint8)[..., None], device))
        return units[..., : shape[-1]].view(torch.bool)

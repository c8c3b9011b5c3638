"""Which units dropout drops: masks drawn from the numbers of (seed, step, example), by the host or by a device.

Always holds: a mask is a pure function of (seed, step, example id, site); which units of an example stay does not
depend on its rank, its padding, its place in a batch, or on who draws.

The numbers come from numpy's counter-based Philox4x64-10 (Salmon et al., 2011): key (seed, step), counter (0, example
id, 1, 0); the 1 keeps them apart from those that order epoch `step`, which have the same key. The first words of an
example's stream are the thresholds of its sites, one a site. Then each site takes whole blocks of four words, that is
of 32 units, for a unit takes a byte: below the threshold it is dropped. 256 p is rarely whole (p = 0.1: 25.6), so the
threshold is 25 or 26, drawn so that a unit's probability to be dropped is p to within 2**-53.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch

from trainer.compat import on_device
from trainer.dropout.generator import random_blocks

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of a unit
UNITS_AT_ONCE = 2**21  # on a host: in few calls, for its threads hold one another up between them
DEVICE_AT_ONCE = 2**23  # blocks, 256 MiB of them
BLOCK = 32  # units of a block
CACHE_LINE = 64  # bytes


@dataclass(frozen=True)
class Site:
    """One dropout call: what it drops, as a function of an example's length n in tokens.

    `tokens`: [n, width]; `attention`: [width heads, n, n]; `pooled`: [width].
    """

    kind: str
    width: int
    p: float
    """probability of a unit to be dropped"""

    def shape(self, length: int) -> tuple[int, ...]:
        """Units of one example of `length` tokens."""
        if self.kind == "tokens":
            return (length, self.width)
        if self.kind == "attention":
            return (self.width, length, length)
        return (self.width,)

    def blocks(self, lengths: np.ndarray) -> np.ndarray:
        """Blocks that this site takes of the stream of each example, int64 [B]."""
        num_units = self.width * lengths ** (len(self.shape(1)) - 1)
        return -(-num_units // BLOCK)


@dataclass(frozen=True)
class Mask:
    """What one dropout call drops."""

    keep: torch.Tensor
    """bool, of the shape of what is masked: where a unit stays; of padding it may say anything"""
    scale: float
    """by which the units that stay are multiplied, 1 / (1 - p)"""

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """x with the dropped units 0 and the others as they are, not scaled."""
        if x.device.type != "cpu":
            return x * self.keep
        bits = BITS[x.element_size()]  # as integers they are several times faster to multiply, or to choose from
        return self.keep.view(torch.int8).to(bits, copy=True).mul_(x.view(bits)).view(x.dtype)


def masked(x: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """`mask.apply(x)`; x itself where there is no mask."""
    return x if mask is None else mask.apply(x)


def dropped(x: torch.Tensor, mask: Mask | None) -> torch.Tensor:
    """x with the dropped units 0 and the others scaled; x itself where there is no mask. It has a gradient."""
    result: torch.Tensor = x if mask is None else _Drop.apply(x, mask)
    return result


class _Drop(torch.autograd.Function):
    """See `dropped`."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: Mask) -> torch.Tensor:
        ctx.mask = mask
        return mask.apply(x).mul_(mask.scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.mask.apply(gradient).mul_(ctx.mask.scale), None


def unkeyed_mask(x: torch.Tensor, p: float) -> Mask:
    """The mask that torch's own dropout would draw now."""
    return Mask(torch.nn.functional.dropout(torch.ones(x.shape, device=x.device), p) != 0, 1 / (1 - p))


def stream_of(key: tuple[int, int], example: int) -> np.random.Philox:
    """The random words of one example in one step; `key`: seed and step."""
    return np.random.Philox(key=list(key), counter=[0, example, 1, 0])


@dataclass(frozen=True)
class Draw:
    """What the masks of a micro-batch are a function of."""

    sites: Sequence[Site]
    key: tuple[int, int]
    """seed and step"""
    ids: np.ndarray
    """of its examples, int64 [B]"""
    lengths: np.ndarray
    """their tokens, int64 [B]"""

    def starts(self) -> np.ndarray:
        """First block of each site in each example's stream, and behind the last all that it has; int64 [S + 1, B]."""
        thresholds = np.full(len(self.lengths), -(-len(self.sites) // 4))
        return np.cumsum([thresholds, *(site.blocks(self.lengths) for site in self.sites)], axis=0)


class HostMasks:
    """The masks of a micro-batch, all of which are drawn by numpy when this is made."""

    def __init__(self, draw: Draw, memory: torch.Tensor, pool: ThreadPoolExecutor) -> None:
        """`memory`: bool, taken for the units if it is large enough; `pool`: the threads in which numpy draws them."""
        self._sites, self._lengths = draw.sites, draw.lengths
        blocks = np.diff(draw.starts(), axis=0)
        room = CACHE_LINE * -(-BLOCK * blocks // CACHE_LINE)
        begins = (room.cumsum() - room.ravel()).reshape(room.shape)  # by site, so that one of tokens is ready for use
        self._spans = np.stack([begins, begins + BLOCK * blocks], axis=-1)
        num_units = int(self._spans.max(initial=0))
        self.memory = memory if len(memory) >= num_units else torch.empty(num_units, dtype=torch.bool)
        self._units = self.memory.numpy()
        list(pool.map(self._draw, repeat(draw.key), draw.ids.tolist(), range(len(draw.ids))))

    def _draw(self, key: tuple[int, int], example: int, row: int) -> None:
        """Decides on all units of one example."""
        stream, spans = stream_of(key, example), self._spans[:, row]
        words = stream.random_raw(4 * -(-len(self._sites) // 4)).tolist()
        each = zip(self._sites, words, spans.tolist(), _units(stream, np.diff(spans)[:, 0]), strict=False)
        for site, word, (begin, end), units in each:
            threshold = int(site.p * 256 + (word >> 11) * 2.0**-53)
            np.greater_equal(units, threshold, out=self._units[begin:end])

    def keep(self, number: int, shape: tuple[int, ...], first: int) -> torch.Tensor:
        """`Mask.keep` of this shape for site `number`, on the CPU; 0 for padding. Good until the next are drawn.

        Args:
            number: of the site.
            shape: see `DropoutKeys.mask`.
            first: number of the first example in the micro-batch.
        """
        site, spans = self._sites[number], self._spans[number].tolist()
        if _end_to_end(site, shape) and site.width % CACHE_LINE == 0:
            return self.memory[spans[0][0] : spans[-1][1]].view(shape)
        keep = np.zeros(shape, dtype=bool)
        regions = np.split(keep, np.cumsum(self._lengths)[:-1]) if _end_to_end(site, shape) else list(keep)
        for row, region in enumerate(regions, first):
            own = site.shape(int(self._lengths[row]))
            units = self._units[slice(*spans[row])][: math.prod(own)].reshape(own)
            units = units[tuple(map(slice, region.shape))]
            region[tuple(map(slice, units.shape))] = units
        return torch.from_numpy(keep)


def _units(stream: np.random.Philox, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """The next bytes of a stream, so many for each site; words are drawn for some sites at once."""
    together = np.flatnonzero(np.diff(sizes.cumsum() // UNITS_AT_ONCE)) + 1
    for part in np.split(sizes, together):
        units, begin = stream.random_raw(int(part.sum()) // 8).view(np.uint8), 0
        for size in part.tolist():
            yield units[begin : begin + size]
            begin += size


class DeviceMasks:
    """The masks of a micro-batch, whose words a device draws itself: those of many sites at once, in few operations."""

    def __init__(self, draw: Draw, device: torch.device) -> None:
        self._sites, self._key, self._ids, self._lengths = draw.sites, draw.key, draw.ids, draw.lengths
        self._starts, self._device = draw.starts(), device
        self._drawn = range(0)
        self._units: tuple[torch.Tensor, ...] = ()
        self._places: dict[tuple[str, int, tuple[int, ...], int], torch.Tensor] = {}

    def keep(self, number: int, shape: tuple[int, ...], first: int) -> torch.Tensor:
        """`Mask.keep` on the device; as `HostMasks.keep`, but for padding it may say anything."""
        if number not in self._drawn:
            self._draw(number)
        site, units = self._sites[number], self._units[number - self._drawn.start]
        if _end_to_end(site, shape) and site.width % BLOCK == 0:
            return units.view(shape)
        geometry = (site.kind, site.width, shape, first)
        if geometry not in self._places:  # sites of one kind have their units in the same places
            self._places[geometry] = self._places_of(number, shape, first)
        return units[self._places[geometry]]

    def _draw(self, number: int) -> None:
        """Decides on all units of site `number`, and of as many after it as may be drawn at once."""
        num_examples = len(self._ids)
        blocks = np.diff(self._starts, axis=0)
        fitting = int(np.searchsorted(blocks[number:].sum(axis=1).cumsum(), DEVICE_AT_ONCE, side="right"))
        self._drawn = range(number, number + max(1, fitting))
        drawn = slice(self._drawn.start, self._drawn.stop)
        # runs of blocks: first of each example those of the thresholds, then each site's of each example
        counts = np.concatenate([self._starts[0], blocks[drawn].ravel()])
        begins = np.concatenate([np.zeros_like(self._starts[0]), self._starts[drawn].ravel()])
        ids = np.tile(self._ids, 1 + len(self._drawn))
        rates = np.array([256 * site.p for site in self._sites[drawn]])
        runs = self._on_device(np.stack([counts, begins - (counts.cumsum() - counts), ids]))
        run = torch.repeat_interleave(runs[0], output_size=int(counts.sum()))
        shift, example = runs[1:, run]
        words = random_blocks(self._key, torch.arange(len(run), device=self._device) + shift, example, 1)
        thresholds = words[: int(self._starts[0].sum())].view(num_examples, -1)[:, drawn].t()
        uniform = ((thresholds >> 11) & (2**53 - 1)).double() * 2.0**-53
        limit = (self._on_device(rates)[:, None] + uniform).to(torch.int16).flatten()
        limit = torch.cat([limit[:num_examples], limit])[run]
        keep = words.view(torch.uint8) >= limit[:, None]
        sizes = np.concatenate([[self._starts[0].sum()], blocks[drawn].sum(axis=1)])
        self._units = keep.flatten().split((BLOCK * sizes).tolist())[1:]

    def _places_of(self, number: int, shape: tuple[int, ...], first: int) -> torch.Tensor:
        """Where the units of a shape are among those of site `number`, int64."""
        site, blocks = self._sites[number], np.diff(self._starts[number : number + 2], axis=0)[0]
        base = BLOCK * (blocks.cumsum() - blocks)
        axes = [torch.arange(size, device=self._device) for size in shape]
        if _end_to_end(site, shape):
            starts = self._lengths.cumsum() - self._lengths
            shift = self._on_device(np.repeat(base - starts * site.width, self._lengths))
            return shift[:, None] + axes[0][:, None] * site.width + axes[1]
        rows = slice(first, first + shape[0])
        behind = (-1, *[1] * (len(shape) - 1))
        bases, lengths = (part.view(behind) for part in self._on_device(np.stack([base[rows], self._lengths[rows]])))
        if site.kind == "pooled":
            return bases + axes[1]
        if site.kind == "tokens":
            places = axes[1][:, None] * site.width + axes[2]
        else:
            places = (axes[1][:, None, None] * lengths + axes[2][:, None]) * lengths + axes[3]
        units = self._on_device(BLOCK * blocks[rows]).view(behind)
        return bases + torch.minimum(places, units - 1)  # of padding: some unit of its example

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return on_device(array, self._device)


def _end_to_end(site: Site, shape: tuple[int, ...]) -> bool:
    return site.kind == "tokens" and len(shape) == 2

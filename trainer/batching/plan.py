"""The plan: which examples an optimizer step sees, and which rank computes them in which micro-batch.

Always holds: the global batch of a step is a pure function of (number of examples, batch.size, seed, step). Together
the ranks compute each of its examples exactly once, and all ranks run the same number of micro-batches. So a
resumed run replays nothing, and another number of processes changes only who computes.

Ranks are balanced longest-processing-time-first (Graham, 1969).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.batching.order import epoch_order
from trainer.data.tokens import ANY_LENGTH, num_windows

BLOCK_STEPS = 64
"""steps whose examples are computed together: it takes hardly longer than for one"""


@dataclass(frozen=True)
class MicroBatch:
    """The examples of one forward and backward on one rank."""

    ids: np.ndarray
    """example ids, int64 [B]"""
    weights: np.ndarray
    """weight of each example in the loss, float64 [B]; all 0 on a rank without work"""


@dataclass(frozen=True)
class Plan:
    """Every batch of a run, by step."""

    lengths: np.ndarray
    """tokens per example, over all of its windows, int64 [N]"""
    weights: np.ndarray
    """weight of each example in the loss (its class's), float64 [N]"""
    batch_size: int
    """examples of a global batch"""
    seed: int
    max_tokens: int
    """tokens of a micro-batch at most, padding included"""
    packed: bool = False
    """examples are packed end to end, without padding"""
    one_length: bool = False
    """all examples of a micro-batch have one length, so nothing is padded"""
    window_length: int = ANY_LENGTH
    """tokens of each window but the last of its example"""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last, shorter batch counts."""
        return -(-len(self.lengths) // self.batch_size)

    def global_batch(self, step: int) -> np.ndarray:
        """Example ids of step `step` (counted from 0), int64 [batch_size or, at an epoch's end, fewer]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        first = position % BLOCK_STEPS
        start = (position - first) * self.batch_size
        stop = min(start + BLOCK_STEPS * self.batch_size, len(self.lengths))
        order = epoch_order(start, stop, len(self.lengths), self.seed, epoch)
        return order[first * self.batch_size : (first + 1) * self.batch_size]

    def total_weight(self, step: int) -> float:
        """Sum of the weights of the global batch, which divides the summed loss on every rank.

        1 if all weights are 0 (classes of weight 0): such a step has no loss and no gradient.
        """
        return float(self.weights[self.global_batch(step)].sum()) or 1.0

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """The micro-batches of a rank in a step; the lists of all ranks have the same length, at least 1."""
        batch = self.global_batch(step)
        shares = self._shares(batch, world_size)
        # a rank without work computes the cheapest example with weight 0, so that all ranks run the same collectives
        filler = MicroBatch(batch[[int(np.argmin(self.lengths[batch]))]], np.zeros(1))
        mine = [MicroBatch(ids, self.weights[ids]) for ids in shares[rank]]
        return mine + [filler] * (max(map(len, shares)) - len(mine))

    def sizes(self, step: int, world_size: int) -> list[tuple[int, int]]:
        """Tokens, padding included, and examples of each micro-batch of a step, over all ranks."""
        parts = [ids for share in self._shares(self.global_batch(step), world_size) for ids in share]
        return [(num_positions(self.lengths[ids], self.packed, self.window_length), len(ids)) for ids in parts]

    def _shares(self, batch: np.ndarray, world_size: int) -> list[list[np.ndarray]]:
        """Per rank, the example ids of each of its micro-batches."""
        settings = self.max_tokens, self.packed, self.one_length, self.window_length
        return [
            [batch[share[part]] for part in split_by_tokens(self.lengths[batch[share]], *settings)]
            for share in share_out(self.lengths[batch], world_size)
        ]

    def num_tokens(self, step: int) -> int:
        """Tokens of the global batch, without padding."""
        return int(self.lengths[self.global_batch(step)].sum())


def share_out(lengths: np.ndarray, world_size: int) -> list[np.ndarray]:
    """Deals a global batch to ranks so that each has about the same number of tokens.

    Longest first, each to the rank with the fewest tokens so far. Deterministic.

    Example: lengths [5, 3, 2, 2], 2 ranks -> [[0, 3], [1, 2]]   (7 and 5 tokens)

    Returns:
        per rank, positions into `lengths`, longest first; every position exactly once.
    """
    order = np.argsort(-lengths, kind="stable")
    if world_size == 1:
        return [order]
    loads = [0] * world_size
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for position in order.tolist():
        rank = loads.index(min(loads))
        shares[rank].append(position)
        loads[rank] += int(lengths[position])
    return [np.array(share, dtype=np.int64) for share in shares]


def num_positions(lengths: np.ndarray, packed: bool, window_length: int = ANY_LENGTH) -> int:
    """Tokens that a micro-batch of examples of these lengths computes, padding included."""
    if packed:
        return int(lengths.sum())
    return int(num_windows(lengths, window_length).sum() * min(lengths.max(), window_length))


def split_by_tokens(
    lengths: Sequence[int] | np.ndarray,
    max_tokens: int,
    packed: bool = False,
    one_length: bool = False,
    window_length: int = ANY_LENGTH,
) -> list[list[int]]:
    """Cuts examples into micro-batches that fit a token budget, padding included.

    Longest first, so each part wastes little. Deterministic. An example above the budget gets its own part: only the
    device knows whether it fits. Packed parts are about equal. Padded parts are as full as they can be.

    Example: lengths [5, 3, 2], max_tokens 6 -> [[0], [1, 2]]   (5 <= 6, then 2 * 3 <= 6)

    Args:
        lengths: tokens per example, over all of its windows, [B].
        max_tokens: budget in tokens.
        packed: a part takes the sum of its lengths, not the longest times their number.
        one_length: all examples of a part have one length.
        window_length: tokens of each window but the last of its example; padded windows are rows of their own.

    Returns:
        positions into `lengths`; every position exactly once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    if len(order) == 0:
        return []
    ordered = np.asarray(lengths)[order]
    if packed:
        ends = _equal_ends(ordered.cumsum(), max_tokens)
    else:
        windows = num_windows(ordered, window_length)
        ends = _padded_ends(ordered.clip(max=window_length), windows.cumsum(), max_tokens, one_length)
    return [part.tolist() for part in np.split(order, ends[:-1])]


def _padded_ends(longest: np.ndarray, windows: np.ndarray, max_tokens: int, one_length: bool) -> list[int]:
    """Where each part of padded examples ends.

    `longest` are the tokens of each example's longest window, in descending order, and `windows` is the number of
    windows up to each example, [B] each.
    """
    ends, before = [0], 0
    while ends[-1] < len(longest):
        length = int(longest[ends[-1]])
        last = int(np.count_nonzero(longest >= length)) if one_length else len(longest)
        fitting = int(np.searchsorted(windows, before + max_tokens // length, side="right"))
        ends.append(min(last, max(fitting, ends[-1] + 1)))
        before = int(windows[ends[-1] - 1])
    return ends[1:]


def _equal_ends(cumulative: np.ndarray, max_tokens: int) -> list[int]:
    """Where each part of packed examples ends: as few parts as the budget allows, about equal.

    A small last part would be slow. `cumulative` is the number of tokens up to each example, [B].
    """

    def ends_for(budget: int) -> list[int]:
        ends, before = [0], 0
        while ends[-1] < len(cumulative):
            fitting = int(np.searchsorted(cumulative, before + budget, side="right"))
            ends.append(max(fitting, ends[-1] + 1))
            before = int(cumulative[ends[-1] - 1])
        return ends[1:]

    num_parts = len(ends_for(max_tokens))
    low, high = -(-int(cumulative[-1]) // num_parts), max_tokens
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(ends_for(middle)) <= num_parts else (middle + 1, high)
    return ends_for(high)

"""The plan: which examples an optimizer step sees, and who computes them.

Always holds: the global batch of a step is a pure function of (number of examples, batch.size, seed, step). Ranks and
micro-batches only share it out: together they compute each of its examples exactly once, and every rank runs the same
number of micro-batches. So resuming is an index, and another number of processes changes nothing but who works.

The epoch's order is a permutation that is computed where it is asked for and never held: a Feistel network (Luby &
Rackoff, 1988) of 24 rounds, as Mitchell et al. shuffle on GPUs (arXiv 2106.06161), walked until it ends inside the
range (Black & Rogaway, 2002). Its round keys are Philox's (Salmon et al., 2011) for the key (seed, epoch), its round
function is the mixing of SplitMix64 (Steele et al., 2014). Balancing is longest-processing-time-first (Graham, 1969).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trainer.config.splitmix import mix

AT_ONCE = 64  # batches whose examples are drawn together: it takes hardly longer than for one
ROUNDS = 24


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes in one forward and backward."""

    ids: np.ndarray
    """example ids, int64 [B]"""
    weights: np.ndarray
    """weight of each example in the loss, float64 [B]; all 0 for a rank short of work"""


@dataclass(frozen=True)
class Plan:
    """Every batch of a run, by step."""

    lengths: np.ndarray
    """tokens per example, int64 [N]"""
    weights: np.ndarray
    """weight of each example in the loss (its class's), float64 [N]"""
    batch_size: int
    """examples of a global batch"""
    seed: int
    max_tokens: int
    """tokens of a micro-batch at most, padding included"""
    packed: bool = False
    """examples lie end to end, without padding"""
    one_length: bool = False
    """a micro-batch has examples of one length only, so that nothing is padded"""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one epoch; the last, shorter batch counts."""
        return -(-len(self.lengths) // self.batch_size)

    def global_batch(self, step: int) -> np.ndarray:
        """Example ids of step `step` (counted from 0), int64 [batch_size or, at an epoch's end, fewer]."""
        epoch, position = divmod(step, self.steps_per_epoch)
        before = position % AT_ONCE
        start = (position - before) * self.batch_size
        stop = min(start + AT_ONCE * self.batch_size, len(self.lengths))
        order = shuffled(start, stop, len(self.lengths), self.seed, epoch)
        return order[before * self.batch_size : (before + 1) * self.batch_size]

    def total_weight(self, step: int) -> float:
        """Sum of the weights of the global batch: what the summed loss is divided by, on every rank.

        1 where all weigh nothing (classes of weight 0): such a step has no loss and no gradient.
        """
        return float(self.weights[self.global_batch(step)].sum()) or 1.0

    def micro_batches(self, step: int, rank: int, world_size: int) -> list[MicroBatch]:
        """What `rank` computes in `step`; the lists of all ranks have the same length, at least 1."""
        batch = self.global_batch(step)
        shares = self._shares(batch, world_size)
        # a rank short of work computes its cheapest example for nothing, so that all ranks meet in every collective
        filler = MicroBatch(batch[[int(np.argmin(self.lengths[batch]))]], np.zeros(1))
        mine = [MicroBatch(ids, self.weights[ids]) for ids in shares[rank]]
        return mine + [filler] * (max(map(len, shares)) - len(mine))

    def largest(self, step: int, world_size: int) -> tuple[int, int]:
        """Examples and tokens, padding included, of the largest micro-batch of a step, over all ranks."""
        parts = [ids for share in self._shares(self.global_batch(step), world_size) for ids in share]
        tokens, examples = max((num_positions(self.lengths[ids], self.packed), len(ids)) for ids in parts)
        return examples, tokens

    def num_padded_tokens(self, step: int, world_size: int) -> int:
        """Positions that all ranks compute in a step, padding included."""
        parts = [self.lengths[ids] for share in self._shares(self.global_batch(step), world_size) for ids in share]
        return sum(num_positions(lengths, self.packed) for lengths in parts)

    def _shares(self, batch: np.ndarray, world_size: int) -> list[list[np.ndarray]]:
        """Per rank, the example ids of each of its micro-batches."""
        settings = self.max_tokens, self.packed, self.one_length
        return [
            [batch[share[part]] for part in split_by_tokens(self.lengths[batch[share]], *settings)]
            for share in share_out(self.lengths[batch], world_size)
        ]

    def num_tokens(self, step: int) -> int:
        """Real tokens of the global batch."""
        return int(self.lengths[self.global_batch(step)].sum())


@functools.lru_cache(maxsize=2)
def shuffled(start: int, stop: int, num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The examples at places `start` to `stop` of an epoch's order, int64 [stop - start]; read-only, since shared.

    Time and memory are those of these places alone, whatever the number of examples and wherever they begin.
    """
    keys = np.random.Philox(key=[seed, epoch]).random_raw(ROUNDS)
    num_bits = max(2, (num_examples - 1).bit_length())
    order = _permuted(np.arange(start, stop, dtype=np.uint64), num_bits, keys)
    while (outside := order >= num_examples).any():
        order[outside] = _permuted(order[outside], num_bits, keys)
    examples = order.astype(np.int64)
    examples.setflags(write=False)
    return examples


def _permuted(x: np.ndarray, num_bits: int, keys: np.ndarray) -> np.ndarray:
    """A permutation of the numbers of so many bits: uint64 -> uint64."""
    sizes = num_bits - num_bits // 2, num_bits // 2
    left, right = x >> sizes[1], x & ((1 << sizes[1]) - 1)
    for i, key in enumerate(keys):
        mixed = mix((right + key).view(np.int64)).view(np.uint64)
        left, right = right, left ^ (mixed & ((1 << sizes[i % 2]) - 1))
    return (left << sizes[1]) | right


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


def num_positions(lengths: np.ndarray, packed: bool) -> int:
    """Tokens that a micro-batch of these lengths computes, padding included."""
    return int(lengths.sum() if packed else len(lengths) * lengths.max())


def split_by_tokens(
    lengths: Sequence[int] | np.ndarray, max_tokens: int, packed: bool = False, one_length: bool = False
) -> list[list[int]]:
    """Cuts examples into micro-batches that fit a token budget, padding included.

    Longest first, so each part wastes little. Deterministic. An example longer than the budget gets a part of its own:
    it cannot be cut, and only the device knows whether it fits. Packed, the parts are about equal; padded, each but the
    last is as full as it can be.

    Example: lengths [5, 3, 2], max_tokens 6 -> [[0], [1, 2]]   (5 <= 6, then 2 * 3 <= 6)

    Args:
        lengths: tokens per example after truncation, [B].
        max_tokens: budget in tokens.
        packed: examples lie end to end: a part takes the sum of its lengths, not the longest times their number.
        one_length: a part has examples of one length only.

    Returns:
        positions into `lengths`; every position exactly once.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    if len(order) == 0:
        return []
    ordered = np.asarray(lengths)[order]
    ends = _equal_ends(ordered.cumsum(), max_tokens) if packed else _padded_ends(ordered, max_tokens, one_length)
    return [part.tolist() for part in np.split(order, ends[:-1])]


def _padded_ends(lengths: np.ndarray, max_tokens: int, one_length: bool) -> list[int]:
    """Where each part of padded examples ends; lengths in descending order [B]."""
    ends = [0]
    while ends[-1] < len(lengths):
        longest = int(lengths[ends[-1]])
        last = int(np.count_nonzero(lengths >= longest)) if one_length else len(lengths)
        ends.append(min(last, ends[-1] + max(1, max_tokens // longest)))
    return ends[1:]


def _equal_ends(cumulative: np.ndarray, max_tokens: int) -> list[int]:
    """Where each part of packed examples ends: no more parts than the budget needs, with the lowest budget that does.

    Small products are slow products, so no part should be a remnant.

    Args:
        cumulative: tokens of the examples up to each, [B].
        max_tokens: budget in tokens.
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

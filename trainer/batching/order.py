"""The order of the examples in an epoch.

Always holds: the order is a pure function of (number of examples, seed, epoch). It is computed for the places that a
step needs and never stored.

It is a Feistel network (Luby & Rackoff, 1988) of 24 rounds, as Mitchell et al. shuffle on GPUs (arXiv 2106.06161). A
place outside of the range goes through it again (Black & Rogaway, 2002). Round keys are Philox's (Salmon et al., 2011)
for the key (seed, epoch). The round function is SplitMix64's (Steele et al., 2014).
"""

from __future__ import annotations

import functools

import numpy as np

from trainer.randomness.splitmix import mix

ROUNDS = 24


@functools.lru_cache(maxsize=2)
def epoch_order(start: int, stop: int, num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """The examples at places `start` to `stop` of an epoch, int64 [stop - start]; read-only, since it is cached.

    Time and memory depend on the number of places alone.
    """
    keys = np.random.Philox(key=[seed, epoch]).random_raw(ROUNDS)
    num_bits = max(2, (num_examples - 1).bit_length())
    order = permute(np.arange(start, stop, dtype=np.uint64), num_bits, keys)
    while (outside := order >= num_examples).any():
        order[outside] = permute(order[outside], num_bits, keys)
    examples = order.astype(np.int64)
    examples.setflags(write=False)
    return examples


def permute(x: np.ndarray, num_bits: int, keys: np.ndarray) -> np.ndarray:
    """Permutes the numbers of `num_bits` bits: uint64 -> uint64."""
    sizes = num_bits - num_bits // 2, num_bits // 2
    left, right = x >> sizes[1], x & ((1 << sizes[1]) - 1)
    for i, key in enumerate(keys):
        mixed = mix((right + key).view(np.int64)).view(np.uint64)
        left, right = right, left ^ (mixed & ((1 << sizes[i % 2]) - 1))
    return (left << sizes[1]) | right

"""SplitMix64 (Steele et al., 2014): random words that are a pure function of a key and an index.

Always holds: numpy and torch, on a host or on a device, compute the same bits. All integers are int64 and wrap around.
"""

from __future__ import annotations

from typing import Any

GAMMA = 0x9E3779B97F4A7C15 - 2**64
MULTIPLIERS = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


def mix(x: Any) -> Any:
    """Mixes the bits of int64 numbers, in place: a numpy array or a torch tensor. Returns x."""
    for shift, multiplier in zip((30, 27), MULTIPLIERS, strict=True):
        x ^= _shifted_right(x, shift)
        x *= multiplier
    x ^= _shifted_right(x, 31)
    return x


def random_words(key: Any, index: Any) -> Any:
    """Word `index` of the stream of `key`, int64. A word is a good key for another stream.

    Args:
        key: int64 array or tensor.
        index: likewise, or an int; the two are broadcast.
    """
    return mix(key + (index + 1) * GAMMA)


def _shifted_right(x: Any, shift: int) -> Any:
    """x >> shift with zeros from the left, where int64 repeats the sign."""
    shifted = x >> shift
    shifted &= 2 ** (64 - shift) - 1
    return shifted

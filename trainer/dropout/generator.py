"""Philox4x64-10 (Salmon et al., 2011) in torch's integers: numpy's random words, drawn on the device that needs them.

Always holds: word i of a stream is that of `numpy.random.Philox(key, counter).random_raw`, on every device.
"""

from __future__ import annotations

import numpy as np
import torch

from trainer.compat import on_device

ROUNDS = 10
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
KEY_STEPS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
LOW = 2**32 - 1


def random_blocks(
    key: tuple[int, int],
    blocks: torch.Tensor,
    second: torch.Tensor,
    third: int,
) -> torch.Tensor:
    """Words 4 b to 4 b + 3 of the streams that start at counter (0, second, third, 0).

    Args:
        key: of the generator.
        blocks: b of each block, int64 [N].
        second: second word of its stream's counter, int64 [N].
        third: third word of all counters.

    Returns:
        the words, as the int64 with the same bits, [N, 4].
    """
    keys = [[_signed(k + i * step) for k, step in zip(key, KEY_STEPS, strict=True)] for i in range(ROUNDS)]
    round_keys = on_device(np.array(keys, dtype=np.int64), blocks.device)
    # numpy counts up before it draws
    return rounds(blocks + 1, second, torch.full_like(second, third), round_keys)


def rounds(first: torch.Tensor, second: torch.Tensor, third: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """The words [N, 4] of blocks whose counters are (first, second, third, 0), [N] each; keys [10, 2]."""
    words = [first, second, third, torch.zeros_like(first)]
    for i in range(ROUNDS):
        high_0, low_0 = _product(words[0], MULTIPLIERS[0])
        high_2, low_2 = _product(words[2], MULTIPLIERS[1])
        words = [high_2 ^ words[1] ^ keys[i, 0], low_2, high_0 ^ words[3] ^ keys[i, 1], low_0]
    return torch.stack(words, dim=-1)


def _product(x: torch.Tensor, constant: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower 64 bits of unsigned products. torch has signed integers alone, whose products wrap around."""
    x_high, x_low = (x >> 32) & LOW, x & LOW
    high, low = constant >> 32, constant & LOW
    middle = x_high * low + ((x_low * low >> 32) & LOW)
    other = x_low * high + (middle & LOW)
    return x_high * high + ((middle >> 32) & LOW) + ((other >> 32) & LOW), x * _signed(constant)


def _signed(value: int) -> int:
    """The int64 with the bits of a number modulo 2**64."""
    return (value + 2**63) % 2**64 - 2**63

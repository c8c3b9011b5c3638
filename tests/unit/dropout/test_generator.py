"""The device's random words are numpy's, bit for bit."""

import numpy as np
import pytest
import torch

from trainer.dropout.generator import random_blocks

KEYS = [(0, 0), (7, 123), (2**63 - 1, 2**40), (2**64 - 1, 1)]


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("second", [0, 5, 2**40])
def test_the_words_are_those_of_numpys_generator(key, second):
    expected = np.random.Philox(key=np.array(key, dtype=np.uint64), counter=[0, second, 1, 0]).random_raw(400)
    found = random_blocks(key, torch.arange(100), torch.full((100,), second), 1)
    assert found.shape == (100, 4)
    assert np.array_equal(found.flatten().numpy().view(np.uint64), expected)


def test_blocks_may_come_from_anywhere_in_any_order():
    streams = {e: np.random.Philox(key=[3, 4], counter=[0, e, 1, 0]).random_raw(4000) for e in (2, 9)}
    blocks, second = torch.tensor([999, 0, 17, 17]), torch.tensor([2, 2, 9, 2])
    found = random_blocks((3, 4), blocks, second, 1).numpy().view(np.uint64)
    for row, b, e in zip(found, blocks.tolist(), second.tolist(), strict=True):
        assert np.array_equal(row, streams[e][4 * b : 4 * b + 4])
    assert len(np.unique(found)) == found.size

"""Random words by key and index: SplitMix64's, to the bit, from numpy and from torch."""

import numpy as np
import torch

from trainer.randomness.splitmix import mix, random_words

# the first words of the generator for the seed 1234567, from its author's C code
PUBLISHED = [
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
]  # fmt: skip


def test_the_words_are_the_published_ones():
    found = random_words(np.array([1234567]), np.arange(5))
    assert found.view(np.uint64).tolist() == PUBLISHED


def test_numpy_and_torch_compute_the_same_bits():
    numbers = np.random.default_rng(0).integers(-(2**63), 2**63, 10_000)
    numbers[:4] = [0, -1, 2**63 - 1, -(2**63)]
    keys, index = numbers[:100, None], numbers[100:200]
    expected = random_words(keys, index)
    assert np.array_equal(random_words(torch.from_numpy(keys), torch.from_numpy(index)).numpy(), expected)
    assert np.array_equal(mix(torch.from_numpy(numbers.copy())).numpy(), mix(numbers.copy()))
    assert len(np.unique(expected)) == expected.size
    assert np.array_equal(numbers[100:200], index), "the arguments are left as they were"

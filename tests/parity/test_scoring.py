"""Scoring counts each example once and gives the same bits on any number of ranks."""

import numpy as np
import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import scores
from trainer.tasks.single_label import TASK, confusion
from trainer.tasks.task import measure

SIZES = (1, 2, 3, 4, 13)  # with 2 and 3 ranks: one example, W - 1, W, W + 1 and a prime
NAMES = ["World", "Sports", "Business", "Sci/Tech"]


@pytest.fixture(scope="module")
def alone(parity_arguments):
    [result] = call_on_ranks(1, scores, parity_arguments("scores-1", 0.1), SIZES)
    return result


@pytest.mark.parametrize("world_size", [2, 3])
def test_equal_to_the_last_bit_on_any_number_of_ranks(alone, parity_arguments, world_size):
    expected, labels = alone
    ranks = call_on_ranks(world_size, scores, parity_arguments(f"scores-{world_size}", 0.1), SIZES)
    for size in SIZES:
        for found, _ in ranks:
            assert found[size].shape == (size, 4)
            assert found[size].tobytes() == expected[size].tobytes()
        assert confusion(found[size], labels[:size]).sum() == size
        metrics = measure(TASK, found[size], labels[:size], NAMES)
        assert metrics == measure(TASK, expected[size], labels[:size], NAMES)
        assert metrics["num_examples"] == size


def test_an_example_scores_the_same_in_any_split(alone):
    found, _ = alone
    for size in SIZES:
        assert np.abs(found[size] - found[13][:size]).max() < 1e-5
    assert len(np.unique(found[13][:, 0])) > 8, "all examples score alike: nothing is tested"

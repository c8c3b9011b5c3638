"""The token budget that is found before the first step: the longest examples fit, on every rank."""

import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import fitted

ABOVE = 130


@pytest.mark.parametrize(("packed", "world_size", "short"), [("true", 1, [0]), ("true", 2, [1]), ("false", 2, [0, 1])])
def test_it_is_halved_until_the_longest_examples_fit(parity_arguments, packed, world_size, short):
    arguments = parity_arguments(f"fit-{packed}", 0.1, "--batch.size", "16", "--model.packed", packed)
    ranks = call_on_ranks(world_size, fitted, arguments, short, ABOVE)
    assert len({budget for budget, *_ in ranks}) == 1
    for rank, (budget, tried, longest) in enumerate(ranks):
        assert budget is not None
        assert len(tried) == len(ranks[0][1]) > 1, "all ranks try as often"
        assert all(set(lengths) <= set(longest) for lengths in tried)
        if world_size == 1:
            assert tried[0] == longest
        assert max(map(max, (lengths for _, others, _ in ranks for lengths in others))) == longest[-1]
        sizes = [sum(part) if packed == "true" else len(part) * max(part) for part in tried]
        assert sizes[-1] <= budget < sizes[0]
        if rank in short:
            assert sum(tried[-1]) <= ABOVE
            assert sum(tried[-1]) >= ABOVE / 4


def test_where_all_fit_nothing_changes(parity_arguments):
    arguments = parity_arguments("fit-all", 0.1, "--batch.size", "16")
    for budget, tried, _ in call_on_ranks(2, fitted, arguments, [0, 1], 10**6):
        assert (budget, len(tried)) == (None, 1)


def test_not_even_the_longest_alone(parity_arguments):
    arguments = parity_arguments("fit-none", 0.1, "--batch.size", "16")
    for message, tried in call_on_ranks(2, fitted, arguments, [1], 3):
        assert message.startswith("step 1: out of memory with a single example of 4")
        assert len(tried[-1]) == 1

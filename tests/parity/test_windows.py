"""Long documents: the loss of each is that of the mean of its windows' logits, however the batch is shared out."""

import functools

import numpy as np
import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import gradients, scores, window_gradient
from tests.parity.test_gradients import STEP_IS_GRADIENT, TOLERANCE, WHOLE, distance

WINDOWS = ("--data.max_length", "16", "--data.long_documents", "windows", "--data.window_overlap", "5")
CASES = tuple((*batch, budget) for batch in ((8, 0), (7, 2)) for budget in (WHOLE, 90, 20, 1))


@pytest.fixture(scope="module")
def found(parity_arguments):
    """Results by rank of all cases, computed once for each setting."""

    @functools.cache
    def compute(world_size, packed="true", dropout=0.1, wrong=None):
        name = f"windows-{world_size}-{packed}-{dropout}-{wrong}"
        arguments = parity_arguments(name, dropout, *STEP_IS_GRADIENT, "--model.packed", packed, *WINDOWS)
        return call_on_ranks(world_size, gradients, arguments, CASES, wrong)

    return compute


@pytest.mark.parametrize(("world_size", "packed"), [(1, "true"), (2, "true"), (1, "false"), (2, "false")])
def test_every_factorisation_gives_one_gradient(found, world_size, packed):
    """Also where the token budget is below a document: that is a micro-batch of its own."""
    ranks, whole = found(world_size, packed), found(1, "false")[0]
    assert {len(rank[case]["sizes"]) for rank in ranks for case in CASES} >= ({1, 8} if world_size == 1 else {1, 4})
    for case in CASES:
        expected = whole[(*case[:2], WHOLE)]
        assert len(expected["sizes"]) == 1 and np.abs(expected["gradient"]).max() > 1e-2
        assert sum(size for rank in ranks for size in rank[case]["sizes"]) == case[0], "a document was counted twice"
        for rank in ranks:
            assert distance(rank[case], expected) < TOLERANCE, case
            assert rank[case]["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)


def test_the_step_is_that_of_the_tokenizers_windows_and_torchs_autograd(found, parity_arguments):
    arguments = parity_arguments("windows-plain", 0.0, *STEP_IS_GRADIENT, *WINDOWS)
    [(loss, gradient, counts)] = call_on_ranks(1, window_gradient, arguments, *CASES[0][:2])
    assert {1, 2, 3} <= set(counts)
    ours = found(1, dropout=0.0)[0][CASES[0]]
    assert ours["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert np.abs(ours["gradient"] - gradient).max() < TOLERANCE


@pytest.mark.parametrize("wrong", ["windows as examples", "masks of the document"])
def test_a_wrong_way_would_be_rejected(found, wrong):
    for case, result in found(1, wrong=wrong)[0].items():
        assert distance(result, found(1, "false")[0][(*case[:2], WHOLE)]) > 1e8 * TOLERANCE


def test_scores_are_one_row_for_each_document_on_any_number_of_ranks(parity_arguments):
    sizes = (1, 2, 13)
    [(alone, _)] = call_on_ranks(1, scores, parity_arguments("window-scores-1", 0.1, *WINDOWS), sizes)
    for ranks, _ in call_on_ranks(2, scores, parity_arguments("window-scores-2", 0.1, *WINDOWS), sizes):
        for size in sizes:
            assert ranks[size].shape == (size, 4) and ranks[size].tobytes() == alone[size].tobytes()
            assert np.abs(ranks[size] - alone[13][:size]).max() < 1e-5


def test_documents_that_fit_are_as_without_windows(parity_arguments):
    """To the bit."""
    settings = ("--data.max_length", "48", "--data.long_documents")
    cut, windows = (
        call_on_ranks(1, gradients, parity_arguments(f"fits-{way}", 0.1, *STEP_IS_GRADIENT, *settings, way), CASES[:2])
        for way in ("cut", "windows")
    )
    assert all(cut[0][case]["gradient"].tobytes() == windows[0][case]["gradient"].tobytes() for case in CASES[:2])
    assert all(cut[0][case]["loss"] == windows[0][case]["loss"] for case in CASES[:2])

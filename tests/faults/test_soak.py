"""Ten runs of two ranks, broken in every way at random moments; ISOTRAIN_FAULT_SEED draws other ones."""

import os

import pytest

from tests.faults.soak import soak


@pytest.mark.timeout(900)  # about 30 s where nothing else computes
def test_what_goes_wrong_at_a_random_moment_changes_nothing(tiny_backbone, tmp_path):
    seed = int(os.environ.get("ISOTRAIN_FAULT_SEED", "20"))
    assert soak(tiny_backbone, tmp_path, rounds=10, seed=seed) == (0, 0)

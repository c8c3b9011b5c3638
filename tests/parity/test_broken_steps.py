"""A step that fails changes nothing on any rank."""

import numpy as np
import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import broken_step, reads

SETTINGS = ("--batch.size", "20", "--batch.max_tokens", "60")
SAYS = {"loss": "step 1: the loss is not finite for ", "gradient": "step 1: the gradient of base_model.model."}


def arguments_of(parity_arguments, name):
    return parity_arguments("broken", 0.1, *SETTINGS, "--optim.name", name, "--run.name", f"broken-{name}")


@pytest.mark.parametrize(
    ("name", "scaled", "fault", "world_size"),
    [
        ("adamw", False, "memory", 2),
        *[(name, False, "gradient", 2) for name in ("adamw", "adam", "sgd")],
        ("adamw", False, "loss", 1),
        ("adamw", True, "loss", 2),
    ],
)
def test_a_step_that_fails_changes_nothing(parity_arguments, name, scaled, fault, world_size):
    arguments = arguments_of(parity_arguments, name)
    ranks = call_on_ranks(world_size, broken_step, arguments, fault, world_size - 1, scaled)
    for result, before, after, state in ranks:
        assert result.out_of_memory if fault == "memory" else result.startswith(SAYS[fault])
        assert np.array_equal(after, before)
        assert not state.any()


def test_the_host_reads_the_device_once_a_step(parity_arguments):
    """On a GPU the host waits for each read."""
    assert call_on_ranks(1, reads, arguments_of(parity_arguments, "adamw")) == [1]

"""Steps in flight: what is asked for before the step before it is known counts only if it is to."""

import numpy as np
import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import flights, looped, reads, stopped, whole_run

SETTINGS = ("--batch.size", "20", "--batch.max_tokens", "60")
SAYS = {
    "loss": "step 0: the loss is not finite for ",
    "gradient": "step 0: the gradient of base_model.model.",
}


def arguments_of(parity_arguments, name, *others):
    return parity_arguments("flight", 0.1, *SETTINGS, "--optim.name", name, *others, "--run.name", f"flight-{name}")


@pytest.mark.parametrize(
    ("name", "scaled", "fault", "world_size"),
    [
        ("adamw", False, "memory", 2),
        *[(name, False, "gradient", 2) for name in ("adamw", "adam", "sgd")],
        ("adamw", False, "loss", 1),
        ("adamw", True, "loss", 2),
    ],
)
def test_behind_a_step_that_fails_nothing_counts(parity_arguments, name, scaled, fault, world_size):
    arguments = arguments_of(parity_arguments, name)
    [(_, untouched, _), (_, *expected)] = call_on_ranks(world_size, flights, arguments, None, 0, True, scaled)[0]
    assert np.abs(expected[0] - untouched).max() > 1e-3
    ranks = call_on_ranks(world_size, flights, arguments, fault, world_size - 1, True, scaled)
    for [_, (gave, parameters, state), (_, *again)] in ranks:
        assert gave.out_of_memory if fault == "memory" else gave.startswith(SAYS[fault])
        assert np.array_equal(parameters, untouched)
        assert not state.any()
        assert all(map(np.array_equal, again, expected))


def test_one_that_is_not_told_counts(parity_arguments):
    arguments = arguments_of(parity_arguments, "adamw")
    for [(_, untouched, _), (_, parameters, _), _] in call_on_ranks(1, flights, arguments, "loss", 0, False):
        assert np.abs(parameters - untouched).max() > 1e-3


def test_the_host_enqueues_a_step_without_reading_a_tensor(parity_arguments):
    """The numbers of a step are read once, by `result_of`, when the next step is enqueued."""
    assert call_on_ranks(1, reads, arguments_of(parity_arguments, "adamw")) == [(0, 1)]


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_loop_tells_the_step_behind(parity_arguments, world_size):
    arguments = arguments_of(parity_arguments, "adamw")
    expected = call_on_ranks(world_size, looped, arguments)
    found = call_on_ranks(world_size, looped, arguments, world_size - 1, 2)
    for (right, _), (parameters, _) in zip(expected, found, strict=True):
        assert np.abs(parameters - right).max() < 1e-6
    # where memory has run out, the step behind is not computed: it would run out again
    assert [steps for _, steps in found] == [[0, 1, 0, 1, 2]] * (world_size - 1) + [[0, 1, 2]]


def test_a_run_is_the_same_with_two_steps_in_flight(parity_arguments):
    settings = ("--optim.max_steps", "9", "--evaluation.every_steps", "4", "--checkpoint.every_steps", "3")
    arguments = arguments_of(parity_arguments, "adamw", *settings)
    [(one, lines, _)] = call_on_ranks(1, whole_run, [*arguments[:-1], "one"])
    [(two, others, _)] = call_on_ranks(1, whole_run, [*arguments[:-1], "two"], None, 2)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert [trained(line) for line in lines] == [trained(line) for line in others]


def trained(line):
    """What a line of metrics.jsonl says of the training, and not of the machine."""
    return {name: value for name, value in line.items() if not name.startswith(("speed/", "memory/"))}


def test_behind_a_signal_nothing_counts(parity_arguments):
    """Else what goes wrong in the step behind it would lose those since the last checkpoint."""
    arguments = arguments_of(parity_arguments, "adamw")
    for number in (1, 2):
        assert call_on_ranks(1, stopped, arguments, number) == [([2], "Stopped")]

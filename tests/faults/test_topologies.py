"""A run that goes on with another number of processes is the same run: the same examples, the same adapter."""

import json
import signal

import pytest

from benchmarks.large import save_llama
from tests.harness.commands import changed, on_ranks
from tests.harness.data import OTHER_FAMILIES, save_backbone
from tests.harness.runs import assert_each_once, checkpoints, distance, records, trained_ids

LESS = ("no_figures",)
SETTINGS = {"optim__learning_rate": "1e-3", "checkpoint__every_steps": 4, "tracking__every_steps": 1}
TOLERANCE = 1e-5


def trained_alone(options, place, **changes):
    """Trains on one process without faults, with some options changed; gives its command line and its run folder."""
    arguments = changed(options, **SETTINGS, **changes)
    log = ("log_ids", str(place / "ids"))
    (ended,) = on_ranks(1, changed(arguments, run__output_dir=place), [LESS, log])
    assert ended.code == 0, ended.stderr
    return arguments, place / "run"


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    return trained_alone(options, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def decoder(options, tmp_path_factory):
    place = tmp_path_factory.mktemp("decoder")
    save_llama(place / "llama", "bfloat16", 2, hidden_size=64, num_hidden_layers=2, vocab_size=60)
    new = {"model__name": place / "llama", "model__dropout": None, "peft__target_modules": "all-linear"}
    return trained_alone(options, place, **new)


def rates(folder):
    """The learning rate of each step."""
    return [(line["step"], line["train/learning_rate"]) for line in records(folder) if "train/learning_rate" in line]


def test_two_ranks_then_one_then_four(alone, tmp_path):
    arguments, expected = alone
    arguments, folder = changed(arguments, run__output_dir=tmp_path), tmp_path / "run"
    logs = [tmp_path / f"ids-{start}" for start in range(3)]

    # an epoch has 6 steps: stopped in the middle of the first
    term = ("at_call", "example_losses", 4, int(signal.SIGTERM))
    two = on_ranks(2, arguments, [LESS, ("log_ids", str(logs[0]))], {1: [term]})
    assert [rank.code for rank in two] == [128 + signal.SIGTERM] * 2, two[0].stderr
    first = int(checkpoints(folder)[-1].name.removeprefix("step-"))
    assert 0 < first < 4

    # killed in the middle of the second, two steps behind a checkpoint
    kill = ("at_call", "apply_gradient", 11 - first)
    (one,) = on_ranks(1, arguments, [LESS, ("log_ids", str(logs[1])), kill])
    assert one.code == -signal.SIGKILL, one.stderr
    assert checkpoints(folder)[-1].name == "step-00000008"

    four = on_ranks(4, arguments, [LESS, ("log_ids", str(logs[2]))])
    assert [rank.code for rank in four] == [0] * 4, four[0].stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["world_sizes"] == [2, 1, 4]
    assert summary["resumed_from"] == [first, 8]

    seen = [len(trained_ids([log])) for log in logs]
    assert seen == [first, 11 - first, 4], "the starts share the steps otherwise"
    assert_each_once(trained_ids(logs), folder)
    assert len(rates(folder)) == 12
    assert rates(folder) == rates(expected)
    assert distance(folder, expected) < TOLERANCE


@pytest.mark.parametrize("family", ["modernbert", "qwen3"])
def test_two_ranks_then_one_in_another_packed_family(family, options, tmp_path):
    targets, sizes = OTHER_FAMILIES[family]
    changes = {"model__name": save_backbone(tmp_path / family, family, **sizes), "peft__target_modules": targets}
    arguments, expected = trained_alone(options, tmp_path / "alone", **changes, model__packed="true", optim__epochs=1)
    arguments = changed(arguments, run__output_dir=tmp_path)
    term = ("at_call", "example_losses", 4, int(signal.SIGTERM))
    two = on_ranks(2, arguments, [LESS], {1: [term]})
    assert [rank.code for rank in two] == [128 + signal.SIGTERM] * 2, two[0].stderr
    (one,) = on_ranks(1, arguments, [LESS])
    assert one.code == 0, one.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_sizes"] == [2, 1]
    assert distance(tmp_path / "run", expected) < TOLERANCE


@pytest.mark.parametrize(("world_size", "tolerance"), [(1, 0), (2, TOLERANCE)])
def test_a_decoder_goes_on_with_one_rank(decoder, tmp_path, world_size, tolerance):
    """With gradient checkpointing, which the uninterrupted run did not have."""
    arguments, expected = decoder
    arguments = changed(arguments, run__output_dir=tmp_path, model__gradient_checkpointing="true")
    killed = on_ranks(world_size, arguments, [LESS], {world_size - 1: [("at_call", "apply_gradient", 6)]})
    assert -signal.SIGKILL in [rank.code for rank in killed], killed[0].stderr
    (one,) = on_ranks(1, arguments, [LESS])
    assert one.code == 0 and "continuing after step 4 " in one.stderr, one.stderr
    assert distance(tmp_path / "run", expected) <= tolerance


def test_another_seed_and_an_example_twice_are_noticed(alone, options, tmp_path):
    (_, one), (_, other) = alone, trained_alone(options, tmp_path, run__seed=43)
    assert distance(one, other) > 100 * TOLERANCE

    ids = trained_ids([one.parent / "ids"])
    assert_each_once(ids, one)
    with pytest.raises(AssertionError, match="epoch of steps 7 to 12"):
        assert_each_once(ids | {9: [*ids[9], ids[9][0]]}, one)
    with pytest.raises(AssertionError, match="epoch of steps 1 to 6"):
        assert_each_once(ids | {0: ids[0][1:]}, one)

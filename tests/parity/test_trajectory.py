"""A whole run through the real loop ends in the same adapter on any number of ranks and with any micro-batches."""

import functools

import numpy as np
import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import raw_run, sharded_run, whole_run, whole_runs

# 61 examples in batches of 20: the fourth step is the epoch's tail, one example, fewer than there are ranks
SETTINGS = (
    "--optim.max_steps", "6", "--optim.learning_rate", "1e-3", "--optim.warmup_fraction", "0.2", "--batch.size", "20",
    "--evaluation.every_steps", "3", "--checkpoint.every_steps", "3", "--run.name", "whole",
)  # fmt: skip
# token budgets that make 1, 2, 4 and many ragged micro-batches of a batch on one rank
BUDGETS = (10_000, 350, 160, 45)
EXACT = {"step", "epoch", "train/learning_rate"}
CLOSE = {"train/loss", "train/grad_norm", "validation/loss"}
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def found(parity_arguments):
    """Per rank {budget: (adapter, curve, number of micro-batches)} of whole runs; computed once."""

    @functools.cache
    def compute(world_size, wrong, packed):
        budgets = [max(20, budget // world_size) for budget in BUDGETS]
        name = f"{world_size}-{packed}"
        arguments = [*parity_arguments("whole", 0.1, *SETTINGS), "--model.packed", packed, "--run.name", name]
        return call_on_ranks(world_size, whole_runs, arguments, budgets if wrong is None else budgets[-1:], wrong)

    return lambda world_size, wrong=None, packed="true": compute(world_size, wrong, packed)


def distance(one, other):
    assert one.keys() == other.keys()
    return max(float(np.abs(one[name] - other[name]).max()) for name in one)


@pytest.mark.parametrize(
    ("world_size", "packed"), [(1, "true"), (2, "true"), (3, "true"), (4, "true"), (1, "false"), (2, "false")]
)
def test_any_ranks_and_micro_batches_train_the_same_adapter(found, world_size, packed):
    expected, curve, _ = found(1, packed="false")[0][10_000]
    assert [line["step"] for line in curve if "train/learning_rate" in line] == [1, 2, 3, 4, 5, 6]
    assert len([line for line in curve if "validation/accuracy" in line]) == 2
    for rank, results in enumerate(found(world_size, packed=packed)):
        for adapter, lines, _ in results.values():
            assert distance(adapter, expected) < TOLERANCE
            assert len(lines) == (0 if rank else len(curve))
            for line, other in zip(curve, lines, strict=False):
                assert line.keys() == other.keys()
                assert all(line[name] == other[name] for name in EXACT & line.keys())
                for name in CLOSE & line.keys():
                    assert line[name] == pytest.approx(other[name], rel=1e-4)


def test_the_cuts_are_as_various_as_they_should_be(found):
    for packed in ("true", "false"):
        counts = [number for _, _, number in found(1, packed=packed)[0].values()]
        assert counts[0] == 1 < counts[1] < counts[2] <= 4
        assert counts[3] > 8
    assert all(number > 1 for _, _, number in list(found(4)[0].values())[1:])


@pytest.mark.parametrize("wrong", ["mean of means", "rank"])
def test_wrong_weighting_and_masks_keyed_by_rank_would_be_rejected(found, wrong):
    expected = found(1)[0][10_000][0]
    [(adapter, _, _)] = found(2, wrong)[0].values()
    assert distance(adapter, expected) > 10 * TOLERANCE


def test_frozen_weights_shared_out_train_the_same_adapter(found, parity_arguments):
    arguments = parity_arguments("sharded", 0.1, *SETTINGS, "--batch.max_tokens", "100", "--run.name", "sharded")
    for adapter, held in call_on_ranks(2, sharded_run, arguments):
        assert distance(adapter, found(1)[0][10_000][0]) < TOLERANCE
        assert 0.4 < held < 0.6


def test_frozen_weights_shared_out_and_all_biases_trained(parity_arguments):
    arguments = parity_arguments("biases", 0.1, *SETTINGS, "--batch.max_tokens", "100", "--peft.bias", "all")
    [(expected, *_)] = call_on_ranks(1, whole_run, [*arguments, "--run.name", "biases-whole"])
    for adapter, _ in call_on_ranks(2, sharded_run, [*arguments, "--run.name", "biases-sharded"]):
        assert distance(adapter, expected) < TOLERANCE


ADALORA = [
    "--peft.peft_type", "ADALORA", "--peft.r", "null", "--peft.init_lora_weights", "true", "--peft.init_r", "4",
    "--peft.target_r", "2", "--peft.tinit", "1", "--peft.tfinal", "1", "--peft.deltaT", "1",
]  # fmt: skip


@pytest.mark.parametrize(
    "adapter",
    [["--peft.init_lora_weights", "olora"], ["--peft.init_lora_weights", "eva"], ADALORA],
    ids=["olora", "eva", "adalora"],
)
def test_an_adapter_that_is_more_than_its_tensors(parity_arguments, adapter):
    """With a faster B, as in LoRA+."""
    arguments = [*parity_arguments("adapter", 0.1, *SETTINGS), *adapter, "--optim.lora_b_lr_ratio", "4"]
    arguments += ["--optim.max_steps", "4", "--run.name"]
    [(expected, *_)] = call_on_ranks(1, whole_run, [*arguments, f"{adapter[-1]}-one"])
    for found, *_ in call_on_ranks(2, whole_run, [*arguments, f"{adapter[-1]}-two", "--batch.max_tokens", "100"]):
        assert distance(found, expected) < TOLERANCE


@pytest.mark.parametrize("other", [("--run.seed", "43"), ("--model.dropout", "0.0")])
def test_another_seed_or_dropout_trains_another_adapter(found, parity_arguments, other):
    arguments = [*parity_arguments("whole", 0.1, *SETTINGS), *other, "--run.name", "other"]
    [(adapter, *_)] = call_on_ranks(1, whole_run, arguments)
    assert distance(adapter, found(1)[0][10_000][0]) > 100 * TOLERANCE


def test_a_plain_data_parallel_loop_trains_the_same_adapter(parity_arguments):
    """Against the outside: three steps of 16 examples, dealt evenly to two ranks."""
    arguments = parity_arguments("raw", 0.0, *SETTINGS, "--optim.class_weights", "null", "--batch.size", "16")
    arguments += ["--optim.max_steps", "3", "--batch.max_tokens", "100"]
    (theirs, _) = call_on_ranks(2, raw_run, [*arguments, "--run.name", "raw-theirs"])
    ((ours, *_), _) = call_on_ranks(2, whole_run, [*arguments, "--run.name", "raw-ours"])
    assert distance(ours, theirs) < TOLERANCE

"""A whole run through the real loop ends in the same adapter on one rank and on several."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from ranks import on_ranks, raw_run, whole_run

SETTINGS = (
    "--optim.max_steps", "6", "--optim.learning_rate", "1e-3", "--optim.warmup_fraction", "0.2", "--batch.size", "16",
    "--evaluation.every_steps", "3", "--checkpoint.every_steps", "3",
)  # fmt: skip
EXACT = {"step", "epoch", "train/learning_rate"}
CLOSE = {"train/loss", "train/grad_norm", "validation/loss"}


def run_on(world_size, arguments, name, max_tokens):
    return on_ranks(
        world_size, whole_run, [*arguments, *SETTINGS, "--run.name", name, "--batch.max_tokens", max_tokens]
    )


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_rank_and_several_train_the_same_adapter(parity_arguments, dropout):
    arguments = parity_arguments("trajectory", dropout)
    [(expected, curve)] = run_on(1, arguments, f"one-{dropout}", 10_000)
    assert [line["step"] for line in curve if "train/learning_rate" in line] == [1, 2, 3, 4, 5, 6]
    assert len([line for line in curve if "validation/accuracy" in line]) == 2
    for world_size, max_tokens in ((2, 100), (3, 60), (4, 45)):
        ranks = run_on(world_size, arguments, f"{world_size}-{dropout}", max_tokens)
        for adapter, _ in ranks:
            assert adapter.keys() == expected.keys()
            assert max(np.abs(adapter[name] - expected[name]).max() for name in expected) < 1e-5
        assert len(curve) == len(ranks[0][1])
        for line, other in zip(curve, ranks[0][1], strict=True):
            assert line.keys() == other.keys()
            assert all(line[name] == other[name] for name in EXACT & line.keys())
            for name in CLOSE & line.keys():
                assert line[name] == pytest.approx(other[name], rel=1e-4)


def test_another_seed_trains_another_adapter(parity_arguments):
    arguments = parity_arguments("trajectory", 0.1)
    [(one, _)] = run_on(1, arguments, "seed-42", 10_000)
    [(other, _)] = run_on(1, [*arguments, "--run.seed", "43"], "seed-43", 10_000)
    assert max(np.abs(one[name] - other[name]).max() for name in one) > 1e-3


def test_a_plain_data_parallel_loop_trains_the_same_adapter(parity_arguments):
    """Against the outside: three steps of 16 examples, dealt evenly to two ranks."""
    arguments = parity_arguments("raw", 0.0, *SETTINGS)
    arguments += ["--optim.class_weights", "null", "--optim.max_steps", "3", "--batch.max_tokens", "100"]
    (theirs, _) = on_ranks(2, raw_run, [*arguments, "--run.name", "raw-theirs"])
    ((ours, _), _) = on_ranks(2, whole_run, [*arguments, "--run.name", "raw-ours"])
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[name] - theirs[name]).max() for name in ours) < 1e-5

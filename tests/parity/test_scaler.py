"""The fp16 scaler: a scaled step is the plain one, and one that overflows changes nothing but the scale."""

import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import scaled_steps

SETTINGS = ("--batch.size", "20", "--batch.max_tokens", "45", "--optim.weight_decay", "0")
SCALE = 2.0**30


@pytest.mark.parametrize(
    ("name", "limit", "world_size"),
    [("sgd", "null", 1), ("sgd", "0.01", 2), ("adamw", "0.01", 1), ("adamw", "null", 2)],
)
def test_overflows_are_skipped_and_the_other_steps_are_plain_ones(parity_arguments, name, limit, world_size):
    settings = (*SETTINGS, "--optim.name", name, "--optim.max_grad_norm", limit, "--run.name", f"{name}-{limit}")
    arguments = parity_arguments("scaler", 0.1, *settings)
    for plain, (*skipped, applied) in call_on_ranks(world_size, scaled_steps, arguments, SCALE):
        assert len(skipped) > 2
        assert [step["scale"] for step in skipped] == [SCALE / 2**i for i in range(1, len(skipped) + 1)]
        for step in skipped:
            assert step["change"] == 0
            assert not step["norm"] < float("inf")
        assert plain["norm"] > 0.01
        assert applied["norm"] == pytest.approx(plain["norm"], rel=1e-5)
        assert applied["change"] == pytest.approx(plain["change"], rel=1e-4)

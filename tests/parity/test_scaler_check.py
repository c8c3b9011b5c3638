"""The check of fp16, with a scaler on the CPU: it passes, and it fails where a step that overflows is applied."""

import dataclasses
from pathlib import Path

import pytest

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import build, with_scaler
from trainer.verification.checks import Evidence, check_scaler

AMPLIFIED = 1e25
"""the gradient's factor, so that a scale of 2**60 overflows in fp32 too"""


def overflow_figures(arguments, skips):
    from trainer.verification.ranks import overflow

    run, other = (with_scaler(build(arguments), 1.0) for _ in range(2))
    forward = run.learner.forward

    class Amplified:
        collate, padding = forward.collate, forward.padding

        def __call__(self, *inputs):
            return forward(*inputs) * AMPLIFIED

    if not skips:
        run.learner.accelerator.scaler.step = lambda optimizer, *given: optimizer.step()
    return overflow(dataclasses.replace(run, learner=dataclasses.replace(run.learner, forward=Amplified())), other)


@pytest.mark.parametrize("skips", [True, False])
def test_a_step_that_overflows_must_be_skipped(parity_arguments, skips):
    arguments = parity_arguments("overflow", 0.1, "--optim.max_grad_norm", "null", "--run.name", f"skips-{skips}")
    (figures,) = call_on_ranks(1, overflow_figures, arguments, skips)
    evidence = Evidence(Path(), "gpu", 1)
    evidence.one = {"scaler": figures}
    assert check_scaler(evidence).is_ok == skips
    assert figures["skipped"] == skips and figures["scales"][1] == figures["resumed_scale"] == figures["scales"][0] / 2

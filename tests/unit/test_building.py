"""What a run is built from: what is compiled, and what is said where that cannot be."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from trainer.config.schema import Config, ModelConfig
from trainer.errors import UserError
from trainer.training.setup import Compiled, _compiled, _recorded

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def asking(wanted):
    return dataclasses.replace(Config(), model=ModelConfig(compile=wanted))


def fails():
    raise RuntimeError("Failed to find\nC compiler")


def test_auto_compiles_and_goes_without_where_that_fails():
    found = _compiled(asking("auto"), lambda: None)
    assert (found.seconds >= 0, found.why_not) == (True, None)
    assert _compiled(asking("auto"), fails) == Compiled(why_not="Failed to find C compiler")


def test_false_compiles_nothing():
    assert _compiled(asking(False), fails) == Compiled()


def test_true_compiles_or_refuses():
    assert _compiled(asking(True), lambda: None).why_not is None
    refusal = r"model\.compile: true is not supported here: Failed to find C compiler; auto goes without"
    with pytest.raises(UserError, match=refusal):
        _compiled(asking(True), fails)


@pytest.mark.parametrize(
    ("wanted", "device", "unreached", "packed", "recorded", "why_not"),
    [
        (True, GPU, [], True, True, None),
        (True, GPU, [], False, False, "they are padded"),
        (True, GPU, ["rand"], True, False, "what the host draws would be the same in every replay"),
        (True, CPU, [], True, False, None),
        ("auto", GPU, [], True, False, None),
        (False, GPU, ["rand"], False, False, None),
    ],
)
def test_what_is_recorded(wanted, device, unreached, packed, recorded, why_not):
    keys = SimpleNamespace(unreached=unreached)
    assert _recorded(asking(wanted), keys, packed, device) == (recorded, why_not)

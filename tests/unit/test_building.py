"""What a run is built from: what is compiled, and what is said where that cannot be."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from trainer.building import _compile_masks, _recorded, prepare
from trainer.config import Config, ModelConfig, UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def compiled(wanted, device, error=None):
    """What comes of compiling for a device, where it works or ends in an error; and for which devices it was tried."""
    tried = []

    def compile(where):
        tried.append(where)
        if error:
            raise error

    config = dataclasses.replace(Config(), model=ModelConfig(compile=wanted))
    return *_compile_masks(config, SimpleNamespace(compile=compile), device), tried


def test_auto_compiles_on_a_gpu_and_goes_without_where_it_fails():
    seconds, why_not, tried = compiled("auto", GPU)
    assert (seconds >= 0, why_not, tried) == (True, None, [GPU])
    assert compiled("auto", GPU, RuntimeError("Failed to find\nC compiler")) == (
        None, "Failed to find C compiler", [GPU]
    )  # fmt: skip
    assert compiled("auto", CPU) == (None, None, [])


@pytest.mark.parametrize("device", [CPU, GPU])
def test_false_compiles_nothing(device):
    assert compiled(False, device) == (None, None, [])


def test_true_compiles_or_refuses():
    assert compiled(True, GPU)[2] == [GPU]
    with pytest.raises(UserError, match=r"model\.compile: true is not to be had: no compiler; auto goes without"):
        compiled(True, GPU, RuntimeError("no compiler"))


@pytest.mark.parametrize(
    ("wanted", "unreached", "packed", "why_not"),
    [
        (True, [], True, None),
        (True, [], False, "they are padded"),
        (True, ["rand"], True, "what the host draws would be the same in every replay"),
        ("auto", [], True, None),
        (False, ["rand"], False, None),
    ],
)
def test_what_is_recorded(wanted, unreached, packed, why_not):
    config = dataclasses.replace(Config(), model=ModelConfig(compile=wanted))
    expected = (wanted is True and why_not is None, why_not)
    assert _recorded(config, SimpleNamespace(unreached=unreached), packed) == expected


def test_nothing_to_compile_is_said_before_anything_is_read(tmp_path):
    config = dataclasses.replace(Config(), model=ModelConfig(compile=True))
    with pytest.raises(UserError, match=r"model\.compile: true is not to be had: on a CPU masks are numpy's"):
        prepare(config, tmp_path / "run", "no", CPU)
    assert not list(tmp_path.iterdir())

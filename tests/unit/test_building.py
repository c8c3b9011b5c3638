"""What a run is built from: what is compiled, and what is said where that cannot be."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from trainer.config.schema import Config, ModelConfig, UserError
from trainer.dropout import kernels
from trainer.dropout.kernels import NotCompiled
from trainer.training.setup import Compiled, _compiled, _for_cpu, _recorded, prepare

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def asking(wanted):
    return dataclasses.replace(Config(), model=ModelConfig(compile=wanted))


def fails():
    raise RuntimeError("Failed to find\nC compiler")


def test_auto_compiles_and_goes_without_where_that_fails():
    found = _compiled(asking("auto"), lambda: "kernels")
    assert (found.kernels, found.seconds >= 0, found.why_not) == ("kernels", True, None)
    assert _compiled(asking("auto"), fails) == Compiled(why_not="Failed to find C compiler")


def test_false_compiles_nothing():
    assert _compiled(asking(False), fails) == Compiled()


def test_true_compiles_or_refuses():
    assert _compiled(asking(True), lambda: "kernels").kernels == "kernels"
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


def test_nothing_to_compile_is_said_before_anything_is_read(tmp_path, monkeypatch):
    def refuses():
        raise NotCompiled("there is no C compiler 'cc'")

    monkeypatch.setattr(kernels, "load_kernels", refuses)
    with pytest.raises(UserError, match=r"model\.compile: true is not supported here: there is no C compiler 'cc'"):
        prepare(asking(True), tmp_path / "run", "no", CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("supported", "notes"), [(True, "there is no C compiler 'cc'"), (False, None)])
def test_a_processor_that_cannot_is_no_news(supported, notes, monkeypatch):
    def refuses():
        raise NotCompiled("there is no C compiler 'cc'")

    monkeypatch.setattr(kernels, "load_kernels", refuses)
    monkeypatch.setattr(kernels, "are_supported", lambda: supported)
    assert _for_cpu(asking("auto")) == Compiled(why_not=notes)

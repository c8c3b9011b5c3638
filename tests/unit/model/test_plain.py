"""Training without an adapter: what trains, its gradient without padding, and the way back from disk."""

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.families import TEXTS, tiny_classifier, tokenizer
from tests.unit.model.test_build import logits, train, trained
from trainer.config.loading import parse_config
from trainer.config.schema import PeftConfig
from trainer.data.tokens import Examples
from trainer.errors import UserError
from trainer.model.adapter import adapter_tensors, load_adapter_tensors, load_trained_model
from trainer.model.build import build_model, check_fit, shard_frozen
from trainer.model.plain import train_plainly
from trainer.packed.families import FAMILIES, why_not_packed
from trainer.packed.forward import PackedForward, PaddedForward, Padding

ALL, BIAS = (PeftConfig(peft_type="NONE", train=train) for train in ("all", "bias"))


def test_what_trains(backbone):
    whole, biases = (build_model(backbone, settings, 42)[0] for settings in (ALL, BIAS))
    assert whole.get_nb_trainable_parameters()[0] == whole.get_nb_trainable_parameters()[1]
    names = [name.removeprefix("base_model.model.") for name in trained(biases)]
    assert {name for name in names if name.startswith("roberta.")} == {
        name for name in adapter_tensors(whole) if name.startswith("roberta.") and name.endswith("bias")
    }
    assert [name for name in names if not name.startswith("roberta.")] == [
        "classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"peft\.max_trainable_parameters: .* parameters would train, the budget is 9"):
        check_fit(backbone, PeftConfig(peft_type="NONE", max_trainable_parameters=9), 32, pairs=False)


@pytest.mark.parametrize("settings", [ALL, BIAS], ids=["all", "bias"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_what_trained_comes_back(backbone, batch, tmp_path, settings, precision):
    model = train(build_model(backbone, settings, 42)[0], batch)
    tensors = adapter_tensors(model)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors")
    fresh = load_trained_model(backbone, tmp_path)
    assert torch.equal(logits(fresh, batch), logits(model, batch))
    assert not trained(fresh)
    narrow = load_trained_model(backbone, tmp_path, precision)
    assert {p.dtype for name, p in narrow.named_parameters() if name.endswith("classifier.dense.bias")} == {
        torch.float32
    }
    again = build_model(backbone, settings, 42)[0].eval()
    assert (logits(again, batch) - logits(model, batch)).abs().max() > 1e-3
    load_adapter_tensors(again, tensors, "test")
    assert torch.equal(logits(again, batch), logits(model, batch))
    with pytest.raises(UserError, match="test: the adapter lacks tensor classifier"):
        load_adapter_tensors(again, {name: t for name, t in tensors.items() if "classifier" not in name}, "test")


def examples():
    """Longest first, as a packed micro-batch has them."""
    rows = sorted((tokenizer()(text)["input_ids"] for text in TEXTS.texts), key=len, reverse=True)
    lengths = np.array([len(row) for row in rows])
    offsets = np.concatenate([[0], lengths.cumsum()])
    return Examples(np.concatenate(rows), offsets, None, np.zeros(len(rows), dtype=np.int64), lengths)


def gradient(model, forward):
    """Of all logits squared, by parameter."""
    given = examples()
    ids = np.arange(len(given.lengths))
    batch = forward.collate(given, ids, np.ones(len(ids)), torch.device("cpu"))
    forward(batch.inputs, batch.lengths).square().sum().backward()
    return {name: parameter.grad for name, parameter in trained(model).items()}


@pytest.mark.parametrize("family", sorted(kind.config_class.model_type for kind in FAMILIES))
def test_the_packed_gradient_of_all_weights_is_the_padded_one(family):
    models = [train_plainly(tiny_classifier(family).double().eval(), ALL, "tiny", set()) for _ in range(2)]
    if family == "mpnet":
        assert "relative_attention_bias trains" in why_not_packed(models[0])
        return
    assert why_not_packed(models[0]) is None
    packed = gradient(models[0], PackedForward(models[0]))
    padded = gradient(models[1], PaddedForward(models[1], 1, Padding()))
    assert max((packed[name] - padded[name]).abs().max() for name in padded) < 1e-12
    assert max(found.abs().max() for found in padded.values()) > 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            PeftConfig(peft_type="NONE", options={"r": 4}),
            r"peft\.r has no effect with peft\.peft_type none; --peft\.r null",
        ),
        (BIAS, r"peft\.train: bias needs biases, and this backbone has none; use all"),
    ],
)
def test_refusals(settings, message):
    with pytest.raises(UserError, match=message):
        train_plainly(tiny_classifier("llama"), settings, "tiny", set())


def test_frozen_weights_that_are_not_there_are_not_sharded(backbone):
    with pytest.raises(UserError, match=r"peft\.peft_type none: no weight is frozen.*; start without FSDP"):
        shard_frozen(build_model(backbone, ALL, 42)[0], torch.device("cpu"), 2)


def test_an_adapter_has_nothing_to_choose():
    with pytest.raises(UserError, match=r"peft\.train bias is for peft\.peft_type none"):
        parse_config(["--data.train", "x.csv", "--peft.train", "bias"])

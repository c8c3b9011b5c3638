"""Gradient checkpointing changes no gradient: the layers that backward computes again drop the same units."""

import functools

import numpy as np
import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    LlamaConfig,
    Qwen3Config,
    RobertaConfig,
)

from tests.harness.ranks import call_on_ranks
from tests.parity.ranks import gradients
from trainer.compat import checkpoint_layers
from trainer.dropout.sites import install
from trainer.packed.forward import PackedForward, PaddedForward

LENGTHS = np.array([13, 9, 9, 4])
SIZE = {
    "vocab_size": 60, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "num_labels": 3, "hidden_size": 32,
    "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
RATES = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
FAMILIES = {
    "packed roberta": RobertaConfig(**SIZE, **RATES),
    "packed qwen3": Qwen3Config(**SIZE, num_key_value_heads=2, head_dim=12, attention_dropout=0.1),
    "roberta": RobertaConfig(**SIZE, **RATES),
    "llama": LlamaConfig(**SIZE, num_key_value_heads=2),
    "dropout without keys": DebertaV2Config(**SIZE, **RATES, relative_attention=True, pos_att_type=["p2c"]),
}


def build(family, way):
    """A model in fp64 and in training mode, its dropout keys, and its forward, whose layers `way(keys)` calls."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(FAMILIES[family])
    options = {"r": 2, "target_modules": "all-linear", "lora_dropout": 0.1, "init_lora_weights": False}
    model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, **options)).double().train()
    keys = install(model, seed=7)
    if "packed" in family:
        return keys, PackedForward(model, way and way(keys))
    if way:
        checkpoint_layers(model.get_base_model(), way(keys))
    return keys, PaddedForward(model, 1)


def gradient(family, way=None):
    """The gradient of one micro-batch, and the bytes that the forward keeps for it."""
    keys, forward = build(family, way)
    tokens = [torch.arange(length) % 57 + 3 for length in LENGTHS]
    inputs = {"input_ids": torch.cat(tokens)}
    if not forward.packed:
        inputs["input_ids"] = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=1)
        inputs["attention_mask"] = (inputs["input_ids"] != 1).long()
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    torch.manual_seed(0)
    with keys.micro_batch(3, np.arange(len(LENGTHS)), LENGTHS):
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = forward(inputs, LENGTHS).square().sum()
        before = kept
        loss.backward()
    trained = [parameter.grad for parameter in forward.model.parameters() if parameter.requires_grad]
    return torch.cat([tensor.flatten() for tensor in trained]), before


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family):
    expected, kept = gradient(family)
    found, still_kept = gradient(family, lambda keys: keys.checkpoint)
    assert (found - expected).abs().max() < 1e-12 * expected.abs().max()
    assert still_kept < kept / 2


def other_masks(keys):
    """A checkpoint whose second forward drops other units."""

    def compute(function, *inputs):
        if torch._C._current_graph_task_id() != -1:  # within backward
            keys._masks._keys = keys._masks._keys + 1
        return function(*inputs)

    return lambda function, *inputs: keys.checkpoint(functools.partial(compute, function), *inputs)


@pytest.mark.parametrize("family", ["packed roberta", "roberta"])
def test_other_masks_in_the_second_forward_would_be_seen(family):
    expected, _ = gradient(family)
    assert (gradient(family, other_masks)[0] - expected).abs().max() > 1e-3 * expected.abs().max()
    with pytest.raises(KeyError):  # a module's second call has no masks
        gradient(family, lambda keys: functools.partial(checkpoint, use_reentrant=False))


def test_a_step_of_two_ranks_has_the_same_gradient(parity_arguments):
    case = (8, 0, 70)
    steps = ("--optim.name", "sgd", "--optim.learning_rate", "1", "--optim.weight_decay", "0")

    def found(world_size, checkpointing):
        name = f"checkpointing-{world_size}-{checkpointing}"
        arguments = parity_arguments(name, 0.1, *steps, "--model.gradient_checkpointing", checkpointing)
        return [rank[case]["gradient"] for rank in call_on_ranks(world_size, gradients, arguments, [case])]

    [expected] = found(1, "false")
    assert all(np.abs(gradient - expected).max() < 1e-12 for gradient in found(2, "true"))

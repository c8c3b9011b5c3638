"""What --plan prints: exact where it counts, and close to what a forward and backward keep and compute."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSequenceClassification, BertConfig, GPT2Config, LlamaConfig

from trainer.batching.plan import Plan
from trainer.config.loading import parse_config
from trainer.config.schema import PeftConfig
from trainer.dropout.sites import install
from trainer.model.backbone import Backbone
from trainer.model.build import build_without_weights, set_precision
from trainer.model.peft_options import adapter_config, add_adapter
from trainer.packed.families import why_not_packed
from trainer.packed.forward import PackedForward, PaddedForward
from trainer.training.estimate import (
    count_activation_bytes,
    count_frozen_bytes,
    count_products,
    describe_flops,
    describe_parameters,
    describe_steps,
    padding_fraction,
    shorten,
)

CONFIG = parse_config(["--data.train", "x.csv", "--batch.size", "8", "--optim.epochs", "3", "--run.precision", "no"])
SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 6, "vocab_size": 50}
FAMILIES = {
    "bert": (BertConfig(**SIZES, intermediate_size=1024), ["query", "value"]),
    "llama": (LlamaConfig(**SIZES, intermediate_size=704, pad_token_id=0), "all-linear"),
}
LENGTHS = np.full(8, 64)


def built(family, without_weights=False):
    config, targets = FAMILIES[family]
    settings = PeftConfig(options={"r": 4, "target_modules": targets})
    if without_weights:
        return build_without_weights(Backbone("none", None, copy.deepcopy(config), None, ""), settings)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(config))
    return add_adapter(model, adapter_config(settings, "none"), set())


def plan(lengths=LENGTHS, **settings):
    return Plan(np.asarray(lengths), np.ones(len(lengths)), 8, 0, 10_000, **settings)


def computed(model, dtype):
    """Bytes that a micro-batch of LENGTHS keeps for its backward, and its FLOPs with it."""
    keys = install(model, 0)
    set_precision(model, dtype)
    forward = PackedForward(model.train()) if why_not_packed(model) is None else PaddedForward(model.train(), 0)
    ids = torch.randint(5, 40, (8, 64))
    inputs = {"input_ids": ids.flatten()} if forward.packed else {"input_ids": ids, "attention_mask": ids > 0}
    weights = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its place
        return tensor

    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with FlopCounterMode(display=False) as counter, keys.micro_batch(0, np.arange(8), LENGTHS):
        with saved, autocast:
            logits = forward(inputs, LENGTHS)
        logits.float().sum().backward()
    return sum(storage.nbytes() for storage in kept.values()), counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_flops_are_close_to_those_of_a_micro_batch(family, dtype):
    num_bytes, flops = computed(built(family), dtype)
    twin = built(family, without_weights=True)
    packed = why_not_packed(twin) is None
    set_precision(twin, dtype)
    precision = {torch.float32: "no", torch.bfloat16: "bf16"}[dtype]
    config = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, precision=precision))
    found = count_activation_bytes(config, twin, plan(packed=packed), LENGTHS)
    assert num_bytes / 1.5 < found < num_bytes * 1.5
    if packed:  # torch does not count what our products compute
        return
    a_step = describe_flops(CONFIG, twin, plan(), [[(512, 8)]])[0].split("in all, ")[1].split(" a step")[0]
    assert a_step.endswith(" G") and flops / 1e9 / 1.25 < float(a_step[:-2]) < flops / 1e9 * 1.25


def test_checkpointing_keeps_less_and_computes_more():
    twin = built("bert", without_weights=True)
    model = dataclasses.replace(CONFIG.model, gradient_checkpointing=True)
    again = dataclasses.replace(CONFIG, model=model)
    whole, less = (count_activation_bytes(config, twin, plan(packed=True), LENGTHS) for config in (CONFIG, again))
    assert less < whole / 3
    assert "a token takes 6 for each of" in describe_flops(again, twin, plan(), [[(512, 8)]])[1]


def test_windows_keep_no_more_shares_than_examples_of_their_length():
    twin = built("bert", without_weights=True)
    windows = count_activation_bytes(CONFIG, twin, plan(packed=True, window_length=64), np.array([512]))
    assert windows == count_activation_bytes(CONFIG, twin, plan(packed=True), LENGTHS)


def test_products_of_a_layer_by_hand():
    frozen, trained = count_products(built("bert", without_weights=True))
    assert frozen == 6 * (4 * 256**2 + 2 * 256 * 1024) + 256**2  # with the pooler
    assert trained == 6 * 2 * 4 * (256 + 256)


def test_quantized_weights_take_four_bits_and_a_scale():
    twin = built("llama", without_weights=True)
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, quantization="nf4"))
    saved = count_frozen_bytes(CONFIG, twin) - count_frozen_bytes(config, twin)
    assert saved == (4 - 0.5625) * count_products(twin)[0]


def test_without_an_adapter_matrices_train_and_embeddings_multiply_nothing():
    config = copy.deepcopy(FAMILIES["bert"][0])
    twin = build_without_weights(Backbone("none", None, config, None, ""), PeftConfig("NONE", options={}))
    frozen, trained = count_products(twin)
    with_adapter, _ = count_products(built("bert", without_weights=True))
    assert frozen == 0 and 1 < trained / with_adapter < 1.01  # biases and norms
    adapter = count_activation_bytes(CONFIG, built("bert", without_weights=True), plan(packed=True), LENGTHS)
    assert 1.2 < count_activation_bytes(CONFIG, twin, plan(packed=True), LENGTHS) / adapter < 2


def test_steps_tokens_and_padding_by_hand():
    lengths = [10, 2, 2, 2, 2, 2, 2, 2, 6]
    assert padding_fraction(plan(lengths, packed=True), 2) == 0
    padded = plan([10, *[2] * 7])
    assert padding_fraction(padded, 1) == 1 - 24 / 80
    # 10 and 2 tokens on one rank, six times 2 on the other
    assert padding_fraction(padded, 2) == 1 - 24 / (20 + 12)
    steps, tokens, padding = describe_steps(CONFIG, plan(lengths), 1, "no reason")
    assert steps.split("       ")[1] == "6 of 8 examples: 3 epochs of 2 steps"
    assert "30 an epoch; 3.3 an example, 10 in the longest" in tokens
    assert padding.endswith("%: no reason")
    assert "0.0%: examples are packed" in describe_steps(CONFIG, plan(lengths), 1, None)[2]


def test_the_table_of_a_large_model_is_short():
    config = GPT2Config(n_layer=24, n_embd=16, n_head=2)
    settings = PeftConfig(options={"r": 2, "target_modules": ["c_attn"]})
    twin = build_without_weights(Backbone("none", None, config, None, ""), settings)
    lines = describe_parameters(twin, settings)
    assert len(lines) < 15
    numbers = [[int(part.replace(",", "")) for part in line.split()[:2]] for line in lines[1:-1]]
    assert [sum(column) for column in zip(*numbers[:-1], strict=True)] == numbers[-1]
    assert numbers[-1] == list(twin.get_nb_trainable_parameters())


def test_numbers_are_shortened():
    assert [shorten(n) for n in (7, 1234, 999_499, 12_345_678, 5e15)] == ["7 ", "1.23 k", "999 k", "12.3 M", "5 P"]

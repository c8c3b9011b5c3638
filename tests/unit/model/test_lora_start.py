"""Starts of LoRA that change the backbone: what is saved is plain LoRA on the unchanged backbone."""

import pytest
import safetensors.torch
import torch
from peft import LoraConfig

from tests.families import tiny_classifier
from tests.unit.model.test_build import logits, train
from trainer.config.schema import PeftConfig
from trainer.errors import UserError
from trainer.model.adapter import adapter_config_json, adapter_tensors, load_trained_model
from trainer.model.build import build_model, check_fit
from trainer.model.lora_start import as_plain_lora, start_from_data
from trainer.model.peft_options import add_adapter, check_effects

BASE = {"r": 4, "target_modules": ["query", "value"]}
STARTS = {
    "pissa": {"init_lora_weights": "pissa"},
    "fast pissa": {"init_lora_weights": "pissa_niter_4"},
    "olora": {"init_lora_weights": "olora", "lora_alpha": 6},
    "rslora": {"init_lora_weights": "pissa", "use_rslora": True},
    "dora": {"init_lora_weights": "olora", "use_dora": True},
    "patterns": {
        "init_lora_weights": "pissa", "rank_pattern": {"layer.0.*query": 2}, "alpha_pattern": {"layer.1.*value": 3},
        "bias": "lora_only",
    },
}  # fmt: skip


def build(backbone, **options):
    settings = PeftConfig(options=BASE | options)
    check_fit(backbone, settings, 32, pairs=False)
    return build_model(backbone, settings, 42)[0]


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "adapter_config.json").write_text(adapter_config_json(config))
    (folder / "adapter_model.safetensors").write_bytes(safetensors.torch.save(tensors, {"format": "pt"}))
    return folder


@pytest.mark.parametrize("name", STARTS)
def test_what_is_saved_is_plain_lora_on_the_unchanged_backbone(backbone, batch, tmp_path, name):
    model = build(backbone, **STARTS[name])
    start = adapter_tensors(model)
    train(model, batch)
    config, tensors = as_plain_lora(model.peft_config["default"], adapter_tensors(model), start)
    assert (config.r, config.init_lora_weights) == (8, True)
    fresh = load_trained_model(backbone, write(tmp_path / "plain", config, tensors))
    assert (logits(fresh, batch) - logits(model, batch)).abs().max() < 1e-5


def test_without_the_conversion_it_would_not_fit(backbone, batch, tmp_path):
    model = build(backbone, init_lora_weights="olora")
    train(model, batch)
    config = model.peft_config["default"]
    config.init_lora_weights = True
    fresh = load_trained_model(backbone, write(tmp_path / "raw", config, adapter_tensors(model)))
    assert (logits(fresh, batch) - logits(model, batch)).abs().max() > 1e-3


def test_the_start_computes_what_the_backbone_computes_and_trains_no_more(backbone, batch):
    plain, moved = build(backbone).eval(), build(backbone, init_lora_weights="pissa").eval()
    assert plain.get_nb_trainable_parameters() == moved.get_nb_trainable_parameters()
    head = {name: tensor for name, tensor in plain.state_dict().items() if "classifier" in name}
    moved.load_state_dict(head, strict=False)
    assert (logits(plain, batch) - logits(moved, batch)).abs().max() < 1e-6
    weights = [dict(each.named_parameters()) for each in (plain, moved)]
    name = next(name for name in weights[0] if name.endswith("query.base_layer.weight"))
    assert (weights[0][name] - weights[1][name]).abs().max() > 1e-3


def test_eva_gives_ranks_by_the_data_and_keeps_the_backbone(backbone, batch):
    plain = build(backbone, target_modules="all-linear").eval()
    model = build(backbone, target_modules="all-linear", init_lora_weights="eva")
    start_from_data(model, [batch])
    ranks = {module.r["default"] for module in model.modules() if hasattr(module, "lora_A")}
    assert len(ranks) > 1
    head = {name: tensor for name, tensor in plain.state_dict().items() if "classifier" in name}
    model.load_state_dict(head, strict=False)
    assert torch.equal(logits(plain, batch), logits(model.eval(), batch)), "B is 0"
    again = build(backbone, target_modules="all-linear", init_lora_weights="eva")
    start_from_data(again, [batch])
    one, other = adapter_tensors(model), adapter_tensors(again)
    assert all(torch.equal(one[name], other[name]) for name in one if ".lora_" in name)


def test_eva_that_does_not_settle_is_refused(backbone, batch):
    model = build(backbone, init_lora_weights="eva", eva_config={"tau": 0.9})
    few = {name: tensor[:1, :2] for name, tensor in batch.items()}  # fewer tokens than directions
    with pytest.raises(UserError, match=r"eva does not settle in 9 batches; try a lower peft\.r"):
        start_from_data(model, [few], max_batches=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "loftq"}, r"peft\.init_lora_weights: 'loftq' is not supported: it quantizes"),
        ({"init_lora_weights": "corda"}, r"peft\.init_lora_weights: 'corda' is not supported: .*; use true, pissa"),
        ({"init_lora_weights": "pissa_niter_x"}, r"peft\.init_lora_weights: 'pissa_niter_x' does not fit"),
        ({"init_lora_weights": "pissa", "layer_replication": [[0, 2], [1, 2]]}, r"peft\.layer_replication: .* pissa"),
    ],
)
def test_starts_that_are_refused(backbone, options, message):
    with pytest.raises(UserError, match=message):
        build(backbone, **options)


def test_olora_does_not_fit_conv1d():
    """PEFT takes its weight, [inputs, outputs], for [outputs, inputs]."""
    model = tiny_classifier("gpt2")
    config = LoraConfig(task_type="SEQ_CLS", target_modules=["c_attn"], init_lora_weights="olora")
    with pytest.raises(UserError, match=r"peft\.init_lora_weights: olora .* Conv1D .*; use pissa"):
        check_effects(add_adapter(model, config, set()), PeftConfig(options={"init_lora_weights": "olora"}))


def test_the_reason_against_loftq_is_true(backbone):
    """A weight minus its rounded values has full rank, so LoRA of a small rank does not equal it."""
    weight = next(p for n, p in build(backbone).named_parameters() if n.endswith("query.base_layer.weight"))
    step = weight.abs().max() / 7  # 4 bits
    assert torch.linalg.matrix_rank(weight - (weight / step).round() * step) == len(weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa", "target_modules": ["query", "word_embeddings"]}, r"pissa .*word_embeddings"),
        ({"init_lora_weights": "pissa", "r": 33}, r"^peft\.r: pissa needs 33 directions of .*, which has 32"),
        ({"init_lora_weights": "olora", "rank_pattern": {"query": 33}}, r"^peft\.r: olora needs 33 .*query"),
        ({"init_lora_weights": "eva", "r": 17}, r"^peft\.r: eva needs 34 directions"),
        ({"init_lora_weights": "eva", "r": 17, "eva_config": {"rho": 3.0}}, r"^peft\.r: eva needs 51 directions"),
    ],
    ids=str,
)
def test_a_start_that_a_layer_has_no_room_for_is_refused(backbone, options, message):
    with pytest.raises(UserError, match=message):
        build(backbone, **options)


def test_a_start_may_take_all_directions(backbone):
    build(backbone, init_lora_weights="pissa", r=32)
    build(backbone, init_lora_weights="eva", r=16)

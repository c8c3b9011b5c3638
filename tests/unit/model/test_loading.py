"""A backbone is loaded in the types that it keeps: the host never holds its weights twice."""

import sys

import pytest
import safetensors.torch
import torch

from benchmarks.large import loading, save_llama
from tests.harness.ranks import call_on_ranks
from trainer.config.schema import ModelConfig, PeftConfig
from trainer.model import build
from trainer.model.backbone import find_backbone
from trainer.model.build import build_model, set_precision

SHAPE = {"hidden_size": 512, "num_hidden_layers": 12, "vocab_size": 8000}
LORA = PeftConfig(options={"r": 2, "target_modules": ["q_proj", "v_proj"]})


def loading_all_in_fp32(folder, precision):
    """What it would take without care."""
    plain = build.load_weights
    build.load_weights = lambda backbone: (lambda model, *others: (model.float(), *others))(*plain(backbone))
    return loading(folder, precision)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(("stored", "precision"), [("bfloat16", "bf16"), ("float32", "bf16"), ("bfloat16", "no")])
def test_the_host_holds_the_weights_once(tmp_path, stored, precision):
    save_llama(tmp_path, stored, 2, **SHAPE)
    [found] = call_on_ranks(1, loading, tmp_path, precision)
    assert found["kept_mib"] > 80 and found["ratio"] < 1.3
    if stored == "bfloat16" and precision == "bf16":
        [control] = call_on_ranks(1, loading_all_in_fp32, tmp_path, precision)
        assert control["ratio"] > 1.8


def test_what_is_kept_is_the_number_in_the_file(tmp_path):
    save_llama(tmp_path, "bfloat16", 2, hidden_size=32, num_hidden_layers=2, vocab_size=60)
    files = tmp_path.glob("*.safetensors")
    stored = {f"model.{name}": tensor for file in files for name, tensor in safetensors.torch.load_file(file).items()}
    for compute_type in (torch.bfloat16, torch.float32):
        model, _ = build_model(find_backbone(ModelConfig(name=str(tmp_path)), ["one", "other"]), LORA, 0)
        set_precision(model, compute_type)
        kept = {name.replace(".base_layer", ""): tensor for name, tensor in model.get_base_model().named_parameters()}
        assert {name for name in kept if "lora" not in name and "score" not in name} == {*stored}
        for name, tensor in stored.items():
            assert torch.equal(kept[name].float(), tensor.float()), name
            assert kept[name].dtype == (torch.float32 if "norm" in name else compute_type), name

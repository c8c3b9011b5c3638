"""Frozen matrices in 4 bits: what is kept, what comes back from disk, and who is refused."""

import importlib.util

import numpy as np
import pytest
import safetensors.torch
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel, GPT2Config, GPT2Model

from benchmarks.large import save_llama
from tests.harness.commands import changed, command
from tests.harness.data import topic_rows, write_csv
from tests.harness.ranks import call_on_ranks
from tests.harness.runs import assert_same, outcome, read_csv
from tests.parity.ranks import gradients, sharded_run
from trainer.config.loading import parse_config
from trainer.config.schema import ModelConfig, PeftConfig
from trainer.errors import UserError
from trainer.model.backbone import find_backbone
from trainer.model.build import build_model, check_fit, set_precision
from trainer.model.quantization import check_quantization

LORA = PeftConfig(options={"r": 2, "target_modules": "all-linear"})
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is optional: pip install bitsandbytes"
)


def find(folder):
    return find_backbone(ModelConfig(name=str(folder), quantization="nf4"), ["one", "other"])


def check(folder, peft_type="LORA", **options):
    settings = PeftConfig(peft_type, options={"target_modules": "all-linear", **options})
    check_quantization(check_fit(find(folder), settings, 64, pairs=False), settings)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_llama(folder, "bfloat16", 2, hidden_size=256, num_hidden_layers=2, vocab_size=60)
    return folder


# --- refusals ---


@pytest.mark.parametrize(
    ("peft_type", "options", "message"),
    [
        ("LOHA", {}, "peft_type LORA"),
        ("LORA", {"use_dora": True}, "use_dora"),
        ("LORA", {"init_lora_weights": "pissa"}, "starts"),
        ("LORA", {"bias": "all"}, r"peft\.bias"),
    ],
)
def test_adapters_that_need_the_numbers_are_refused(llama, peft_type, options, message):
    with pytest.raises(UserError, match=rf"^model\.quantization: nf4 .*{message}"):
        check(llama, peft_type, **options)


def test_a_family_without_linear_layers_is_refused(tmp_path, tiny_tokenizer):
    GPT2Model(GPT2Config(vocab_size=60, n_embd=16, n_layer=1, n_head=2, n_positions=64)).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"^model\.quantization: nf4 .*gpt2.*Conv1D"):
        check(tmp_path)


def test_without_bitsandbytes_it_is_refused(llama, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^model\.quantization: nf4 needs bitsandbytes.*pip install bitsandbytes$"):
        check(llama)


# --- with bitsandbytes ---


@needs_bitsandbytes
@pytest.mark.parametrize("compute_type", [torch.float32, torch.bfloat16])
def test_head_adapter_and_norms_are_in_fp32(llama, tmp_path, tiny_tokenizer, compute_type):
    BertModel(
        BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    ).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    for folder, whole in (
        (llama, ("lora", "score", "norm")),
        (tmp_path, ("lora", "classifier", "pooler", "LayerNorm")),
    ):
        model, _ = build_model(find(folder), LORA, 0)
        set_precision(model, compute_type)
        kinds = {name: parameter.dtype for name, parameter in model.named_parameters()}
        trained = {kinds[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {torch.float32}
        linear = {kinds[name] for name in kinds if name.endswith("base_layer.weight") and "pool" not in name}
        assert linear == {torch.uint8}
        assert all(kinds[name].is_floating_point for name in kinds if any(part in name for part in whole))


@pytest.fixture
def arguments(llama, options, tmp_path):
    """A small run with nf4, on a Llama."""
    new = {"model__name": llama, "model__quantization": "nf4", "peft__target_modules": "all-linear"}
    new |= {"model__dropout": None, "evaluation__every_steps": 6, "optim__learning_rate": "2e-3"}
    return changed(options, **new, run__output_dir=tmp_path)


@needs_bitsandbytes
def test_a_run_resumes_predicts_exports_and_loads_elsewhere(arguments, tmp_path):
    small = [("no_figures",)]
    assert command("run", changed(arguments, run__name="whole"), small).code == 0
    assert command("run", arguments, [*small, ("at_call", "train_step", 8)]).code == -9
    ended = command("run", arguments, small)
    assert ended.code == 0 and "continuing after step 6" in ended.stderr, ended.stderr
    assert_same(tmp_path / "run", outcome(tmp_path / "whole"))

    config = parse_config(["--recipe", str(tmp_path / "run" / "config.yaml")])
    assert config.model.quantization == "nf4"
    texts = write_csv(tmp_path / "texts.csv", topic_rows(20, seed=5))
    predicted = command("predict", ["--run", tmp_path / "run", "--input", texts, "--output", tmp_path / "p.csv"])
    assert predicted.code == 0, predicted.stderr
    rows = read_csv(tmp_path / "p.csv")
    found = np.array([row[-4:] for row in rows[1:]], dtype=float)

    exported = command("export", ["--run", tmp_path / "run", "--output", tmp_path / "merged"])
    assert exported.code == 0, exported.stderr
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert {parameter.dtype for parameter in merged.parameters()} == {torch.float32}
    adapter = tmp_path / "run" / "adapter"
    lines = (adapter / "README.md").read_text().split("```python\n")[1].split("classify =")[0]
    names = {}
    exec(lines.replace('adapter = "adapter"', f"adapter = {str(adapter)!r}"), names)
    assert isinstance(names["model"], PeftModel)
    inputs = names["tokenizer"]([text for text, _ in topic_rows(20, seed=5)], return_tensors="pt", padding=True)
    with torch.no_grad():
        for model in (merged, names["model"]):
            assert np.abs(model(**inputs).logits.softmax(-1).numpy() - found).max() < 1e-3
    plain = safetensors.torch.load_file(tmp_path / "merged" / "model.safetensors")
    assert all(tensor.is_floating_point() for tensor in plain.values())


@needs_bitsandbytes
def test_any_split_has_one_gradient_and_shards_are_refused(arguments):
    steps = {"optim__name": "sgd", "optim__weight_decay": 0, "optim__max_grad_norm": "null", "run__precision": None}
    arguments = changed(arguments, **steps | {"optim__learning_rate": 1, "run__quiet": "true"})
    cases = [(8, 0, budget) for budget in (10**6, 100, 40)]
    [whole] = call_on_ranks(1, gradients, arguments, cases, None, "no")
    exact = whole[cases[0]]["gradient"]
    others = call_on_ranks(2, gradients, changed(arguments, model__packed="false"), cases, None, "no")
    for rank in (whole, *others):
        for result in rank.values():
            assert np.abs(result["gradient"] - exact).max() < 1e-5 * np.abs(exact).max()
    plain = changed(arguments, model__quantization=None)
    [unlike] = call_on_ranks(1, gradients, plain, cases[:1], None, "no")
    assert np.abs(unlike[cases[0]]["gradient"] - exact).max() > 1e-3 * np.abs(exact).max()
    with pytest.raises(Exception, match=r"model\.quantization.*topology"):
        call_on_ranks(2, sharded_run, arguments)

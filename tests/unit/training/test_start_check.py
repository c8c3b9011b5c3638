"""Before step 1: what trains is the model, and the logits of an example do not depend on its batch."""

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from tests import families
from tests.families import FAMILIES, NOT_TINY, TEXTS, difference_between_batches, listed, tiny, tokenizer, verdict_of
from trainer.dropout import sites as dropout
from trainer.dropout.sites import install
from trainer.errors import UserError
from trainer.model.backbone import FP32_ONLY_FAMILIES
from trainer.model.build import set_precision
from trainer.packed.families import why_not_packed
from trainer.packed.forward import Padding
from trainer.training.start_check import check_start
from trainer.training.step import sum_gradients

LISTED = listed()


def check(model, texts=TEXTS, max_length=64):
    return check_start(model, 0, texts, tokenizer(), max_length, "the backbone")[1]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NOT_TINY])
def test_a_family_works_for_any_batch_or_is_refused(family):
    verdict, model, padding = verdict_of(family)
    if f"# transformers {transformers.__version__};" in families.LIST.read_text():
        assert verdict == LISTED[family]
    assert verdict.startswith(("works", "refused")) or family not in LISTED or LISTED[family].startswith("not built")
    if padding is not None:
        assert difference_between_batches(model, padding) <= 1e-5
        assert trains_in_bf16(model) == (family not in FP32_ONLY_FAMILIES)


def trains_in_bf16(model):
    set_precision(model, torch.bfloat16)
    ids = torch.tensor([tokenizer()(TEXTS.texts[3])["input_ids"]])
    with torch.autocast("cpu", torch.bfloat16):
        try:
            logits = model.train()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        except RuntimeError:  # of types
            return False
    logits.float().sum().backward()
    return bool(logits.isfinite().all())


@pytest.mark.parametrize("family", ["mt5", "roberta", "deberta-v2"])
def test_it_computes_in_fp32_whatever_type_matrices_have(family):
    model = tiny(family)
    set_precision(model, torch.bfloat16)
    assert check(model) == check(tiny(family))


def test_every_family_of_transformers_is_listed():
    if f"# transformers {transformers.__version__};" in families.LIST.read_text():
        assert list(LISTED) == FAMILIES


def test_without_the_padding_that_was_found_logits_depend_on_the_batch():
    for family in ("xlnet", "fnet"):
        _, model, padding = verdict_of(family)
        assert padding != Padding()
        assert difference_between_batches(model, Padding()) > 1e-3


class Noisy(nn.Module):
    """Computes in training what evaluation does not."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * (1.5 if self.training else 1)


class Mixing(nn.Module):
    """Gives every example the mean of its batch."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x).mean(dim=0, keepdim=True).expand(len(x), -1, -1)


class Raising(nn.Module):
    """Cannot compute."""

    def forward(self, x):
        raise RuntimeError("an error\nof two lines")


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (Noisy, "its logits in training differ from those in evaluation"),
        (Mixing, "the logits of an example depend on the other examples"),
        (lambda inner: Raising(), "cannot compute an example: an error of two lines"),
    ],
)
def test_another_function_is_refused(wrap, message):
    model = tiny("distilbert")
    layer = model.get_base_model().distilbert.transformer.layer[0].ffn
    layer.lin2 = wrap(layer.lin2)
    with pytest.raises(UserError, match=message):
        check(model)


def test_a_check_changes_neither_the_model_nor_the_random_state():
    model = tiny("roberta")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    check(model.train())
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("texts", [["w1"], ["w1 w2", "w3"], ["w1 w2 w3"] * 40])
def test_few_or_short_texts_are_enough(texts):
    assert check(tiny("roberta"), SimpleNamespace(texts=texts, text_pairs=None)) == Padding()
    assert check(tiny("roberta"), SimpleNamespace(texts=texts, text_pairs=texts), 5) == Padding()


@pytest.mark.parametrize("family", ["roberta", "deberta"])
def test_a_model_that_passes_runs_four_times_and_once_for_its_dropout(family):
    model, calls = tiny(family), []
    model.get_input_embeddings().register_forward_hook(lambda *call: calls.append(call))
    assert check(model) == Padding()
    assert len(calls) == 5 - (family == "deberta")  # deberta is never packed


@pytest.mark.parametrize("family", ["bart", "opt"])
def test_layers_that_are_skipped_at_random_are_dropout_too(family):
    layerdrop = {"bart": {"encoder_layerdrop": 0.9, "decoder_layerdrop": 0.9}, "opt": {"layerdrop": 0.9}}
    keys, padding = check_start(tiny(family, **layerdrop[family]), 0, TEXTS, tokenizer(), 64, "the backbone")
    assert padding == Padding() and keys.skips_layers
    assert not install(tiny(family), 0).skips_layers


@pytest.mark.parametrize("skips_layers", [True, False])
def test_a_step_may_skip_layers_only_where_the_model_does(skips_layers):
    parameter = nn.Parameter(torch.ones(2))
    alone, keys = SimpleNamespace(num_processes=1), SimpleNamespace(skips_layers=skips_layers)
    sum_gradients(SimpleNamespace(parameters={"a layer": parameter}, dropout=keys, accelerator=alone, model=None))
    assert (parameter.grad is not None) == skips_layers


def test_a_routers_noise_is_dropout_too():
    model = tiny("mixtral", router_jitter_noise=0.1)
    keys, padding = check_start(model, 0, TEXTS, tokenizer(), 64, "the backbone")
    assert padding == Padding() and "uniform_" in keys.unreached


@pytest.mark.parametrize(("limit", "max_length"), [(600, 64), (600, 601), (600, 600)])
def test_positions_that_depend_on_the_longest_example_beyond_the_check(limit, max_length):
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": limit}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    model = tiny("phi3", rope_parameters=rope, original_max_position_embeddings=limit, max_position_embeddings=1200)
    assert check(model, max_length=max_length) == Padding(one_length=max_length > limit)


@pytest.mark.parametrize("family", ["t5", "mt5", "umt5"])
def test_dropout_that_drops_nothing_keeps_the_position_bias(family):
    model = tiny(family, dropout_rate=1e-9).get_base_model()
    for name, parameter in model.named_parameters():
        if "relative_attention_bias" in name:
            nn.init.normal_(parameter, std=3)
    keys = install(model, 0)
    batch = dict(tokenizer()(TEXTS.texts[:2], padding=True, return_tensors="pt"))
    batch.pop("token_type_ids", None)
    lengths = batch["attention_mask"].sum(1).numpy()
    with torch.no_grad():
        expected = model.eval()(**batch).logits
        model.train()
        with keys.micro_batch(0, lengths, lengths):
            found = model(**batch).logits
    assert (found - expected).abs().max() <= 1e-5
    assert model.config._attn_implementation == dropout.ATTENTION


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_attention_with_features_that_sdpa_lacks_stays_the_models_own(family):
    model = tiny(family).get_base_model()
    install(model, 0)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("extra", [{"softcap": 3.0}, {"is_causal": True}])
def test_a_keyword_that_changes_attention_is_passed_on(extra, monkeypatch):
    seen = {}

    def own(*given, **settings):
        seen.update(settings)
        return given[1], None

    monkeypatch.setattr(dropout, "sdpa_attention_forward", own)
    x = torch.randn(1, 2, 4, 8)
    with dropout.dropping_nothing():
        dropout.keyed_attention(nn.Module(), x, x, x, None, dropout=0.1, **extra)
    assert extra.items() <= seen.items()


def test_a_mask_of_numbers_is_added():
    module = nn.Module()
    x = torch.randn(2, 2, 5, 8)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.arange(5) > 2, torch.finfo(torch.float32).min)
    with dropout.dropping_nothing():
        found, _ = dropout.keyed_attention(module, x, x, x, mask, dropout=0.1)
    expected, _ = dropout.keyed_attention(module, x, x, x, mask)
    assert torch.allclose(found, expected, atol=1e-6)


def test_llama_may_name_no_types_of_its_layers():
    model = tiny("llama", layer_types=None)
    assert model.get_base_model().config.layer_types is None
    check_start(model, 0, TEXTS, tokenizer(), 64, "the backbone")
    assert why_not_packed(model) is None

"""Backbone, head and adapter: what trains, in which type, and that all of it comes back from disk."""

import json
import shutil

import pytest
import safetensors.torch
import torch
from peft import AutoPeftModelForSequenceClassification
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2Model,
    GPT2Config,
    ModernBertConfig,
    RobertaConfig,
)

from tests.unit.model.conftest import NAMES
from trainer.config.loading import RECIPES, parse_config
from trainer.config.schema import ModelConfig, PeftConfig
from trainer.errors import UserError
from trainer.model.adapter import adapter_config_json, adapter_tensors, load_adapter_tensors, load_trained_model
from trainer.model.backbone import Backbone, find_backbone
from trainer.model.build import build_model, check_fit, set_precision
from trainer.model.peft_options import PEFT_TYPES, adapter_config, add_adapter, parameter_table

ATTENTION = ["query", "value"]
LORA = PeftConfig(options={"r": 4, "target_modules": ATTENTION, "lora_dropout": 0.1})
METHODS = {
    "LORA": {"r": 4, "target_modules": ATTENTION},
    "LORA dora": {"r": 4, "target_modules": ATTENTION, "use_dora": True},
    "LORA rslora": {"r": 4, "target_modules": ATTENTION, "use_rslora": True, "lora_alpha": 16},
    "LORA embeddings": {"r": 4, "target_modules": ["word_embeddings", "query"]},
    "LORA bias": {"r": 4, "target_modules": ATTENTION, "bias": "lora_only"},
    "LORA all bias": {"r": 4, "target_modules": ATTENTION, "bias": "all"},
    "C3A": {"block_size": 16, "target_modules": ATTENTION},
    "FOURIERFT": {"n_frequency": 20, "target_modules": ATTENTION},
    "HRA": {"r": 4, "target_modules": ATTENTION},
    "IA3": {"target_modules": ["key", "value", "intermediate.dense"], "feedforward_modules": ["intermediate.dense"]},
    "LN_TUNING": {"target_modules": ["LayerNorm"]},
    "LOHA": {"r": 4, "target_modules": ATTENTION},
    "LOKR": {"r": 4, "target_modules": ATTENTION},
    "MISS": {"r": 4, "target_modules": ATTENTION},
    "OFT": {"oft_block_size": 4, "target_modules": ATTENTION},
    "VERA": {"r": 8, "target_modules": ATTENTION},
    "ADALORA": {"init_r": 4, "target_r": 2, "target_modules": ATTENTION},
    "BEFT": {"target_modules": ATTENTION},
    "BOFT": {"boft_block_size": 4, "target_modules": ATTENTION},
    "DEFT": {"r": 4, "target_modules": ATTENTION},
    "DELORA": {"r": 4, "target_modules": ATTENTION},
    "GLORA": {"r": 4, "target_modules": ATTENTION},
    "GRALORA": {"r": 4, "target_modules": ATTENTION},
    "HIRA": {"r": 4, "target_modules": ATTENTION},
    "OSF": {"target_modules": ATTENTION},
    "PEANUT": {"r": 4, "target_modules": ATTENTION},
    "RANDLORA": {"r": 8, "target_modules": ATTENTION},
    "ROAD": {"group_size": 8, "target_modules": ATTENTION},
    "SHIRA": {"r": 2, "target_modules": ATTENTION},
    "SUPERTUNING": {"target_modules": ATTENTION},
    "TINYLORA": {"target_modules": ATTENTION},
    "UNILORA": {"r": 4, "target_modules": ATTENTION},
    "VBLORA": {"r": 4, "vector_length": 16, "num_vectors": 8, "target_modules": ATTENTION},
    "WAVEFT": {"n_frequency": 20, "target_modules": ATTENTION},
}
SHAPE = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip


def train(model, batch, steps=2):
    """Two steps large enough that every parameter moves away from where it began."""
    labels = torch.arange(6) % 4
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(**batch).logits, labels).backward()
        optimizer.step()
    return model.eval()


def save(model, folder):
    """As run.py writes adapter/."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = safetensors.torch.save(adapter_tensors(model), {"format": "pt"})
    (folder / "adapter_model.safetensors").write_bytes(tensors)
    (folder / "adapter_config.json").write_text(adapter_config_json(model.peft_config["default"]))
    return folder


@torch.no_grad()
def logits(model, batch):
    return model(**batch).logits


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def saved_backbone(kind, config, folder, tokenizer):
    """Folder of a backbone without a head; its tokenizer beside it."""
    torch.manual_seed(0)
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return find_backbone(ModelConfig(name=str(folder)), NAMES)


# --- counts ---


@pytest.fixture
def published(tiny_tokenizer):
    """roberta-base without its weights."""
    config = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, num_labels=4)
    return Backbone("roberta-base", None, config, tiny_tokenizer, "")


@pytest.mark.parametrize(
    ("recipe", "of_adapter", "of_all"),
    [("agnews-roberta-lora", 294_912, 125_537_288), ("agnews-roberta-lora-all-linear", 331_776, 125_574_152)],
)
def test_a_published_run_trains_as_many_parameters_as_its_recipe_says(published, recipe, of_adapter, of_all):
    settings, of_head = parse_config(["--recipe", recipe]).peft, 593_668
    assert f"{of_adapter + of_head:,} trainable parameters" in (RECIPES / f"{recipe}.yaml").read_text()
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(published.config)
        model = add_adapter(model, adapter_config(settings, "roberta-base"), set())
    assert model.get_nb_trainable_parameters() == (of_adapter + of_head, of_all)
    assert sum(p.numel() for name, p in trained(model).items() if ".lora_" in name) == of_adapter
    rows = parameter_table(model)
    assert sum(row["trainable"] for row in rows) == of_adapter + of_head
    assert sum(row["total"] for row in rows) == of_all
    assert sum(row["trainable"] for row in rows if row["module"].startswith("classifier")) == of_head


def test_positions_behind_the_padding_id_are_counted(published):
    with pytest.raises(UserError, match=r"data\.max_length: 513 is above the 512 positions"):
        check_fit(published, PeftConfig(options={"target_modules": ATTENTION}), 513, pairs=False)


@pytest.mark.parametrize(("pairs", "num_special"), [(False, 2), (True, 4)])
def test_a_length_that_leaves_no_room_for_text_is_refused(backbone, pairs, num_special):
    check_fit(backbone, LORA, num_special + 1, pairs=pairs)
    with pytest.raises(UserError, match=f"{num_special} leaves no room for text beside {num_special} special tokens"):
        check_fit(backbone, LORA, num_special, pairs=pairs)


# --- types ---


@pytest.mark.parametrize("compute_type", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_types_of_trained_and_frozen_weights(tiny_backbone, tmp_path, compute_type, stored):
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    stored_tensors = {name: tensor.to(stored) for name, tensor in tensors.items()}
    safetensors.torch.save_file(stored_tensors, folder / "model.safetensors", {"format": "pt"})
    model = build_model(find_backbone(ModelConfig(name=str(folder)), NAMES), LORA, 42)[0]
    set_precision(model, compute_type)
    kinds = {}
    for name, parameter in model.named_parameters():
        kind = "trained" if parameter.requires_grad else "matrix" if ".base_layer." in name or "dense" in name else ""
        kind = kind or ("key" if ".key." in name else "norm" if "LayerNorm" in name else "other")
        kinds.setdefault(kind, set()).add(parameter.dtype)
    assert kinds["trained"] == {torch.float32}
    assert kinds["matrix"] == kinds["key"] == {compute_type}
    assert kinds["norm"] == {torch.float32}
    embeddings = {name.split(".")[-2]: p.dtype for name, p in model.named_parameters() if "embeddings" in name}
    words = embeddings.pop("word_embeddings")
    assert set(embeddings.values()) == {torch.float32}
    assert words == (torch.float32 if compute_type == torch.float32 else stored)
    ids = torch.arange(5)
    assert torch.equal(
        model.get_input_embeddings()(ids), stored_tensors["roberta.embeddings.word_embeddings.weight"][ids].float()
    )


def test_the_seed_alone_draws_head_and_adapter(backbone):
    torch.manual_seed(1)
    one = adapter_tensors(build_model(backbone, LORA, 42)[0])
    torch.manual_seed(2)
    same = adapter_tensors(build_model(backbone, LORA, 42)[0])
    other = adapter_tensors(build_model(backbone, LORA, 43)[0])
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(
        one["base_model.model.classifier.dense.weight"], other["base_model.model.classifier.dense.weight"]
    )
    assert any(not torch.equal(one[name], other[name]) for name in one if "lora_A" in name)


# --- every method comes back ---


def test_every_supported_method_is_tested():
    assert {name.split(" ")[0] for name in METHODS} == set(PEFT_TYPES)


@pytest.fixture(scope="module", params=METHODS)
def method(request, backbone, batch, tmp_path_factory):
    """A method's settings, a model trained with it, and the folder of its adapter."""
    settings = PeftConfig(peft_type=request.param.split(" ")[0], options=METHODS[request.param])
    model = build_model(backbone, settings, 42)[0]
    untrained = adapter_tensors(model)
    train(model, batch)
    folder = save(model, tmp_path_factory.mktemp("method") / "adapter")
    return settings, model, folder, untrained


def test_a_saved_adapter_gives_the_same_logits(method, backbone, batch):
    _, model, folder, _ = method
    torch.manual_seed(999)  # no part of it may be drawn again
    fresh = load_trained_model(backbone, folder)
    assert (logits(fresh, batch) - logits(model, batch)).abs().max() <= 1e-6
    alone = torch.cat([logits(model, {name: tensor[i : i + 1] for name, tensor in batch.items()}) for i in range(6)])
    assert (alone - logits(model, batch)).abs().max() <= 1e-6, "examples change one another"
    plain = AutoPeftModelForSequenceClassification.from_pretrained(str(folder), num_labels=len(NAMES)).eval()
    assert (logits(plain, batch) - logits(model, batch)).abs().max() <= 1e-6


def test_in_bf16_too(method, backbone, batch, tmp_path):
    settings, model, _, _ = method
    narrow = build_model(backbone, settings, 42)[0].eval()
    set_precision(narrow, torch.bfloat16)
    load_adapter_tensors(narrow, adapter_tensors(model), "test")
    fresh = load_trained_model(backbone, save(narrow, tmp_path / "adapter"), torch.bfloat16)
    assert not trained(fresh)
    types = [{name: p.dtype for name, p in each.named_parameters()} for each in (fresh, narrow)]
    assert types[0] == types[1], "DoRA's norms would be others"
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(fresh, batch), logits(narrow, batch))


def test_nothing_is_saved_twice_or_frozen(method):
    """With `bias: all` PEFT takes the head's frozen original for a part of the adapter."""
    _, model, _, _ = method
    assert not [name for name in adapter_tensors(model) if "original_module" in name or "modules_to_save" in name]


def test_training_changed_the_logits_by_more_than_the_head(method, backbone, batch):
    """Else the test before would pass with an adapter that is never loaded."""
    settings, model, _, untrained = method
    trained_tensors = adapter_tensors(model)
    headless = {n: untrained[n] if "classifier" not in n else tensor for n, tensor in trained_tensors.items()}
    fresh = build_model(backbone, settings, 42)[0].eval()
    load_adapter_tensors(fresh, headless, "test")
    assert (logits(fresh, batch) - logits(model, batch)).abs().max() > 1e-5


def test_a_checkpoint_holds_all_that_trains(method, backbone, batch):
    settings, model, _, _ = method
    fresh = build_model(backbone, settings, 42)[0]
    with torch.no_grad():
        for parameter in trained(fresh).values():
            parameter.normal_()
    load_adapter_tensors(fresh, adapter_tensors(model), "checkpoint")
    lost = [name for name, parameter in trained(fresh).items() if not torch.equal(parameter, trained(model)[name])]
    assert lost == []
    assert torch.equal(logits(fresh.eval(), batch), logits(model, batch))


def damaged(tensors):
    name = next(name for name in tensors if tensors[name].ndim == 2)
    yield "lacks tensor", {key: tensor for key, tensor in tensors.items() if key != name}
    yield "has an unexpected tensor", {**tensors, "base_model.model.extra.weight": torch.zeros(2)}
    yield "has shape|size mismatch", {**tensors, name: torch.zeros(tensors[name].shape[0] + 1, 3)}


@pytest.mark.parametrize("fault", [0, 1, 2])
def test_strict_loading(backbone, batch, tmp_path, fault):
    model = train(build_model(backbone, LORA, 42)[0], batch)
    message, tensors = list(damaged(adapter_tensors(model)))[fault]
    fresh = build_model(backbone, LORA, 42)[0]
    before = adapter_tensors(fresh)
    with pytest.raises(UserError, match=message):
        load_adapter_tensors(fresh, tensors, "the checkpoint")
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapter_tensors(fresh).items())
    folder = save(model, tmp_path / "adapter")
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_trained_model(backbone, folder)


# --- layers that no weights file filled ---


@pytest.mark.parametrize("family", ["bert", "deberta-v2"])
def test_freshly_drawn_layers_train_and_are_saved(family, tmp_path, tiny_tokenizer, batch):
    size = SHAPE | {"vocab_size": len(tiny_tokenizer)}
    kind, config, new, targets = {
        "bert": (BertForMaskedLM, BertConfig(**size), "bert.pooler.dense", ATTENTION),
        "deberta-v2": (DebertaV2Model, DebertaV2Config(**size), "pooler.dense", ["query_proj", "value_proj"]),
    }[family]
    backbone = saved_backbone(kind, config, tmp_path / "backbone", tiny_tokenizer)
    settings = PeftConfig(options={"r": 2, "target_modules": targets})
    model = build_model(backbone, settings, 42)[0]
    assert any(f"{new}." in f"{name.replace('modules_to_save.default.', '')}" for name in trained(model)), list(
        trained(model)
    )
    before = {name: parameter.clone() for name, parameter in trained(model).items()}
    train(model, batch)
    assert [name for name, parameter in trained(model).items() if torch.equal(parameter, before[name])] == []
    torch.manual_seed(999)
    fresh = load_trained_model(backbone, save(model, tmp_path / "adapter"))
    assert (logits(fresh, batch) - logits(model, batch)).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", ["HRA", "LOHA", "OFT", "VERA"])
def test_adapters_that_give_fp32_train_in_bf16(kind, tmp_path, tiny_tokenizer, batch):
    """DeBERTa fills its scores in with the least number of the queries' type."""
    config = DebertaV2Config(**{**SHAPE, "vocab_size": len(tiny_tokenizer)})
    backbone = saved_backbone(DebertaV2Model, config, tmp_path / "backbone", tiny_tokenizer)
    settings = PeftConfig(kind, options={**METHODS[kind], "target_modules": ["query_proj", "value_proj"]})
    model = build_model(backbone, settings, 42)[0]
    set_precision(model, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        model(**batch).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


def test_a_head_of_another_number_of_classes_is_drawn_again(backbone, tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    config = RobertaConfig(**{**SHAPE, "vocab_size": len(tiny_tokenizer), "num_labels": 7})
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "backbone")
    tiny_tokenizer.save_pretrained(tmp_path / "backbone")
    model = build_model(find_backbone(ModelConfig(name=str(tmp_path / "backbone")), NAMES), LORA, 42)[0]
    assert trained(model)["base_model.model.classifier.modules_to_save.default.out_proj.weight"].shape == (4, 32)


# --- finding ---


def test_a_package_is_found_and_none_of_its_code_runs(tiny_backbone, tmp_path, monkeypatch):
    package = tmp_path / "isotrain_fake_package"
    shutil.copytree(tiny_backbone, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    found = find_backbone(ModelConfig(name="package:isotrain_fake_package/model"), NAMES)
    assert found.path == str(package / "model")
    assert found.config.num_labels == 4
    with pytest.raises(UserError, match="no folder 'package:isotrain_fake_package/other'"):
        find_backbone(ModelConfig(name="package:isotrain_fake_package/other"), NAMES)
    with pytest.raises(UserError, match="the Python package 'isotrain_absent' is not installed"):
        find_backbone(ModelConfig(name="package:isotrain_absent/model"), NAMES)


def test_one_dropout_for_the_whole_backbone(tiny_backbone):
    config = find_backbone(ModelConfig(name=str(tiny_backbone), dropout=0.25), NAMES).config
    rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout)
    assert rates == (0.25, 0.25, 0.25)


def spoil(folder, what):
    if what == "no weights":
        (folder / "model.safetensors").unlink()
    elif what == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif what == "code":
        settings = json.loads((folder / "config.json").read_text())
        settings |= {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"}
        (folder / "config.json").write_text(json.dumps(settings))
        (folder / "evil.py").write_text("raise RuntimeError('ran')")
    elif what == "no tokenizer":
        for path in folder.glob("*token*"):
            path.unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no weights", r"no \*\.safetensors weights; pickled ones are not read"),
        ("pickled", r"no \*\.safetensors weights; pickled ones are not read"),
        ("code", "needs code of its own"),
        ("no tokenizer", r"has no fast tokenizer \(tokenizer\.json\)$"),
    ],
)
def test_a_spoilt_backbone_is_refused_in_words(tiny_backbone, tmp_path, what, message):
    folder = tmp_path / "backbone"
    shutil.copytree(tiny_backbone, folder)
    spoil(folder, what)
    with pytest.raises(UserError, match=message):
        build_model(find_backbone(ModelConfig(name=str(folder)), NAMES), LORA, 42)[0]


@pytest.mark.parametrize(
    ("peft_type", "options", "message"),
    [
        ("LORRA", {}, "'LORRA' is not supported; supported: LORA"),
        (
            "LOHA",
            {"lora_alpha": 3},
            r"unknown option 'peft\.lora_alpha' for LOHA; nearest: peft\.alpha; --peft\.lora_alpha null leaves it out",
        ),
        ("LORA", {"r": "many"}, r"peft\.r: 'many' does not fit"),
        ("LORA", {"target_modules": ["query", "quarry"]}, "'quarry' has no effect; adapters fit .*query"),
        ("LORA", {"target_modules": ".*nothing"}, r"peft\.target_modules: no module gets an adapter.*; choose from"),
        ("LN_TUNING", {"target_modules": ["LayerNorm", "dropout"]}, r"peft\.target_modules: .* without parameters"),
        ("LORA", {"alora_invocation_tokens": [5]}, r"peft\.alora_invocation_tokens: must be null"),
        ("LORA", {"exclude_modules": ["quarry"]}, r"peft\.exclude_modules: 'quarry' has no effect"),
        ("LORA", {"target_parameters": ["x.y"]}, r"peft\.target_parameters: 'x\.y' has no effect"),
        ("LORA", {"target_modules": ["out_proj"]}, r"peft\.target_modules: no module gets an adapter.* The head"),
        ("LORA", {"layers_to_transform": [0, 9]}, r"peft\.layers_to_transform: 9 has no effect"),
        ("LORA", {"target_modules": "("}, r"peft: '\(' is not a regular expression"),
        ("LORA", {"r": 0, "target_modules": ATTENTION}, "peft: "),
        ("LORA", {"lora_dropout": 1.0}, r"peft\.lora_dropout: 1\.0 must be at least 0 and below 1"),
        ("ADALORA", {"target_r": 4, "init_r": 4}, r"peft\.target_r: 4 must be below init_r"),
        ("ADALORA", {"total_step": 9}, r"peft\.total_step: leave it out"),
        ("LOKR", {"module_dropout": 0.1}, r"peft\.module_dropout: must be 0"),
        ("LORA", {"velora_config": {"num_groups": 4}}, r"peft\.velora_config: leave it out; .* change one another"),
        ("LORA", {"monteclora_config": {"num_samples": 4}}, r"peft\.monteclora_config: leave it out; it adds noise"),
        ("LORA", {"kasa_config": {"beta": 0.1}}, r"peft\.kasa_config: leave it out; it adds a loss"),
        ("VBLORA", {"save_only_topk_weights": True}, r"peft\.save_only_topk_weights: leave it out; checkpoints"),
    ],
)
def test_wrong_adapter_settings_are_refused_in_words(backbone, peft_type, options, message):
    with pytest.raises(UserError, match=message):
        check_fit(backbone, PeftConfig(peft_type=peft_type, options=options), 32, pairs=False)


@pytest.mark.parametrize(
    ("config", "peft_type", "message"),
    [
        (
            GPT2Config(n_layer=1, n_embd=8, n_head=2),
            "LORA",
            r"choose from c_attn, c_fc, c_proj, wpe, wte, or all-linear",
        ),
        (
            ModernBertConfig(num_hidden_layers=1),
            "LORA",
            r"PEFT has no default for modernbert; choose from Wi, Wo, Wqkv",
        ),
        (ModernBertConfig(num_hidden_layers=1), "LN_TUNING", r"choose from \w*norm, .*norm\. The head"),
    ],
)
def test_all_layers_that_can_be_targets_are_named(config, peft_type, message):
    options = {} if config.model_type == "modernbert" else {"target_modules": ["query"]}
    with torch.device("meta"), pytest.raises(UserError, match=message):
        model = AutoModelForSequenceClassification.from_config(config)
        add_adapter(model, adapter_config(PeftConfig(peft_type, options=options), "none"), set())


def test_a_word_for_a_truth_value_is_one(backbone):
    def names(**options):
        settings = PeftConfig(options={"r": 2, "target_modules": ATTENTION, **options})
        return [name for name, _ in check_fit(backbone, settings, 32, pairs=False).named_parameters()]

    assert any("magnitude" in name for name in names(use_dora=True))
    assert not any("magnitude" in name for name in names(use_dora="no"))
    assert any("magnitude" in name for name in names(use_dora="yes"))

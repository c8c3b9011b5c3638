"""What a backbone must bring: all of its weights, one padding token, and a tokenizer for which texts are texts."""

import json

import pytest
import safetensors.torch
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BigBirdConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    XLMRobertaTokenizer,
)

from tests.families import tiny, tiny_classifier, tokenizer
from tests.harness.data import TOPICS
from trainer.config.schema import ModelConfig, PeftConfig
from trainer.errors import UserError
from trainer.model.adapter import copy_shared_parameters, unwrap_head
from trainer.model.backbone import Backbone, find_backbone, load_weights, set_dropout
from trainer.model.build import build_model, check_fit
from trainer.model.tokenizer import OFFSET_POSITION_FAMILIES, save_tokenizer

NAMES = list(TOPICS)
BERT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "pad_token_id": 1,
}  # fmt: skip
LLAMA = {
    "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64,
    "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 0,
}  # fmt: skip


def find(folder):
    return find_backbone(ModelConfig(name=str(folder)), NAMES)


@pytest.fixture
def bert(tmp_path, tiny_tokenizer):
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**BERT, vocab_size=len(tiny_tokenizer))).save_pretrained(tmp_path / "bert")
    tiny_tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


# --- weights ---


def rewritten(folder, change):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    changed = {new: tensor for name, tensor in tensors.items() if (new := change(name)) is not None}
    safetensors.torch.save_file({name: tensor.clone() for name, tensor in changed.items()}, path, {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: None if "layer.1." in name else name, r"lack 16 tensors .* first bert\.encoder\.layer\.1\."),
        (lambda name: None if "word_embeddings" in name else name, r"lack 1 tensors .*word_embeddings\.weight"),
        (lambda name: f"module.{name}", r"lack 37 tensors .* The file has a similar name: module\.bert\."),
        (lambda name: f"0.auto_model.{name.removeprefix('bert.')}", r"a similar name: 0\.auto_model\."),
    ],
)
def test_weights_that_lack_a_part_of_the_backbone_are_refused(bert, change, message):
    with pytest.raises(UserError, match=message) as caught:
        load_weights(find(rewritten(bert, change)))
    assert "Save the whole model again" in str(caught.value)


@pytest.mark.parametrize("sizes", [{"intermediate_size": 48}, {"max_position_embeddings": 80}, {"vocab_size": 99}])
def test_weights_of_another_shape_than_the_configuration_are_refused(bert, sizes):
    path = bert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    with pytest.raises(UserError, match=r"or have them in another shape: first bert\."):
        load_weights(find(bert))


def test_quantized_weights_are_refused(bert):
    tensors = safetensors.torch.load_file(bert / "model.safetensors")
    scale = {"bert.encoder.layer.0.attention.self.query.weight_scale": torch.ones(1)}
    safetensors.torch.save_file(tensors | scale, bert / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"^model\.name: the weights of .* are quantized; .* nf4$"):
        load_weights(find(bert))
    path = bert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UserError, match="are quantized"):
        find(bert)


def test_no_dropout_may_be_null(tmp_path):
    tiny_classifier("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attention_dropout": None}))
    assert find(tmp_path).config.attention_dropout == 0.0


def test_a_decoder_without_weights_is_refused(tmp_path, tiny_tokenizer):
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
    T5EncoderModel(T5Config(**sizes, vocab_size=len(tiny_tokenizer))).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"first transformer\.decoder\."):
        load_weights(find(tmp_path))


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_head_and_a_pooler_may_be_new(bert, prefix):
    keep = {"": lambda name: name.removeprefix("bert.") if name.startswith("bert.") else None, "bert.": lambda n: n}
    _, missing, _ = load_weights(find(rewritten(bert, keep[prefix])))
    assert missing == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("layers", "extra", "notes"),
    [
        (1, None, ["16 tensors of the weights are not used: config.json has no place for bert.encoder.layer.1."]),
        (2, "encoder.layer.0.attention.self.distance_embedding.weight", ["1 tensors of the weights are not used: "]),
        (2, "encoder.layer.0.attention.self.inv_freq", []),
        (2, "pooler.dense.weight", []),
    ],
)
def test_layers_of_the_file_that_the_configuration_lacks_are_noted(bert, layers, extra, notes):
    path = bert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": layers}))
    weights = safetensors.torch.load_file(bert / "model.safetensors")
    weights |= {f"bert.{extra}": torch.ones(4, 4)} if extra else {}
    safetensors.torch.save_file(weights, bert / "model.safetensors", {"format": "pt"})
    _, _, found = load_weights(find(bert))
    assert [note.startswith(wanted) for note, wanted in zip(found, notes, strict=True)] == [True] * len(notes)


@pytest.mark.parametrize(
    "left_over",
    [
        {"return_dict": False}, {"output_attentions": True, "output_hidden_states": True}, {"torchscript": True},
        {"gradient_checkpointing": True}, {"chunk_size_feed_forward": 7}, {"attn_implementation": "eager"},
        {"attn_implementation": "flash_attention_2"}, {"problem_type": "regression"},
    ],
    ids=str,
)  # fmt: skip
def test_what_config_json_has_from_another_use_changes_nothing(bert, tmp_path, left_over):
    expected = find(bert).config.to_dict()
    path = bert / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **left_over}))
    backbone = find(bert)
    found = backbone.config.to_dict()
    assert {name: value for name, value in found.items() if value} == {n: v for n, v in expected.items() if v}
    model = load_weights(backbone)[0].train()
    assert model.config._attn_implementation == "sdpa" and not any(
        getattr(module, "gradient_checkpointing", False) for module in model.modules()
    )
    backbone.config.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("family", OFFSET_POSITION_FAMILIES)
def test_positions_that_start_behind_the_padding_id(family):
    """The longest example that fits is computed, and one more token is not."""
    model = tiny(family, max_position_embeddings=16).get_base_model().eval()
    backbone = Backbone("", None, model.config, None, ModelConfig())
    longest = backbone.max_positions
    assert longest == 14
    model(input_ids=torch.full((1, longest), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 5))


@pytest.mark.parametrize("family", ["bert", "bart", "gpt2", "t5gemma", "xlnet"])
def test_the_dropout_that_is_asked_for_is_everywhere(family):
    config = tiny(family).get_base_model().config
    set_dropout(config, 0.37)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    assert {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)} == {0.37}


def test_dropout_that_a_backbone_does_not_take_is_refused():
    config = tiny("mpt").get_base_model().config
    set_dropout(config, 0.0)
    with pytest.raises(UserError, match=r"model\.dropout: this backbone does not accept 0\.37: .*attn_pdrop"):
        set_dropout(config, 0.37)


# --- padding ---


@pytest.fixture(scope="module")
def llama_tokenizer(tiny_tokenizer):
    def make(**special):
        return PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer, **special)

    return make


@pytest.mark.parametrize(
    ("special", "theirs", "expected"),
    [
        ({"eos_token": "</s>"}, None, 2),
        ({"eos_token": "</s>"}, 9, 2),  # an ordinary word cannot pad
        ({"eos_token": "</s>"}, -1, 2),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, 3, 3),
        ({"eos_token": "</s>", "pad_token": "<pad>"}, 2, 1),
        ({"eos_token": "</s>", "pad_token": "<pad>"}, 1, 1),
    ],
)
def test_tokenizer_and_decoder_pad_with_one_token(tmp_path, llama_tokenizer, special, theirs, expected):
    tokenizer = llama_tokenizer(**special)
    LlamaConfig(**LLAMA, vocab_size=len(tokenizer), pad_token_id=theirs).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({}))
    backbone = find(tmp_path)
    assert backbone.config.pad_token_id == backbone.tokenizer.pad_token_id == expected


def test_without_a_token_to_pad_with_it_is_refused(tmp_path, llama_tokenizer):
    tokenizer = llama_tokenizer(bos_token="<s>")
    LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=len(tokenizer))).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has no padding token and no end token; name one of its tokens as pad_token"):
        find(tmp_path)


def test_positions_that_begin_behind_the_padding_id_keep_it(tiny_backbone, tmp_path, tiny_tokenizer):
    (tmp_path / "model.safetensors").write_bytes((tiny_backbone / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_bytes((tiny_backbone / "config.json").read_bytes())
    PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, unk_token="<unk>", pad_token="<mask>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    backbone = find(tmp_path)
    assert backbone.config.pad_token_id == backbone.tokenizer.pad_token_id == 1


# --- special tokens in texts ---


def unigram(kind, pieces):
    letters = [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz/<>[]"]
    return kind(vocab=[(piece, 0.0) for piece in pieces] + letters)


def word_piece():
    words = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[", "]", "sep", "a", "b", "pad"])}
    backend = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


TOKENIZERS = {
    "word piece": word_piece,
    "unigram, T5": lambda: unigram(lambda vocab: T5Tokenizer(vocab=vocab, extra_ids=2), ["<pad>", "</s>", "<unk>"]),
    "unigram, XLM-R": lambda: unigram(XLMRobertaTokenizer, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_special_token_in_a_text_is_text(kind, tmp_path):
    raw = TOKENIZERS[kind]()
    raw.save_pretrained(tmp_path / "backbone")
    BertConfig(**BERT, vocab_size=len(raw)).save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "model.safetensors").write_bytes(safetensors.torch.save({}))
    tokenizer = find(tmp_path / "backbone").tokenizer
    assert tokenizer("a b")["input_ids"] == raw("a b")["input_ids"]
    save_tokenizer(tokenizer, 32, tmp_path / "saved")
    plain = AutoTokenizer.from_pretrained(tmp_path / "saved")
    control = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    for token in set(tokenizer.all_special_tokens) - {tokenizer.unk_token}:
        for text in (f"a {token} b", token, f"a{token}b", f"{token}{token}", token.replace("<", "＜")):
            assert not control & {*tokenizer(text, add_special_tokens=False)["input_ids"]}, text
            assert dict(plain(text, text)) == dict(tokenizer(text, text)), "plain transformers reads it alike"
    token = tokenizer.eos_token or tokenizer.sep_token
    assert control & {*raw(f"a {token} b", add_special_tokens=False)["input_ids"]}, "the negative control"


def test_the_side_of_the_padding_is_saved(tmp_path):
    tokenizer = TOKENIZERS["unigram, T5"]()
    for side in ("left", "right"):
        tokenizer.padding_side = side
        save_tokenizer(tokenizer, 32, tmp_path / side)
        assert AutoTokenizer.from_pretrained(tmp_path / side).padding_side == side


# --- families with limits of their own ---


def test_random_blocks_of_attention_become_full_attention(tmp_path, tiny_tokenizer):
    sizes = {**BERT, "max_position_embeddings": 128, "block_size": 4, "num_random_blocks": 2}
    AutoModel.from_config(BigBirdConfig(**sizes, vocab_size=len(tiny_tokenizer))).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    ours, _, _ = load_weights(find_backbone(ModelConfig(name=str(tmp_path), dropout=0.0), NAMES))
    control = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    ids = torch.arange(5, 105)[None] % len(tiny_tokenizer)
    with torch.no_grad():
        for model, is_same in ((ours, True), (control, False)):  # in evaluation BigBird draws no blocks
            assert torch.equal(model.train()(input_ids=ids).logits, model.eval()(input_ids=ids).logits) == is_same


def test_attention_that_needs_remote_code_is_refused(tmp_path, tiny_tokenizer):
    tiny_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mra", "vocab_size": 99}))
    (tmp_path / "model.safetensors").write_bytes(safetensors.torch.save({}))
    with pytest.raises(UserError, match="mra is not supported: its attention is remote code"):
        find(tmp_path)


# --- names that lead to no adapter ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["query", "classifier.dense"]}, r"'classifier\.dense' has no effect; adapters fit dense"),
        ({"target_modules": ["query"], "modules_to_save": ["pooled"]}, r"modules_to_save: 'pooled' has no effect"),
        ({"target_modules": ["query"], "rank_pattern": {"value": 2}}, r"peft\.rank_pattern: 'value' has no effect"),
        ({"target_modules": ["query"], "alpha_pattern": {"lay": 2}}, r"peft\.alpha_pattern: 'lay' has no effect"),
    ],
)
def test_names_that_peft_would_pass_over_are_refused(tiny_backbone, options, message):
    with pytest.raises(UserError, match=message):
        check_fit(find(tiny_backbone), PeftConfig(options=options), 32, pairs=False)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["dense", "query"]},  # also in the head, which trains anyway
        {"target_modules": ["query"], "layers_to_transform": [1]},
        {"target_modules": ["query"], "rank_pattern": {"layer.1.attention.self.query": 2}},
    ],
)
def test_names_that_lead_to_an_adapter_are_not(tiny_backbone, options):
    check_fit(find(tiny_backbone), PeftConfig(options=options), 32, pairs=False)


def test_replicated_layers_leave_the_configuration_alone(bert):
    backbone = find(bert)
    settings = PeftConfig(options={"target_modules": ["query"], "layer_replication": [[0, 2], [1, 2]]})
    model = check_fit(backbone, settings, 32, pairs=False)
    assert (model.config.num_hidden_layers, backbone.config.num_hidden_layers) == (3, 2)


def test_replicated_layers_need_layers_of_one_type(tmp_path):
    tiny_classifier("qwen2").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    settings = PeftConfig(options={"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]]})
    with pytest.raises(UserError, match=r"^peft\.layer_replication: must be null: PEFT copies layers"):
        check_fit(find(tmp_path), settings, 32, pairs=False)


def test_replicated_layers_are_merged_each_for_itself(bert, tmp_path):
    options = {"target_modules": ["query"], "layer_replication": [[0, 2], [1, 2]], "init_lora_weights": False}
    model = build_model(find(bert), PeftConfig(options=options), 0)[0].eval()
    ids = torch.arange(5, 15)[None]
    expected = model(input_ids=ids).logits
    unwrap_head(model)
    copy_shared_parameters(model)
    model.merge_and_unload(safe_merge=True).save_pretrained(tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(merged(input_ids=ids).logits, expected, atol=1e-5)

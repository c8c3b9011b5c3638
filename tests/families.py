"""All families of text classifiers of transformers, tiny and random: which train here, and how they are padded.

    python -m tests.families        writes tests/families.tsv: a family and its verdict a line

A family that is not built reads images or layouts too, or has parts whose sizes a few numbers do not set.
"""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import peft
import torch
import transformers
from accelerate import Accelerator
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from trainer.data.tokens import Examples
from trainer.errors import UserError
from trainer.model.peft_options import add_adapter
from trainer.packed.families import why_not_packed
from trainer.packed.forward import PaddedForward
from trainer.training.scoring import score_split
from trainer.training.start_check import check_start

LIST = Path(__file__).with_suffix(".tsv")
FAMILIES = list(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
WORDS = [f"w{i}" for i in range(60)]
START, PAD, END, UNKNOWN, MASK = SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
# Sizes by the names that the families give them; each family takes those that it has.
SIZES = {
    name: size
    for size, names in {
        2: "num_layers n_layers n_layer num_hidden_layers encoder_layers decoder_layers num_key_value_heads "
        "num_experts_per_tok type_vocab_size num_decoder_layers n_group topk_group",
        4: "num_attention_heads num_heads n_heads n_head encoder_attention_heads decoder_attention_heads num_experts "
        "num_local_experts n_routed_experts rotary_dim linear_num_key_heads linear_num_value_heads entity_emb_size",
        8: "head_dim d_kv d_head v_head_dim qk_nope_head_dim qk_rope_head_dim linear_key_head_dim "
        "linear_value_head_dim",
        16: "kv_lora_rank q_lora_rank true_hidden_size intra_bottleneck_size entity_vocab_size",
        32: "hidden_size embedding_size d_model dim emb_dim n_embd word_embed_proj_dim moe_intermediate_size "
        "shared_expert_intermediate_size",
        64: "intermediate_size d_ff hidden_dim d_inner encoder_ffn_dim decoder_ffn_dim ffn_dim dff",
        100: "vocab_size",
        128: "max_position_embeddings n_positions",
    }.items()
    for name in names.split()
}
MLA = {"num_key_value_heads": 4, "first_k_dense_replace": 1}
MIXED = {"layer_types": ["linear_attention", "full_attention"]}
OTHERS = {
    "axk1": MLA, "axk2": MLA, "deepseek_v2": MLA, "deepseek_v3": MLA, "minicpm3": MLA, "mistral4": MLA,
    "esmc": {"num_key_value_heads": 4}, "funnel": {"block_sizes": [1, 1]}, "qwen3_5_text": MIXED, "qwen3_next": MIXED,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]}, "mobilebert": {"embedding_size": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "longformer": {"attention_window": 8},
    "reformer": {
        "axial_pos_shape": (8, 8), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local"],
        "local_attn_chunk_length": 8,
    },
    "xmod": {"languages": ("en",), "default_language": "en"}, "big_bird": {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"}, "qwen3_moe": {"head_dim": 8}, "openai-gpt": {"afn": "gelu"},
    "lilt": {"hidden_size": 48},
    "canine": {"num_hash_buckets": 64}, "roc_bert": {"pronunciation_vocab_size": 9, "shape_vocab_size": 9},
}  # fmt: skip
# These read images or layouts beside text, need remote code, or have parts whose sizes a few numbers do not set.
NOT_TINY = {
    "gemma3",
    "layoutlmv2",
    "layoutlmv3",
    "mistral4",
    "modernvbert",
    "mra",
    "perceiver",
    "qwen3_5",
    "tapas",
    "ultravbert",
}


TEXTS = SimpleNamespace(
    texts=[" ".join(words) for words in (np.random.default_rng(i).choice(WORDS, 3 + 5 * i) for i in range(6))],
    text_pairs=None,
)


def tokenizer():
    """A word-level tokenizer over WORDS, with one end token."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.RobertaProcessing((END, 2), (START, 0), add_prefix_space=False)
    names = {"bos_token": START, "cls_token": START, "eos_token": END, "sep_token": END, "unk_token": UNKNOWN}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names, pad_token=PAD, mask_token=MASK)


def tiny_part(kind):
    """Sizes of the configuration of a part, for families that have several."""
    known = {*kind().to_dict(), *getattr(kind, "attribute_map", {})}
    return {name: value for name, value in SIZES.items() if name in known}


def tiny_classifier(family, **settings):
    """A tiny classifier of 3 classes; its weights are large enough to tell."""
    kind = CONFIG_MAPPING[family]
    known = {*kind().to_dict(), *getattr(kind, "attribute_map", {})}
    special = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 1}
    ranges = dict.fromkeys(("initializer_range", "init_std", "embed_init_std", "initializer_std"), 0.15)
    sizes = {name: value for name, value in {**SIZES, **ranges}.items() if name in known}
    parts = {name: tiny_part(part) for name, part in kind.sub_configs.items() if isinstance(part, type)}
    config = kind(**{**sizes, **special, **parts, **OTHERS.get(family, {}), "num_labels": 3, **settings})
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config)


def tiny(family, **settings):
    """A tiny classifier with LoRA in every linear layer."""
    model = tiny_classifier(family, **settings)
    targets = "all-linear" if family != "phimoe" else ["q_proj"]
    return add_adapter(model, peft.LoraConfig(task_type="SEQ_CLS", target_modules=targets), set())


def verdict_of(family):
    """What the check before step 1 says of a family, in words; and the padding it found, None where it refuses."""
    try:
        model = tiny(family)
    except UserError as error:
        return f"refused: {error}", None, None
    except Exception as error:
        return f"not built: {type(error).__name__}", None, None
    try:
        _, padding = check_start(model, 0, TEXTS, tokenizer(), 64, family)
    except UserError as error:
        return f"refused: {str(error).removeprefix(f'model.name: {family} ')}", None, None
    how = "padded on the left" if padding.left else "one length at a time" if padding.one_length else "padded"
    return f"works, {'packed' if padding.packs and why_not_packed(model) is None else how}", model, padding


def difference_between_batches(model, padding):
    """Largest difference of a logit between batches of many examples and of one, by the code that scores a split."""
    rows = [tokenizer()(text)["input_ids"] for text in TEXTS.texts]
    lengths = np.array([len(row) for row in rows])
    offsets = np.concatenate([[0], lengths.cumsum()])
    examples = Examples(np.concatenate(rows), offsets, None, np.zeros(len(rows), dtype=np.int64), lengths)
    settings = {"accelerator": Accelerator(cpu=True), "num_labels": 3}
    forward = PaddedForward(model, 1, padding)
    one, many = (score_split(forward, examples, max_tokens=tokens, **settings) for tokens in (1, 10_000))
    return float(np.abs(one - many).max())


def listed():
    """The kept list: {family: verdict}."""
    return dict(line.split("\t") for line in LIST.read_text().splitlines() if not line.startswith("#"))


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    lines = [f"# transformers {transformers.__version__}; made by python -m tests.families"]
    for family in FAMILIES:
        lines.append(f"{family}\t{'not built' if family in NOT_TINY else verdict_of(family)[0]}")
        print(lines[-1], flush=True)
    LIST.write_text("\n".join(lines) + "\n")

"""The tokenizer: one padding token, special tokens read as text, and the files beside an adapter.

Always holds: plain transformers reads a saved tokenizer and makes the same tokens.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from tokenizers import normalizers
from transformers import PreTrainedConfig

from trainer.errors import UserError

# Families whose position ids start after the padding id.
OFFSET_POSITION_FAMILIES = (
    "camembert", "data2vec-text", "esm", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


def set_padding(config: PreTrainedConfig, tokenizer: Any, name: str) -> None:
    """Gives tokenizer and backbone one padding token: decoders classify by the last token that is not padding.

    Decoders often have none; then the end token pads. An ordinary token cannot pad, because texts may end with it.
    """
    inner = config.get_text_config()
    configured, special = getattr(inner, "pad_token_id", None), tokenizer.all_special_ids
    candidates = [tokenizer.pad_token_id, configured if configured in special else None, tokenizer.eos_token_id]
    if config.model_type in OFFSET_POSITION_FAMILIES and configured is not None:
        candidates = [configured]  # positions are counted from it
    found = next((token for token in candidates if token is not None), None)
    if found is None or not 0 <= found < len(tokenizer):
        raise UserError(
            f"model.name: the tokenizer of {name} has no padding token and no end token; name one of its tokens as "
            "pad_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id != found:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found)
    config.pad_token_id = inner.pad_token_id = found
    tokenizer.padding_side = "right"


def read_special_tokens_as_text(tokenizer: Any) -> None:
    """A special token spelled out in a text is text: "</s>" ends no example, and "<pad>" pads none.

    SentencePiece's unigram models know these spellings as pieces; a space inside breaks them.
    """
    backend = tokenizer.backend_tokenizer
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    backend.encode_special_tokens = True
    spellings = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    pieces = [s for s in sorted(spellings) if special & {*backend.encode(s, add_special_tokens=False).ids}]
    if pieces:
        replacements = [normalizers.Replace(piece, _broken(piece)) for piece in pieces]
        own = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([*own, *replacements])


def save_tokenizer(tokenizer: Any, max_length: int, folder: Path) -> None:
    """Writes the tokenizer. Its length is the run's, so whoever truncates gets what the model was trained on."""
    own = copy.deepcopy(tokenizer)
    own.init_kwargs.pop("max_length", None)  # it would override model_max_length
    own.model_max_length = max_length
    own.init_kwargs["padding_side"] = own.padding_side  # XLNet pads on the left
    own.save_pretrained(folder)
    if any(_broken(token) in own.backend_tokenizer.to_str() for token in own.all_special_tokens):
        # its own class would build the tokenizer without our normalizer; this one reads tokenizer.json as it is
        path = folder / "tokenizer_config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        values |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": own.model_input_names}
        path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _broken(token: str) -> str:
    """A special token's spelling with a space inside: "</s>" -> "< /s>"."""
    return f"{token[0]} {token[1:]}"

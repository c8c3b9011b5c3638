"""Optimizers and schedules, a table each, and the learning rate as a pure function of the step.

Always holds: the learning rate depends on (config, step, total steps) alone, so a checkpoint holds no scheduler. Biases
and norms have no weight decay, as in BERT (Devlin et al., 2019). LoRA's B may learn faster than the rest, as in LoRA+
(Hayou et al., arXiv 2402.12354).

To add an optimizer or a schedule: one entry in its table, and its name in `OptimConfig` of config/schema.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from trainer.config.schema import OptimConfig

ParameterGroups = list[dict[str, Any]]

OPTIMIZERS: dict[str, Callable[[ParameterGroups, OptimConfig], torch.optim.Optimizer]] = {
    "adamw": lambda groups, config: torch.optim.AdamW(groups, betas=config.betas, eps=config.eps, fused=True),
    "adam": lambda groups, config: torch.optim.Adam(groups, betas=config.betas, eps=config.eps, fused=True),
    "sgd": lambda groups, config: torch.optim.SGD(groups, fused=True),
}
"""Each takes groups with `params`, `lr`, `weight_decay`, and `lr_ratio`, which it need not know."""

SCHEDULES: dict[str, Callable[[float], float]] = {
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),  # Loshchilov & Hutter (2017), one period
    "constant": lambda progress: 1.0,
}
"""Each maps the progress since the warm-up, from 0 to 1, to a fraction of the peak, 1 at the start."""


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    It rises linearly over the first `warmup_fraction` of the steps. Then the schedule falls from the peak towards
    `final_lr_fraction` of it.

    Example: linear, peak 1.0, no warm-up, 4 steps -> 1.0, 0.75, 0.5, 0.25
    """
    warmup_steps = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return config.learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    floor = config.final_lr_fraction
    return config.learning_rate * (floor + (1 - floor) * SCHEDULES[config.schedule](progress))


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    """Builds the optimizer over all parameters that train.

    Returns:
        the optimizer, and the parameters by name in the order of its state: checkpoints name the state by them.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    ratio = config.lora_b_lr_ratio or 1.0
    kinds: dict[tuple[float, bool], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in trained:
        kind = ratio if _is_lora_b(name) else 1.0, parameter.ndim >= 2
        kinds.setdefault(kind, []).append((name, parameter))
    parts = sorted(kinds.items(), key=lambda part: (part[0][0] != 1, not part[0][1]))
    groups: ParameterGroups = [
        {
            "params": [parameter for _, parameter in part],
            "weight_decay": config.weight_decay if is_decayed else 0.0,
            "lr": config.learning_rate * lr_ratio,
            "lr_ratio": lr_ratio,
        }
        for (lr_ratio, is_decayed), part in parts
    ]
    return OPTIMIZERS[config.name](groups, config), {name: p for _, part in parts for name, p in part}


def _is_lora_b(name: str) -> bool:
    """Whether a parameter is a B of LoRA, of a linear or an embedding layer."""
    return ".lora_B." in name or ".lora_embedding_B." in name


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every parameter group: `value` times the group's ratio."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["lr_ratio"]

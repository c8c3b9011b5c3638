"""Optimizers and schedules, a table each, and the learning rate as a pure function of the step.

Always holds: the learning rate depends on (config, step, total steps) alone, so a checkpoint holds no scheduler. Biases
and norms have no weight decay, as in BERT (Devlin et al., 2019).

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
"""Each takes groups with `params`, `lr` and `weight_decay`."""

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
    decayed = [(name, parameter) for name, parameter in trained if parameter.ndim >= 2]
    others = [(name, parameter) for name, parameter in trained if parameter.ndim < 2]
    groups: ParameterGroups = [
        {"params": [parameter for _, parameter in part], "weight_decay": decay, "lr": config.learning_rate}
        for part, decay in ((decayed, config.weight_decay), (others, 0.0))
        if part
    ]
    return OPTIMIZERS[config.name](groups, config), dict(decayed + others)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value

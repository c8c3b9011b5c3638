"""The optimizer, its parameter groups, and the learning rate as a pure function of the step.

Always holds: the learning rate depends on (config, total steps, step) alone, so no scheduler has a state to save, and
none can step once per process. Biases and norms are not decayed, as in BERT (Devlin et al., 2019).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trainer.config.schema import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step`, counted from 0.

    The warm-up rises linearly over the first `warmup_fraction` of the steps and ends at the peak; the schedule then
    runs from the peak to `final_lr_fraction` of it at `total_steps`. `cosine` follows Loshchilov & Hutter (2017) with
    one period.

    Example: linear, peak 1.0, no warm-up, 4 steps -> 1.0, 0.75, 0.5, 0.25
    """
    warmup_steps = math.ceil(config.warmup_fraction * total_steps)
    if step < warmup_steps:
        return config.learning_rate * step / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    decay = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "constant": 1.0,
    }[config.schedule]
    return config.learning_rate * (config.final_lr_fraction + (1 - config.final_lr_fraction) * decay)


def build_optimizer(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], config: OptimConfig
) -> tuple[torch.optim.Optimizer, dict[str, torch.nn.Parameter]]:
    """The optimizer over all parameters that train.

    Returns:
        the optimizer, and the parameters by name in the order of its state: so checkpoints can name the state.
    """
    trained = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    decayed = [(name, parameter) for name, parameter in trained if parameter.ndim >= 2]
    others = [(name, parameter) for name, parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": [parameter for _, parameter in part], "weight_decay": decay}
        for part, decay in ((decayed, config.weight_decay), (others, 0.0))
        if part
    ]
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True), dict(decayed + others)
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    optimizer = kind(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps, fused=True)
    return optimizer, dict(decayed + others)


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def skip_if(void: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's next step changes neither parameters nor its state where `void`, bool [], holds.

    The device decides that, so the host need not know. By this attribute torch's GradScaler has it do so.
    """
    optimizer.found_inf = void.float()  # type: ignore[attr-defined]

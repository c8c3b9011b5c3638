"""AdaLoRA (Zhang et al., arXiv 2303.10512): singular values that matter least become 0, until the budget is met.

Always holds: importance is a function of the summed gradients, so all ranks keep the same values. It is in the
optimizer's state, so checkpoints have it. Other methods pass through here unchanged.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from trainer.errors import UserError
from trainer.training.records import Learner

AVERAGES = {"importance": "exp_avg_ipt", "uncertainty": "exp_avg_unc"}
"""in the optimizer's state of a parameter: moving averages, by PEFT's name of them"""


def set_total_steps(model: PeftModel, total_steps: int) -> None:
    """Tells AdaLoRA the length of the run; refuses one that is too short for its phases."""
    if (allocator := _allocator(model)) is None:
        return
    config = allocator.peft_config
    if config.tinit + config.tfinal >= total_steps:
        raise UserError(
            f"peft.tinit {config.tinit} and peft.tfinal {config.tfinal}: the {total_steps:,} steps of the run leave "
            "none between these phases; lower them, or train longer"
        )
    config.total_step = total_steps


def add_orthogonality(learner: Learner) -> None:
    """Adds the gradient of AdaLoRA's regularizer: the mean of |P P^T - I| over all A and B^T.

    The main process alone adds it, since gradients are summed over the ranks. The loss that is shown is without it.
    """
    if (allocator := _allocator(learner.model)) is None or not learner.accelerator.is_main_process:
        return
    parts = {name: parameter for name, parameter in learner.parameters.items() if ".lora_" in name}
    rows = [p if ".lora_A." in name else p.t() for name, p in parts.items() if ".lora_E." not in name]
    distances = [torch.linalg.matrix_norm(p @ p.t() - torch.eye(len(p)).to(p)) for p in rows]
    learner.accelerator.backward(allocator.peft_config.orth_reg_weight * torch.stack(distances).mean())


def update_ranks(learner: Learner, step: int, is_finite: bool) -> None:
    """Updates the importance by the gradient of optimizer step `step`, and sets singular values to 0 if it is time.

    A gradient that is not finite, which fp16's scaler skips, says nothing about the importance.
    """
    if (allocator := _allocator(learner.model)) is None:
        return
    config, backbone, state = allocator.peft_config, learner.model.get_base_model(), learner.optimizer.optimizer.state
    parameters = {name: p for name, p in backbone.named_parameters() if ".lora_" in name and p.requires_grad}
    for name, parameter in parameters.items():
        for own, theirs in AVERAGES.items():
            if own in state[parameter]:
                getattr(allocator, theirs)[name] = state[parameter][own]
                allocator.ipt[name] = parameter.grad  # replaced at once; PEFT asks whether it is there
    step, last = step + 1, config.total_step - config.tfinal
    if step < last and is_finite:
        allocator.update_ipt(backbone)
    budget, is_due = allocator.budget_schedule(step)
    if (is_due and step < last and is_finite) or step == last:
        kept = allocator.mask_to_budget(backbone, budget)
        for name in kept:
            state[parameters[name]]["kept"] = torch.tensor(kept[name]).view(-1, 1).to(parameters[name])
    for name, parameter in parameters.items():
        if step > last and "kept" in state[parameter]:
            parameter.data.mul_(state[parameter]["kept"])
        for own, theirs in AVERAGES.items():
            if name in getattr(allocator, theirs):  # not before the first finite gradient
                state[parameter][own] = getattr(allocator, theirs)[name]


def _allocator(model: PeftModel) -> Any:
    """PEFT's allocator of ranks; None for other methods."""
    return getattr(model.base_model, "rankallocator", None)

"""One optimizer step: the only module with `backward` and `optimizer.step`.

Always holds: a step is a function of (configuration, data, step) and of the state (adapter, optimizer, scaler). The
loss is the weighted mean over the global batch, computed here from logits. A step is applied only if no rank ran out
of memory and every loss and gradient is finite. The host reads the device once a step (twice with fp16's scale).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from trainer.batching.collate import Batch, average_windows
from trainer.batching.plan import MicroBatch
from trainer.compat import gradient_norms, on_device
from trainer.data.tokens import Examples
from trainer.distributed.session import STOP_SIGNALS
from trainer.errors import UserError
from trainer.model.plain import is_plain
from trainer.tasks.task import Losses
from trainer.training.adalora import add_orthogonality, update_ranks
from trainer.training.records import Learner, Run


@dataclass(frozen=True)
class StepResult:
    """The result of an optimizer step, equal on all ranks."""

    loss: float
    """weighted mean over the global batch"""
    grad_norm: float
    """L2 norm of the gradient before clipping"""
    stop: int
    """number of a signal that some rank received, or 0"""
    loss_scale: float | None = None
    """fp16 only"""
    out_of_memory: bool = False
    """memory ran out on some rank, so nothing was applied"""


def train_step(run: Run, step: int, micro_batches: list[MicroBatch]) -> StepResult:
    """Takes optimizer step `step`, counted from 0, with this rank's share of the global batch.

    Each rank adds up the gradients of its micro-batches. Then a few numbers and one adapter-sized tensor are summed
    over all ranks. A rank that ran out of memory takes part too, so no rank waits for another. All ranks learn from
    the sums whether to apply the gradient.

    Raises:
        UserError: a loss or gradient is not finite (names step and rows), a parameter has no gradient, or memory ran
            out and the weights are sharded. Nothing of this step was applied.
    """
    learner, total_weight = run.learner, run.plan.total_weight(step)
    accelerator, scaler = learner.accelerator, learner.accelerator.scaler
    run.watch.position = f"step {step + 1}"
    seed_unkeyed_operations(learner, step)
    losses, out_of_memory = [torch.zeros(0, dtype=torch.float64, device=accelerator.device)], False
    for micro_batch in micro_batches:
        try:
            weights = micro_batch.weights / total_weight
            losses.append(add_gradient(learner, run.inputs.examples["train"], step, micro_batch.ids, weights).double())
        except torch.OutOfMemoryError:
            if learner.sharded:  # the other ranks wait in a collective of this forward or backward
                raise UserError(f"step {step + 1}: out of memory; try a lower batch.max_tokens") from None
            out_of_memory = True
            learner.optimizer.zero_grad(set_to_none=True)
            break
    if not out_of_memory:
        add_orthogonality(learner)
    loss = torch.cat(losses)
    is_broken = ~loss.isfinite()
    sums = sum_over_ranks(accelerator, [loss.sum(), is_broken.sum()], [out_of_memory, *run.stop.counts()])
    norms = sum_gradients(learner)
    loss_scale = scaler.get_scale() if scaler is not None else None
    norm = torch.linalg.vector_norm(norms) / (loss_scale or 1)
    mean_loss, num_broken, num_out_of_memory, *signals, grad_norm = torch.cat([sums, norm.view(1)]).tolist()
    if num_out_of_memory:
        learner.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean_loss, 0.0, first_signal(signals), out_of_memory=True)
    if num_broken:
        _refuse_broken_loss(run, step, np.concatenate([part.ids for part in micro_batches])[is_broken.cpu().numpy()])
    if not np.isfinite(grad_norm) and scaler is None:  # the scaler itself skips a step whose gradient overflows
        _refuse_broken_gradient(learner, step, norms)
    apply_gradient(learner, step, norm, is_finite=bool(np.isfinite(grad_norm)))
    return StepResult(mean_loss, grad_norm, first_signal(signals), loss_scale)


def add_gradient(learner: Learner, examples: Examples, step: int, ids: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """Adds the gradient of a micro-batch to the parameters' gradients; returns its weighted losses, [B], detached."""
    batch = learner.forward.collate(examples, ids, weights, learner.accelerator.device)
    with learner.dropout.micro_batch(step, batch.window_ids, batch.lengths):
        with learner.accelerator.autocast():
            logits = learner.forward(batch.inputs, batch.lengths)
        losses = example_losses(learner.losses, average_windows(batch, logits), batch)
        learner.accelerator.backward(losses.sum())
    return losses.detach()


def example_losses(losses_of: Losses, logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Weighted loss of each example, [B], in at least fp32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = losses_of(wide, batch.targets)
    return losses * batch.weights.to(losses.dtype)


def sum_over_ranks(accelerator: Accelerator, found: list[torch.Tensor], known: list[int]) -> torch.Tensor:
    """Sums numbers over all ranks: scalars on the device, then numbers that the host knows; float64 [n]."""
    parts = [number.double().unsqueeze(0) for number in found]
    numbers = torch.cat([*parts, on_device(np.array(known, dtype=np.float64), accelerator.device)])
    sums: torch.Tensor = accelerator.reduce(numbers, "sum")
    return sums


def sum_gradients(learner: Learner) -> torch.Tensor:
    """Sums the gradients over the ranks; returns the norm of each parameter's, times the loss scale of fp16, [P].

    The losses are divided by the weight of the whole batch, so the sum is its gradient. A parameter without a gradient
    takes part with zeros, since memory may have run out on this rank alone.
    """
    parameters = learner.parameters.values()
    # LayerDrop may skip a layer in all micro-batches, and a classifier may not use all weights of its backbone
    if learner.dropout.skips_layers or is_plain(learner.model):
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    if learner.accelerator.num_processes > 1:
        total = learner.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return torch.stack(gradient_norms(gradients))


def apply_gradient(learner: Learner, step: int, norm: torch.Tensor, is_finite: bool) -> None:
    """Clips the summed gradient, which has this norm, and applies it; fp16's scaler skips one that is not finite."""
    without = [name for name, parameter in learner.parameters.items() if parameter.grad is None]
    if without:
        raise UserError(
            f"step {step + 1}: no gradient reached {without[0]} ({len(without)} of {len(learner.parameters)} tensors); "
            "leave out what the classifier does not use, with peft.target_modules or peft.exclude_modules"
        )
    learner.accelerator.unscale_gradients()
    if learner.optim_config.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(learner.parameters.values(), learner.optim_config.max_grad_norm, norm)
    learner.optimizer.step()
    update_ranks(learner, step, is_finite)
    learner.optimizer.zero_grad(set_to_none=True)


def first_signal(counts: list[float]) -> int:
    """The first of `STOP_SIGNALS` that some rank received, given the number of ranks for each; 0 = none."""
    return next((number for number, count in zip(STOP_SIGNALS, counts, strict=True) if count), 0)


def seed_unkeyed_operations(learner: Learner, step: int) -> None:
    """Seeds random operations that keyed dropout does not reach; they repeat on the same number of processes only."""
    if learner.dropout.unreached:
        entropy = np.random.SeedSequence([learner.dropout.seed, step, learner.accelerator.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def _refuse_broken_gradient(learner: Learner, step: int, norms: torch.Tensor) -> None:
    named = zip(learner.parameters, norms.tolist(), strict=True)
    worst = next((name for name, norm in named if not np.isfinite(norm)), "all parameters together")
    raise UserError(f"step {step + 1}: the gradient of {worst} is not finite; try a lower optim.learning_rate")


def _refuse_broken_loss(run: Run, step: int, ids: np.ndarray) -> None:
    """All ranks call it; `ids` are the broken examples of this one."""
    rows = sorted(set(gather_object(run.inputs.corpus.splits["train"].rows[ids].tolist())))
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    raise UserError(
        f"step {step + 1}: the loss is not finite for {len(rows)} examples: id {shown} (row of train, counted from 0)\n"
        "Nothing of this step was applied. Try a lower optim.learning_rate, or --run.precision no."
    )

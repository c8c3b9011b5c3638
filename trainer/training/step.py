"""One optimizer step: the only file with `backward` and `optimizer.step`.

Always holds: what a step does is a function of (configuration, data, step) and of the state (adapter, optimizer,
scaler). The loss is the weighted mean over the global batch, computed here from logits; `outputs.loss` is never used.
The host asks for a step and waits for nothing (fp16's scale aside): whether the step counts is decided on the device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object

from trainer.batching.plan import Batch, MicroBatch, collate
from trainer.compat import gradient_norms, on_device, on_host
from trainer.distributed.session import STOP_SIGNALS
from trainer.errors import UserError
from trainer.tasks import TASKS, Task
from trainer.training.optim import skip_if
from trainer.training.state import Training


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gives, equal on all ranks."""

    loss: float
    """weighted mean over the global batch"""
    grad_norm: float
    """L2 norm of the gradient before clipping"""
    stop: int
    """number of a signal some rank has received, or 0"""
    loss_scale: float | None = None
    """of fp16"""
    out_of_memory: bool = False
    """memory ran out on some rank: nothing was applied"""


@dataclass(frozen=True)
class StepInFlight:
    """An optimizer step that the device was asked for and may not have done yet; see `result_of`."""

    step: int
    ids: np.ndarray
    """of the examples on this rank"""
    last: torch.Tensor
    """whether a step behind it is to change nothing, bool []: where this one does not either, or a rank has a signal"""
    out_of_memory: bool
    """memory ran out on this rank, here or in the step before"""
    numbers: Callable[[], list[float]]
    """what it gave on all ranks together; waits for the device"""
    broken: torch.Tensor
    """which losses on this rank are not finite, bool"""
    norms: torch.Tensor
    """of each parameter's gradient, [P]"""
    loss_scale: float | None
    """of fp16"""


def train_step(
    run: Training, step: int, micro_batches: list[MicroBatch], before: StepInFlight | None = None
) -> StepInFlight:
    """Asks for one optimizer step on this rank's share of the global batch.

    Each rank adds up the gradients of its own micro-batches. Then a few numbers and one adapter-sized tensor are summed
    over all ranks, one of whose memory has run out taking part as well; all learn from them alike whether the step
    counts. So no rank that fails leaves another waiting, and what is not sound is never applied.

    Args:
        run: what trains.
        step: its number, counted from 0.
        micro_batches: see above.
        before: the step before, if that is in flight.

    Raises:
        UserError: a parameter without a gradient, or, with sharded weights, memory ran out.
    """
    accelerator, total_weight = run.accelerator, run.plan.total_weight(step)
    _seed_other_random_operations(run, step)
    losses: list[torch.Tensor] = []
    out_of_memory = before is not None and before.out_of_memory  # it would again, for nothing
    for micro_batch in [] if out_of_memory else micro_batches:
        try:
            found = _add_gradient(run, step, micro_batch.ids, micro_batch.weights / total_weight)
            losses.append(found.double())
        except torch.OutOfMemoryError:
            if run.sharded:  # the others are in a collective of this forward or backward
                raise UserError(f"step {step + 1}: out of memory; try a lower batch.max_tokens") from None
            out_of_memory = True
            run.optimizer.zero_grad(set_to_none=True)  # of no use now, and its memory may be wanted
            break
    loss = torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64, device=accelerator.device)
    broken = ~loss.isfinite()
    votes = summed(run, [loss.sum(), broken.sum()], [out_of_memory, *run.stop.counts()])
    norms = _sum_gradients(run)
    norm, void = torch.linalg.vector_norm(norms), votes[1:3].any()
    loss_scale = accelerator.scaler.get_scale() if accelerator.scaler is not None else None
    if loss_scale is None:
        void = void | ~norm.isfinite()
    else:  # for its gradient the scaler itself skips a step
        norm = norm / loss_scale
    if before is not None:
        void = void | before.last
    if not out_of_memory:
        _update(run, step, norm, void)
    return StepInFlight(
        step=step,
        ids=np.concatenate([part.ids for part in micro_batches]),
        last=void | votes[3:].any(),
        out_of_memory=out_of_memory,
        numbers=on_host(torch.cat([votes, norm.view(1)])),
        broken=broken,
        norms=norms,
        loss_scale=loss_scale,
    )


def result_of(run: Training, flown: StepInFlight) -> StepResult:
    """What a step gave, once the device has done it; the step before it must not have been void.

    Raises:
        UserError: a loss or gradient that is not finite (names step and rows); the weights are unchanged.
    """
    mean_loss, num_broken, num_short, *signals, grad_norm = flown.numbers()
    if num_short:
        return StepResult(mean_loss, 0.0, signal_of(signals), out_of_memory=True)
    if num_broken:
        _refuse_broken_loss(run, flown)
    if not np.isfinite(grad_norm) and flown.loss_scale is None:
        _refuse_broken_gradient(run, flown)
    return StepResult(mean_loss, grad_norm, signal_of(signals), flown.loss_scale)


def _add_gradient(run: Training, step: int, ids: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """Adds the gradient of a micro-batch's weighted losses to that of the parameters; these losses, [B], detached."""
    padding = None if run.forward.packed else run.pad_token_id
    left = run.forward.padding.left
    batch = collate(run.train, ids, weights, padding, run.accelerator.device, left)
    with run.dropout.micro_batch(step, batch.ids, batch.lengths):
        with run.accelerator.autocast():
            logits = run.forward(batch.inputs, batch.lengths)
        losses = example_losses(TASKS[run.config.task.type], logits, batch, run.config.optim.label_smoothing)
        run.accelerator.backward(losses.sum())
    return losses.detach()


def too_large(run: Training, ids: np.ndarray) -> bool:
    """Whether on some rank memory runs out in forward and backward of its examples; nothing else comes of it."""
    out_of_memory = False
    try:
        _add_gradient(run, 0, ids, np.zeros(len(ids)))
    except torch.OutOfMemoryError:
        out_of_memory = True
    run.optimizer.zero_grad(set_to_none=True)
    return bool(summed(run, [], [out_of_memory]).item())


def example_losses(task: Task, logits: torch.Tensor, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Weighted loss of each example, [B], in at least fp32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = task.losses(wide, batch.labels, label_smoothing)
    return losses * batch.weights.to(losses.dtype)


def summed(run: Training, found: list[torch.Tensor], known: list[int]) -> torch.Tensor:
    """Sums a few numbers over all ranks: those that are on the device, and those that the host knows; float64 [n]."""
    parts = [number.double().unsqueeze(0) for number in found]
    numbers = torch.cat([*parts, on_device(np.array(known, dtype=np.float64), run.accelerator.device)])
    summed: torch.Tensor = run.accelerator.reduce(numbers, "sum")
    return summed


def signal_of(counts: list[float]) -> int:
    """Returns the signal that stops the run, or 0, from the number of ranks that received each of `STOP_SIGNALS`."""
    return next((number for number, count in zip(STOP_SIGNALS, counts, strict=True) if count), 0)


def _seed_other_random_operations(run: Training, step: int) -> None:
    """What keyed dropout does not reach is at least repeatable on the same number of processes."""
    if run.dropout.unreached:
        entropy = np.random.SeedSequence([run.config.run.seed, step, run.accelerator.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def _sum_gradients(run: Training) -> torch.Tensor:
    """Adds up the ranks' gradients; the norm of each parameter's, times the scale where there is a fp16 scaler, [P].

    The losses are divided by the whole batch's weight, so the sum is its gradient. A parameter without a gradient takes
    part with 0, since its memory may have run out on this rank alone.
    """
    if run.dropout.skips_layers:  # at random, perhaps one in all micro-batches
        for parameter in run.trained.values():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.trained.values()]
    if run.accelerator.num_processes > 1:
        total = run.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return torch.stack(gradient_norms(gradients))


def _update(run: Training, step: int, norm: torch.Tensor, void: torch.Tensor) -> None:
    """Clips the summed gradient, of this norm, and applies it, unless the step is void.

    On an overflow the fp16 scaler skips the step, and lowers its scale: it must not see what is void.
    """
    without = [name for name, p in run.trained.items() if p.grad is None]
    if without:
        raise UserError(
            f"step {step}: no gradient reached {without[0]} ({len(without)} of {len(run.trained)} tensors); what does "
            "not classify trains nothing: leave it out with peft.target_modules or peft.exclude_modules"
        )
    if run.accelerator.scaler is None or not bool(void):
        run.accelerator.unscale_gradients()
        if run.config.optim.max_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(run.trained.values(), run.config.optim.max_grad_norm, norm)
        skip_if(void, run.optimizer.optimizer)
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def _refuse_broken_gradient(run: Training, flown: StepInFlight) -> None:
    norms = zip(run.trained, flown.norms.tolist(), strict=True)
    worst = next((name for name, norm in norms if not np.isfinite(norm)), "all together")
    raise UserError(f"step {flown.step}: the gradient of {worst} is not finite; try a lower optim.learning_rate")


def _refuse_broken_loss(run: Training, flown: StepInFlight) -> None:
    broken = flown.ids[flown.broken.cpu().numpy()].tolist()
    rows = sorted(set(gather_object(run.train_rows[broken].tolist())))
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    raise UserError(
        f"step {flown.step}: the loss is not finite for {len(rows)} examples: "
        f"id {shown} (row of train, counted from 0)\n"
        "Nothing of this step was applied. Try a lower optim.learning_rate, or --run.precision no."
    )

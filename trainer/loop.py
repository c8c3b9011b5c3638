"""The training loop: the only file with `backward` and `optimizer.step`.

Always holds: everything a step does is a function of (configuration, data, step) and of the state (adapter, optimizer,
scaler, `TrainState`). So resuming is an index, and the number of processes and the cut into micro-batches change who
computes what, never what is computed. The loss of a step is the weighted mean over its global batch, computed here from
logits; `outputs.loss` is never used.
"""

from __future__ import annotations

import dataclasses
import functools
import signal
import time
from dataclasses import dataclass

import numpy as np
import torch
from accelerate.utils import gather_object

from trainer.adapter import adapter_tensors
from trainer.attention import Layout
from trainer.batching import Batch, MicroBatch, Tokenised, collate, shape_of
from trainer.config import UserError
from trainer.devices import on_device, peak_memory_bytes
from trainer.evaluation import score_split
from trainer.memory import fit, in_smaller_parts, plan_in_force, with_less_memory
from trainer.metrics import METRICS, classification_metrics, confusion, is_better, metric_value
from trainer.optim import learning_rate, set_learning_rate
from trainer.state import Tally, Training, TrainState, save_state


class Interrupted(Exception):
    """A signal came while a split was scored; the scores so far are thrown away."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = number


class OutOfMemory(Exception):
    """Memory ran out on some rank while a split was scored."""


class Stopped(Exception):
    """Training ended early because of a signal; the state is saved."""

    def __init__(self, number: int, step: int) -> None:
        super().__init__(number, step)
        self.signal = number
        self.step = step


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gives, equal on all ranks."""

    loss: float
    """weighted mean over the global batch"""
    grad_norm: float
    """L2 norm of the gradient before clipping"""
    stop: int
    """number of a signal some rank has received, or 0"""
    out_of_memory: bool = False
    """memory ran out on some rank: nothing was applied"""


def train(
    run: Training, state: TrainState, best: dict[str, torch.Tensor] | None
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """Trains from `state` to the end.

    Returns:
        the final state, and the best adapter: by validation, or the last one where there is no validation split.

    Raises:
        Stopped: a signal came; the state is saved.
        UserError: a loss or gradient that is not finite, or a checkpoint that cannot be written.
    """
    saved = (state.step, state.evaluated_step)
    if run.tries_memory and state.step == 0:
        state = fit(run, state, functools.partial(_too_large, run))
    stop = 0
    while True:  # one turn more than there are steps: the last evaluation and checkpoint need no second copy
        if not stop and _evaluation_due(run, state):
            try:
                state, best = _evaluate(run, state, best)
            except Interrupted as interrupted:
                stop = interrupted.signal
        last = state.step == run.total_steps or state.stopped
        save = last or stop or _due(run.config.checkpoint.every_steps, state.step, run.plan.steps_per_epoch)
        if save and saved != (state.step, state.evaluated_step):
            save_state(run, state, best)
            saved = (state.step, state.evaluated_step)
        if stop:
            raise Stopped(stop, state.step)
        if last:
            break
        run.watch.position = f"step {state.step + 1}"
        started = time.perf_counter()
        micro_batches = plan_in_force(run, state).micro_batches(
            state.step, run.accelerator.process_index, run.accelerator.num_processes
        )
        rate = learning_rate(run.config.optim, state.step, run.total_steps)
        set_learning_rate(run.optimizer, rate)
        result = train_step(run, state.step, micro_batches)
        stop = result.stop
        if result.out_of_memory:  # the same step again, in smaller parts
            state = in_smaller_parts(run, state, plan_in_force(run, state))
            continue
        state = _advanced(run, state, result, time.perf_counter() - started)
        state = _logged(run, state, result, rate)
    return state, best if best is not None else adapter_tensors(run.model)


def train_step(run: Training, step: int, micro_batches: list[MicroBatch]) -> StepResult:
    """One optimizer step on this rank's share of the global batch.

    Each rank adds up the gradients of its own micro-batches. Then a few numbers and one adapter-sized tensor are summed
    over all ranks, one of whose memory has run out taking part as well; all learn from them alike whether the step
    counts. So no rank that fails leaves another waiting, and what is not sound is never applied.

    Raises:
        UserError: a loss or gradient that is not finite (names step and rows); the weights are unchanged.
    """
    accelerator, total_weight = run.accelerator, run.plan.total_weight(step)
    _seed_other_random_operations(run, step)
    loss_sum = torch.zeros((), dtype=torch.float64, device=accelerator.device)
    finite: list[torch.Tensor] = [torch.ones(0, dtype=torch.bool, device=accelerator.device)]
    out_of_memory = False
    for micro_batch in micro_batches:
        try:
            losses = _add_gradient(run, step, micro_batch.ids, micro_batch.weights / total_weight)
        except torch.OutOfMemoryError:
            if run.sharded:  # the others are in a collective of this forward or backward
                raise UserError(f"step {step + 1}: out of memory; try a lower batch.max_tokens") from None
            out_of_memory = True
            run.optimizer.zero_grad(set_to_none=True)  # of no use now, and its memory may be wanted
            break
        loss_sum += losses.sum()
        finite.append(torch.isfinite(losses))
    broken = ~torch.cat(finite)
    votes = _summed(run, [loss_sum, broken.sum()], [out_of_memory, *run.stop.counts()])
    norm = _sum_gradients(run)
    # here, and but for fp16's scale nowhere else in a step, the host waits for the device
    mean_loss, num_broken, num_short, *signals, grad_norm = torch.cat([votes, norm.double().view(1)]).tolist()
    if num_short:
        run.optimizer.zero_grad(set_to_none=True)
        return StepResult(mean_loss, 0.0, _signal(signals), out_of_memory=True)
    if num_broken:
        ids = np.concatenate([part.ids for part in micro_batches])
        _refuse_broken_loss(run, step, ids[broken.cpu().numpy()].tolist())
    scale = run.accelerator.scaler.get_scale() if run.accelerator.scaler is not None else 1.0
    if not np.isfinite(grad_norm) and run.accelerator.scaler is None:
        _refuse_broken_gradient(run, step)
    _update(run, step, norm / scale)
    return StepResult(mean_loss, grad_norm / scale, _signal(signals))


def _add_gradient(run: Training, step: int, ids: np.ndarray, weights: np.ndarray) -> torch.Tensor:
    """Adds the gradient of a micro-batch's weighted losses to that of the parameters; these losses, [B], detached."""
    shape = shape_of(run.train.lengths[ids]) if run.graphs is not None else None
    padding = None if run.forward.packed else run.pad_token_id
    batch = collate(run.train, ids, weights, padding, run.accelerator.device, shape)

    def work(batch: Batch, layout: Layout | None = None) -> torch.Tensor:
        with run.accelerator.autocast():
            logits = run.forward(batch.inputs, batch.lengths, layout)
        losses = example_losses(logits, batch, run.config.optim.label_smoothing)
        run.accelerator.backward(losses.sum())
        return losses.detach()

    with run.dropout.micro_batch(step, batch.ids, batch.lengths):
        if run.graphs is None or shape is None:
            return work(batch)
        return run.graphs.do(work, batch, shape)[: len(ids)]


def _too_large(run: Training, ids: np.ndarray) -> bool:
    """Whether on some rank memory runs out in forward and backward of its examples; nothing else comes of it."""
    out_of_memory = False
    try:
        _add_gradient(run, 0, ids, np.zeros(len(ids)))
    except torch.OutOfMemoryError:
        out_of_memory = True
    run.optimizer.zero_grad(set_to_none=True)
    return bool(_summed(run, [], [out_of_memory]).item())


def example_losses(logits: torch.Tensor, batch: Batch, label_smoothing: float) -> torch.Tensor:
    """Weighted cross-entropy of each example, [B], in at least fp32.

    An example's weight multiplies its whole loss, the smoothed part included; `torch.nn.CrossEntropyLoss` with class
    weights would weigh the smoothed part by the weights of the other classes.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    losses = torch.nn.functional.cross_entropy(wide, batch.labels, reduction="none", label_smoothing=label_smoothing)
    return losses * batch.weights.to(losses.dtype)


def score(run: Training, state: TrainState, examples: Tokenised, name: str) -> tuple[np.ndarray, TrainState]:
    """Logits of a split with the model as it stands, float32 [N, C], on every rank; and the state, with its budget.

    Raises:
        Interrupted: some rank received a signal.
    """
    run.watch.position = f"the scoring of {name} after step {state.step}"

    def check(out_of_memory: bool) -> None:
        if out_of_memory and run.sharded:  # the others are in a collective of this forward
            raise UserError(f"out of memory while scoring {name}; try a lower batch.eval_max_tokens")
        num_short, *signals = _summed(run, [], [out_of_memory, *run.stop.counts()]).tolist()
        if num_short:
            raise OutOfMemory
        if _signal(signals):
            raise Interrupted(_signal(signals))

    while True:
        # where training must make do with less, scoring must in the same proportion
        max_tokens = run.eval_max_tokens * plan_in_force(run, state).max_tokens // run.plan.max_tokens
        try:
            logits = score_split(
                run.forward,
                examples,
                run.accelerator,
                max_tokens=max_tokens,
                pad_token_id=run.pad_token_id,
                num_labels=len(run.label_names),
                check=check,
                progress=run.log.bar_label(name),
            )
        except OutOfMemory:
            if max_tokens < examples.lengths.min():
                raise UserError(f"out of memory while scoring {name}, one example at a time") from None
            state = with_less_memory(run, state, plan_in_force(run, state).max_tokens // 2)
        else:
            return logits, state


def _due(every_steps: int | None, step: int, steps_per_epoch: int) -> bool:
    return step > 0 and step % (every_steps or steps_per_epoch) == 0


def _summed(run: Training, found: list[torch.Tensor], known: list[int]) -> torch.Tensor:
    """Sums a few numbers over all ranks: those that are on the device, and those that the host knows; float64 [n]."""
    parts = [number.double().unsqueeze(0) for number in found]
    numbers = torch.cat([*parts, on_device(np.array(known, dtype=np.float64), run.accelerator.device)])
    summed: torch.Tensor = run.accelerator.reduce(numbers, "sum")
    return summed


def _signal(counts: list[float]) -> int:
    """The signal that stops the run, from the numbers of ranks that received SIGTERM and SIGINT; 0 where none did."""
    return signal.SIGTERM if counts[0] else signal.SIGINT if counts[1] else 0


def _evaluation_due(run: Training, state: TrainState) -> bool:
    due = _due(run.config.evaluation.every_steps, state.step, run.plan.steps_per_epoch)
    return (due or state.step == run.total_steps) and state.evaluated_step < state.step


def _seed_other_random_operations(run: Training, step: int) -> None:
    """What keyed dropout does not reach is at least repeatable on the same number of processes."""
    if run.dropout.unreached:
        entropy = np.random.SeedSequence([run.config.run.seed, step, run.accelerator.process_index])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0]))


def _sum_gradients(run: Training) -> torch.Tensor:
    """Adds up the ranks' gradients, and takes the norm of the whole, times the fp16 scaler's scale where there is one.

    The losses are divided by the whole batch's weight, so the sum is its gradient. A parameter without a gradient takes
    part with 0, since its memory may have run out on this rank alone.
    """
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in run.trained.values()]
    if run.accelerator.num_processes > 1:
        total = run.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "sum")
        for gradient, part in zip(gradients, total.split([gradient.numel() for gradient in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    return torch.nn.utils.get_total_norm(gradients)


def _update(run: Training, step: int, norm: torch.Tensor) -> None:
    """Clips the summed gradient, of this norm, and applies it. On an overflow the fp16 scaler skips the step."""
    without = [name for name, p in run.trained.items() if p.grad is None]
    if without:
        raise UserError(f"step {step}: no gradient reached {without[0]} ({len(without)} of {len(run.trained)} tensors)")
    run.accelerator.unscale_gradients()
    if run.config.optim.max_grad_norm is not None:
        torch.nn.utils.clip_grads_with_norm_(run.trained.values(), run.config.optim.max_grad_norm, norm)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)


def _refuse_broken_gradient(run: Training, step: int) -> None:
    found = (n for n, p in run.trained.items() if p.grad is not None and not bool(torch.isfinite(p.grad).all()))
    worst = next(found, "all together")
    raise UserError(f"step {step}: the gradient of {worst} is not finite; try a lower optim.learning_rate")


def _refuse_broken_loss(run: Training, step: int, broken: list[int]) -> None:
    rows = sorted(set(gather_object(run.train_rows[broken].tolist())))
    shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
    raise UserError(
        f"step {step}: the loss is not finite for {len(rows)} examples: id {shown} (row of train, counted from 0)\n"
        "Nothing of this step was applied. Try a lower optim.learning_rate, or --run.precision no."
    )


def _advanced(run: Training, state: TrainState, result: StepResult, seconds: float) -> TrainState:
    step = Tally(
        loss=result.loss,
        steps=1,
        examples=len(run.plan.global_batch(state.step)),
        tokens=run.plan.num_tokens(state.step),
        padded_tokens=plan_in_force(run, state).num_padded_tokens(state.step, run.accelerator.num_processes),
        seconds=seconds,
    )
    return dataclasses.replace(
        state,
        step=state.step + 1,
        run=state.run.plus(step),
        epoch=state.epoch.plus(step),
        window=state.window.plus(step),
    )


def _logged(run: Training, state: TrainState, result: StepResult, rate: float) -> TrainState:
    """Shows the step; at a log point and at an epoch's end writes the numbers and starts the next stretch."""
    epoch, window = state.step / run.plan.steps_per_epoch, state.window
    per_second = window.examples / window.seconds
    run.log.progress(1, loss=f"{result.loss:.3f}", lr=f"{rate:.1e}", examples=f"{per_second:.0f}/s")
    if state.step % run.config.tracking.every_steps == 0:
        values = {
            "train/loss": window.loss / window.steps,
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": rate,
            "speed/examples_per_second": per_second,
            "speed/tokens_per_second": window.tokens / window.seconds,
            "speed/padding_fraction": 1 - window.tokens / window.padded_tokens,
            "memory/peak_bytes": peak_memory_bytes(run.accelerator.device),
            "memory/max_tokens": plan_in_force(run, state).max_tokens,
        }
        if run.accelerator.scaler is not None:
            values["train/loss_scale"] = run.accelerator.scaler.get_scale()
        run.log.scalars(values, state.step, epoch)
        state = dataclasses.replace(state, window=Tally())
    if state.step % run.plan.steps_per_epoch == 0:
        run.log.scalars({"train/epoch_loss": state.epoch.loss / state.epoch.steps}, state.step, epoch)
        state = dataclasses.replace(state, epoch=Tally())
    return state


def _evaluate(
    run: Training, state: TrainState, best: dict[str, torch.Tensor] | None
) -> tuple[TrainState, dict[str, torch.Tensor] | None]:
    """Scores the validation split, keeps the adapter if it is the best, counts patience."""
    if run.validation is None:
        return dataclasses.replace(state, evaluated_step=state.step), None
    logits, state = score(run, state, run.validation, "validation")
    metrics = classification_metrics(logits, run.validation.labels, run.label_names)
    value = metric_value(metrics, run.config.evaluation.metric)
    better = is_better(value, state.best_value, run.config.evaluation.metric)
    scalars = {f"validation/{name}": metrics[name] for name in METRICS}
    scalars |= {f"validation/f1/{name}": numbers["f1"] for name, numbers in metrics["per_class"].items()}
    epoch = state.step / run.plan.steps_per_epoch
    run.log.scalars(scalars, state.step, epoch)
    counts = confusion(logits, run.validation.labels, len(run.label_names))
    run.log.confusion_matrix("validation/confusion_matrix", counts, run.label_names, state.step)
    run.log.say(
        f"step {state.step:>6}  epoch {epoch:5.2f}  validation: accuracy {metrics['accuracy']:.4f}  "
        f"F1 {metrics['f1_macro']:.4f}  loss {metrics['loss']:.4f}{'  best' if better else ''}"
    )
    state = dataclasses.replace(state, evaluated_step=state.step)
    if better:
        state = dataclasses.replace(state, best_step=state.step, best_value=value, num_worse=0)
        return state, adapter_tensors(run.model)
    state = dataclasses.replace(state, num_worse=state.num_worse + 1)
    return dataclasses.replace(state, stopped=state.num_worse == run.config.evaluation.patience), best

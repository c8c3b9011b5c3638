"""The training loop: steps, and what falls due between them. What a step is stands in step.py.

Always holds: everything a step does is a function of (configuration, data, step) and of the state (adapter, optimizer,
scaler, `TrainState`). So resuming is an index, and the number of processes and the cut into micro-batches change who
computes what, never what is computed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque

import numpy as np
import torch

from trainer.batching.plan import Tokenised
from trainer.compat import peak_memory_bytes
from trainer.errors import UserError
from trainer.model.adapter import adapter_tensors
from trainer.tasks import TASKS
from trainer.tasks.task import is_better, measure, metric_value
from trainer.training.memory import fit, in_smaller_parts, plan_in_force, with_less_memory
from trainer.training.optim import learning_rate, set_learning_rate
from trainer.training.scoring import score_split
from trainer.training.state import Tally, Training, TrainState, save_state
from trainer.training.step import StepInFlight, StepResult, result_of, signal_of, summed, too_large, train_step

# Steps that are asked for before the numbers of the first are read: so a GPU has the next one to do while they are on
# their way. A CPU has done a step when it was asked for.
IN_FLIGHT, IN_FLIGHT_ON_GPU = 1, 2


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
        state = fit(run, state, functools.partial(too_large, run))
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
        state, stop = train_until(run, state, _next_due(run, state.step))
    return state, best if best is not None else adapter_tensors(run.model)


def train_until(run: Training, state: TrainState, end: int) -> tuple[TrainState, int]:
    """Trains from `state` up to step `end`; less far where a signal comes, or memory runs out and the state has less.

    Returns:
        the state, of which nothing is in flight, and the number of the signal or 0.

    Raises:
        UserError: a loss or gradient that is not finite; the weights are those of the step before.
    """
    flying: deque[StepInFlight] = deque()
    most = IN_FLIGHT if run.accelerator.device.type == "cpu" else IN_FLIGHT_ON_GPU
    since = time.perf_counter()
    while True:
        while len(flying) < most and (step := state.step + len(flying)) < end:
            flying.append(_asked_for(run, state, step, flying[-1] if flying else None))
        if not flying:
            return state, 0
        result = result_of(run, flying.popleft())
        if flying and (result.stop or result.out_of_memory):  # what is behind it changes nothing, but must be over
            flying[-1].numbers()
        if result.out_of_memory:  # the same step again, in smaller parts
            return in_smaller_parts(run, state, plan_in_force(run, state)), result.stop
        now = time.perf_counter()
        state = _logged(run, _advanced(run, state, result, now - since), result)
        since = now
        if result.stop:
            return state, result.stop


def _asked_for(run: Training, state: TrainState, step: int, before: StepInFlight | None) -> StepInFlight:
    run.watch.position = f"step {step + 1}"
    set_learning_rate(run.optimizer, learning_rate(run.config.optim, step, run.total_steps))
    ranks = run.accelerator.process_index, run.accelerator.num_processes
    return train_step(run, step, plan_in_force(run, state).micro_batches(step, *ranks), before)


def score(run: Training, state: TrainState, examples: Tokenised, name: str) -> tuple[np.ndarray, TrainState]:
    """Logits of a split with the model as it stands, float32 [N, C], on every rank; and the state, with its budget.

    Raises:
        Interrupted: some rank received a signal.
    """
    run.watch.position = f"the scoring of {name} after step {state.step}"

    def check(out_of_memory: bool) -> None:
        if out_of_memory and run.sharded:  # the others are in a collective of this forward
            raise UserError(f"out of memory while scoring {name}; try a lower batch.eval_max_tokens")
        num_short, *signals = summed(run, [], [out_of_memory, *run.stop.counts()]).tolist()
        if num_short:
            raise OutOfMemory
        if signal_of(signals):
            raise Interrupted(signal_of(signals))

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


def _next_due(run: Training, step: int) -> int:
    """The first step after this one at which there is more to do than to train."""
    every = (run.config.evaluation.every_steps, run.config.checkpoint.every_steps)
    spans = [steps or run.plan.steps_per_epoch for steps in every]
    return min(run.total_steps, *(span * (step // span + 1) for span in spans))


def _evaluation_due(run: Training, state: TrainState) -> bool:
    due = _due(run.config.evaluation.every_steps, state.step, run.plan.steps_per_epoch)
    return (due or state.step == run.total_steps) and state.evaluated_step < state.step


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


def _logged(run: Training, state: TrainState, result: StepResult) -> TrainState:
    """Shows the step; at a log point and at an epoch's end writes the numbers and starts the next stretch."""
    epoch, window = state.step / run.plan.steps_per_epoch, state.window
    rate = learning_rate(run.config.optim, state.step - 1, run.total_steps)
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
        if result.loss_scale is not None:
            values["train/loss_scale"] = result.loss_scale
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
    task, metric, targets = TASKS[run.config.task.type], run.config.evaluation.metric, run.validation.labels
    metrics = measure(task, logits, targets, run.label_names)
    value = metric_value(metrics, metric)
    better = is_better(task, metric, value, state.best_value)
    scalars = {f"validation/{name}": metrics[name] for name in task.metrics}
    scalars |= {f"validation/f1/{name}": numbers["f1"] for name, numbers in metrics["per_class"].items()}
    epoch = state.step / run.plan.steps_per_epoch
    run.log.scalars(scalars, state.step, epoch)
    if task.confusion is not None:
        counts = task.confusion(logits, targets)
        run.log.confusion_matrix("validation/confusion_matrix", counts, run.label_names, state.step)
    shown = "  ".join(f"{name} {metrics[name]:.4f}" for name in task.headline)
    run.log.say(f"step {state.step:>6}  epoch {epoch:5.2f}  validation: {shown}{'  best' if better else ''}")
    state = dataclasses.replace(state, evaluated_step=state.step)
    if better:
        state = dataclasses.replace(state, best_step=state.step, best_value=value, num_worse=0)
        return state, adapter_tensors(run.model)
    num_worse, patience = state.num_worse + 1, run.config.evaluation.patience
    if num_worse == patience:
        run.log.say(
            f"early stopping at step {state.step}: evaluation.patience {patience} is used up; the best "
            f"{metric} is {state.best_value:.4f}, of step {state.best_step}"
        )
    return dataclasses.replace(state, num_worse=num_worse, stopped=num_worse == patience), best

"""The training loop: steps, and what is due between them. step.py has the step.

Always holds: everything that a step does is a function of (configuration, data, step) and of the state (adapter,
optimizer, scaler, `TrainState`). So a resumed run replays nothing. The number of processes and the cut into
micro-batches change who computes what, never what is computed.
"""

from __future__ import annotations

import dataclasses
import time

import torch

from trainer.batching.plan import Plan
from trainer.compat import peak_memory_bytes
from trainer.errors import UserError
from trainer.model.adapter import adapter_tensors
from trainer.training.checkpoint import save_checkpoint
from trainer.training.optim import learning_rate, set_learning_rate
from trainer.training.records import Run, current_plan
from trainer.training.scoring import Stopped, evaluate
from trainer.training.state import Tally, TrainState
from trainer.training.step import StepResult, train_step


def train(
    run: Run, state: TrainState, best: dict[str, torch.Tensor] | None
) -> tuple[TrainState, dict[str, torch.Tensor]]:
    """Trains from `state` to the end.

    Returns:
        the final state, and the best adapter: by validation, or the last one without a validation split.

    Raises:
        Stopped: a signal came; the state is saved.
        UserError: a loss or gradient is not finite, or a checkpoint cannot be written.
    """
    rank, world_size = run.learner.accelerator.process_index, run.learner.accelerator.num_processes
    signal, saved = 0, (state.step, state.evaluated_step)
    while True:
        if not signal and is_evaluation_due(run, state):
            try:
                state, best = evaluate(run, state, best)
            except Stopped as stopped:
                signal = stopped.signal
        is_last = state.step == run.total_steps or state.stopped_early
        if (is_last or signal or is_save_due(run, state)) and saved != (state.step, state.evaluated_step):
            save_checkpoint(run, state, best)
            saved = (state.step, state.evaluated_step)
        if signal:
            raise Stopped(signal, state.step)
        if is_last:
            return state, best if best is not None else adapter_tensors(run.learner.model)
        plan, started = current_plan(run, state), time.perf_counter()
        rate = learning_rate(run.learner.optim_config, state.step, run.total_steps)
        set_learning_rate(run.learner.optimizer, rate)
        result = train_step(run, state.step, plan.micro_batches(state.step, rank, world_size))
        signal = result.stop
        if result.out_of_memory:  # the same step follows, in smaller micro-batches
            state = shrink_token_budget(run, state, plan)
            continue
        state = count_step(run, state, plan, result, time.perf_counter() - started)
        log_step(run, state, plan, result, rate)
        state = reset_tallies(run, state)


def shrink_token_budget(run: Run, state: TrainState, plan: Plan) -> TrainState:
    """Sets the budget to half of the largest micro-batch that the plan has for this step.

    Raises:
        UserError: that micro-batch has a single example.
    """
    num_tokens, num_examples = max(plan.sizes(state.step, run.learner.accelerator.num_processes))
    if num_examples == 1:
        fewer = "data.long_documents cut" if num_tokens > plan.window_length else "a lower data.max_length"
        raise UserError(
            f"step {state.step + 1}: out of memory with a single example of {num_tokens} tokens; {fewer} or "
            "run.precision bf16 needs less"
        )
    max_tokens = num_tokens // 2
    run.log.print_line(f"step {state.step + 1}: out of memory; continuing with at most {max_tokens:,} tokens at a time")
    if run.learner.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return dataclasses.replace(state, max_tokens=max_tokens)


def is_evaluation_due(run: Run, state: TrainState) -> bool:
    """Whether the validation split is to be scored now."""
    due = is_due(run, run.config.evaluation.every_steps, state.step) or state.step == run.total_steps
    return due and state.evaluated_step < state.step


def is_save_due(run: Run, state: TrainState) -> bool:
    """Whether a checkpoint is to be written now."""
    return is_due(run, run.config.checkpoint.every_steps, state.step)


def is_due(run: Run, every_steps: int | None, step: int) -> bool:
    """Whether `step` is a multiple of `every_steps`, or of the steps of an epoch if that is None."""
    return step > 0 and step % (every_steps or run.plan.steps_per_epoch) == 0


def count_step(run: Run, state: TrainState, plan: Plan, result: StepResult, seconds: float) -> TrainState:
    """Adds a finished step to the tallies."""
    sizes = plan.sizes(state.step, run.learner.accelerator.num_processes)
    step = Tally(
        loss=result.loss,
        steps=1,
        examples=len(plan.global_batch(state.step)),
        tokens=plan.num_tokens(state.step),
        padded_tokens=sum(tokens for tokens, _ in sizes),
        seconds=seconds,
    )
    return dataclasses.replace(
        state,
        step=state.step + 1,
        total=state.total.plus(step),
        epoch=state.epoch.plus(step),
        window=state.window.plus(step),
    )


def log_step(run: Run, state: TrainState, plan: Plan, result: StepResult, rate: float) -> None:
    """Moves the progress bar; writes the values of a log point and of a finished epoch; `rate` is the step's."""
    epoch, window, log = state.step / run.plan.steps_per_epoch, state.window, run.log
    per_second = window.examples / window.seconds
    log.advance_bar(1, loss=f"{result.loss:.3f}", lr=f"{rate:.1e}", examples=f"{per_second:.0f}/s")
    if is_due(run, run.config.tracking.every_steps, state.step):
        values = {
            "train/loss": window.loss / window.steps,
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": rate,
            "speed/examples_per_second": per_second,
            "speed/tokens_per_second": window.tokens / window.seconds,
            "speed/padding_fraction": 1 - window.tokens / window.padded_tokens,
            "memory/peak_bytes": peak_memory_bytes(run.learner.accelerator.device),
            "memory/max_tokens": plan.max_tokens,
        }
        if result.loss_scale is not None:
            values["train/loss_scale"] = result.loss_scale
        log.log_scalars(values, state.step, epoch)
    if is_due(run, None, state.step):
        log.log_scalars({"train/epoch_loss": state.epoch.loss / state.epoch.steps}, state.step, epoch)


def reset_tallies(run: Run, state: TrainState) -> TrainState:
    """Starts new tallies after a log point and after an epoch."""
    if is_due(run, run.config.tracking.every_steps, state.step):
        state = dataclasses.replace(state, window=Tally())
    if is_due(run, None, state.step):
        state = dataclasses.replace(state, epoch=Tally())
    return state

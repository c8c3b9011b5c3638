"""The token budget when memory runs out: lower than configured, and equal on all ranks.

Always holds: the budget changes how a step is cut into micro-batches, and never what is trained.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from trainer.batching.plan import Plan, num_positions
from trainer.errors import UserError
from trainer.training.records import Run
from trainer.training.state import TrainState
from trainer.training.step import exceeds_memory


def current_plan(run: Run, state: TrainState) -> Plan:
    """The plan with the token budget that memory allows."""
    return dataclasses.replace(run.plan, max_tokens=state.max_tokens or run.plan.max_tokens)


def has_open_budget(run: Run) -> bool:
    """Whether the token budget is not configured and must be found: on a GPU, unless weights are sharded."""
    on_gpu = run.learner.accelerator.device.type != "cpu"
    return on_gpu and run.config.batch.max_tokens is None and not run.learner.sharded


def fit_token_budget(run: Run, state: TrainState) -> TrainState:
    """Halves the token budget until a batch of the longest examples fits, so that steps seldom run out of memory.

    Raises:
        UserError: memory does not hold a single example.
    """
    size = min(run.plan.batch_size, len(run.plan.lengths))
    longest = np.argpartition(run.plan.lengths, -size)[-size:]
    rank, world_size = run.learner.accelerator.process_index, run.learner.accelerator.num_processes
    run.watch.position = "the search for batch.max_tokens"
    while True:
        plan = current_plan(run, state)
        batch = dataclasses.replace(plan, lengths=plan.lengths[longest], weights=np.zeros(size))
        parts = batch.micro_batches(0, rank, world_size)
        largest = max(parts, key=lambda part: num_positions(batch.lengths[part.ids], batch.packed))
        if not exceeds_memory(run, longest[largest.ids]):
            if len(parts) == 1:
                return state
            return dataclasses.replace(state, max_tokens=batch.largest(0, world_size)[1])
        state = shrink_token_budget(run, state, batch)


def shrink_token_budget(run: Run, state: TrainState, plan: Plan) -> TrainState:
    """Sets the budget to half of the largest micro-batch that the plan has for this step.

    Raises:
        UserError: that micro-batch has a single example.
    """
    num_examples, num_tokens = plan.largest(state.step, run.learner.accelerator.num_processes)
    if num_examples == 1:
        raise UserError(
            f"step {state.step + 1}: out of memory with a single example of {num_tokens} tokens; a lower "
            "data.max_length or run.precision bf16 needs less"
        )
    return set_token_budget(run, state, num_tokens // 2)


def set_token_budget(run: Run, state: TrainState, max_tokens: int) -> TrainState:
    """Sets this budget and tells the user."""
    run.log.print_line(f"step {state.step}: out of memory; continuing with at most {max_tokens:,} tokens at a time")
    if run.learner.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return dataclasses.replace(state, max_tokens=max(1, max_tokens))

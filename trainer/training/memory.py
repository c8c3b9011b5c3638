"""How many tokens are computed at once, where memory runs out: less than the plan has, on all ranks alike.

Always holds: this changes how a step is cut into micro-batches, and never what is trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch

from trainer.batching.plan import Plan, num_positions
from trainer.errors import UserError
from trainer.training.state import Training, TrainState


def plan_in_force(run: Training, state: TrainState) -> Plan:
    """The plan, with the token budget that memory allows."""
    return dataclasses.replace(run.plan, max_tokens=state.max_tokens or run.plan.max_tokens)


def fit(run: Training, state: TrainState, too_large: Callable[[np.ndarray], bool]) -> TrainState:
    """The state, with a token budget that memory holds for a batch of the run's longest examples.

    It is halved until it does, so that training seldom meets what does not fit; a step that does tries again with less.

    Args:
        run: what is about to train.
        state: where it stands.
        too_large: whether on some rank memory does not hold its micro-batch, example ids [B].

    Raises:
        UserError: memory does not hold a single example.
    """
    size = min(run.plan.batch_size, len(run.plan.lengths))
    longest = np.argpartition(run.plan.lengths, -size)[-size:]
    run.watch.position = "the search for batch.max_tokens"
    while True:
        plan = plan_in_force(run, state)
        batch = dataclasses.replace(plan, lengths=plan.lengths[longest], weights=np.zeros(size))
        parts = batch.micro_batches(0, run.accelerator.process_index, run.accelerator.num_processes)
        largest = max(parts, key=lambda part: num_positions(batch.lengths[part.ids], batch.packed))
        if not too_large(longest[largest.ids]):
            if len(parts) == 1:
                return state
            return dataclasses.replace(state, max_tokens=batch.largest(0, run.accelerator.num_processes)[1])
        state = in_smaller_parts(run, state, batch)


def in_smaller_parts(run: Training, state: TrainState, plan: Plan) -> TrainState:
    """The state, with half of the tokens of the largest micro-batch that the plan has for this step as the budget.

    Raises:
        UserError: it holds one example.
    """
    num_examples, num_tokens = plan.largest(state.step, run.accelerator.num_processes)
    if num_examples == 1:
        raise UserError(
            f"step {state.step + 1}: out of memory with a single example of {num_tokens} tokens; a lower "
            "data.max_length or run.precision bf16 needs less"
        )
    return with_less_memory(run, state, num_tokens // 2)


def with_less_memory(run: Training, state: TrainState, max_tokens: int) -> TrainState:
    """The state, with this budget; tells the user."""
    run.log.say(f"step {state.step}: out of memory; going on with at most {max_tokens:,} tokens at a time")
    if run.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return dataclasses.replace(state, max_tokens=max(1, max_tokens))

"""The token budget when memory runs out: lower than configured, and equal on all ranks.

Always holds: the budget changes how a step is cut into micro-batches, and never what is trained.
"""

from __future__ import annotations

import dataclasses

import torch

from trainer.batching.plan import Plan
from trainer.errors import UserError
from trainer.training.records import Run
from trainer.training.state import TrainState


def current_plan(run: Run, state: TrainState) -> Plan:
    """The plan with the token budget that memory allows."""
    return dataclasses.replace(run.plan, max_tokens=state.max_tokens or run.plan.max_tokens)


def shrink_token_budget(run: Run, state: TrainState, plan: Plan) -> TrainState:
    """Sets the budget to half of the largest micro-batch that the plan has for this step.

    Raises:
        UserError: that micro-batch has a single example.
    """
    num_tokens, num_examples = max(plan.sizes(state.step, run.learner.accelerator.num_processes))
    if num_examples == 1:
        raise UserError(
            f"step {state.step + 1}: out of memory with a single example of {num_tokens} tokens; a lower "
            "data.max_length or run.precision bf16 needs less"
        )
    max_tokens = num_tokens // 2
    run.log.print_line(f"step {state.step}: out of memory; continuing with at most {max_tokens:,} tokens at a time")
    if run.learner.accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    return dataclasses.replace(state, max_tokens=max_tokens)

"""The parts of a run: what it trains on and what trains. setup.py builds them.

Always holds: nothing in them changes during a run but the contents of tensors. What changes is in `TrainState`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel

from trainer.batching.plan import Plan
from trainer.config.schema import Config, OptimConfig, PeftConfig
from trainer.data.corpus import Corpus
from trainer.data.tokens import Examples
from trainer.distributed.session import StopRequest
from trainer.distributed.watch import Watch
from trainer.dropout.sites import DropoutKeys
from trainer.model.adapter import SavedAdapter
from trainer.model.backbone import Backbone
from trainer.packed.forward import Forward
from trainer.reporting.tracking import RunLog
from trainer.tasks.task import Losses, Task
from trainer.training.state import TrainState


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and starts from, before any weight is loaded."""

    corpus: Corpus
    examples: dict[str, Examples]
    """the corpus in tokens, by split"""
    backbone: Backbone
    peft: PeftConfig
    """the options of the adapter, with the rank that fits the budget"""
    start: SavedAdapter | None
    """the adapter it starts from; None = a new one"""
    fingerprints: dict[str, str]
    """of data and backbone; a checkpoint with others is refused"""


@dataclass(frozen=True)
class Learner:
    """What trains, on its device."""

    accelerator: Accelerator
    model: PeftModel
    """each rank has all of it, or its shard of the frozen weights"""
    forward: Forward
    """how the model computes a batch: padded or packed"""
    optimizer: Any
    """prepared by the accelerator"""
    parameters: dict[str, torch.nn.Parameter]
    """those that train, by name, in the optimizer's order"""
    start: dict[str, torch.Tensor] | None
    """adapter and head before step 1, if the adapter took a part of the backbone (PiSSA, OLoRA)"""
    dropout: DropoutKeys
    task: Task
    losses: Losses
    """of the task, with the options of the configuration"""
    optim_config: OptimConfig
    sharded: bool
    """the frozen weights are sharded over the ranks, so each forward is a collective"""
    notes: list[str]
    """what the user should know of the model, a line each"""


@dataclass(frozen=True)
class Run:
    """A run: its parts, its length, and how it reports and stops."""

    config: Config
    folder: Path
    inputs: Inputs
    learner: Learner
    log: RunLog
    stop: StopRequest
    """whether this process received a signal"""
    watch: Watch
    """whether the other ranks are alive"""
    plan: Plan
    """of every step, with the token budget as configured"""
    total_steps: int
    eval_max_tokens: int
    """token budget of a batch that is scored"""


def current_plan(run: Run, state: TrainState) -> Plan:
    """The plan with the token budget that memory allows; the budget never changes what is trained."""
    return dataclasses.replace(run.plan, max_tokens=state.max_tokens or run.plan.max_tokens)

"""Where a run stands and what it trains with; saving and restoring the one into the other.

Always holds: `TrainState`, adapter, optimizer and scaler are all that a checkpoint needs; everything else of a run is a
function of (configuration, data, step).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from peft import PeftModel

from trainer.batching.plan import Plan, Tokenised
from trainer.config.schema import Config, as_dict
from trainer.distributed.session import StopRequest
from trainer.distributed.watch import Watch
from trainer.dropout.sites import DropoutKeys
from trainer.errors import UserError
from trainer.model.adapter import adapter_config_json, adapter_tensors, load_adapter_tensors
from trainer.model.identity import Identity
from trainer.packed.forward import Forward
from trainer.reporting.tracking import RunLog
from trainer.training.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)


@dataclass(frozen=True)
class Tally:
    """Sums over a stretch of steps and all processes; divided once, when they are shown."""

    loss: float = 0.0
    """of the steps' mean losses"""
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    """without padding"""
    padded_tokens: int = 0
    """positions computed, padding included"""
    seconds: float = 0.0
    """in steps, without evaluation and saving"""

    def plus(self, other: Tally) -> Tally:
        """Both stretches together."""
        return Tally(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class TrainState:
    """Where a run stands. Adapter, optimizer and scaler besides, it is all a checkpoint needs."""

    step: int = 0
    """optimizer steps done"""
    evaluated_step: int = 0
    """step of the last finished evaluation"""
    best_step: int = 0
    best_value: float | None = None
    """the metric at best_step"""
    num_worse: int = 0
    """evaluations since best_step"""
    stopped: bool = False
    """patience ran out"""
    max_tokens: int | None = None
    """tokens of a micro-batch since memory ran out; None = as configured"""
    run: Tally = Tally()
    """since the run began"""
    epoch: Tally = Tally()
    """since the epoch began"""
    window: Tally = Tally()
    """since the last log point"""
    resumed_from: tuple[int, ...] = ()
    world_sizes: tuple[int, ...] = ()
    """processes of each start, in order"""


@dataclass(frozen=True)
class Training:
    """What a run trains with; nothing here changes while it runs but the tensors."""

    config: Config
    folder: Path
    accelerator: Accelerator
    model: PeftModel
    """on its device, its forward under autocast; of several ranks each has all of it, or a share of what is frozen"""
    forward: Forward
    """how the model computes a batch: padded or packed"""
    optimizer: Any
    """the prepared optimizer"""
    trained: dict[str, torch.nn.Parameter]
    """the parameters that train, by name, in the optimizer's order"""
    dropout: DropoutKeys
    plan: Plan
    train: Tokenised
    train_rows: np.ndarray
    """row of each training example in its source, counted from 0, int64 [N]"""
    validation: Tokenised | None
    label_names: list[str]
    pad_token_id: int
    total_steps: int
    eval_max_tokens: int
    fingerprints: dict[str, str]
    """of data and backbone; a checkpoint of others is refused"""
    backbone: Identity
    log: RunLog
    stop: StopRequest
    watch: Watch
    sharded: bool
    """the frozen weights are shared out over the ranks, so that a forward needs all of them"""
    tries_memory: bool
    """the token budget is to be found before the first step"""
    notes: tuple[str, ...]
    """what the user should know of how it will train"""


def save_state(run: Training, state: TrainState, best: dict[str, torch.Tensor] | None) -> None:
    """Writes a checkpoint from the main process; an error there stops every rank."""
    run.watch.position = f"the save of step {state.step}"
    failure = ""
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        checkpoint = Checkpoint(
            step=state.step,
            adapter=adapter_tensors(run.model),
            best_adapter=best,
            optimizer=optimizer_tensors(run.optimizer.optimizer, list(run.trained)),
            state={
                "train": dataclasses.asdict(state),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "fingerprints": run.fingerprints,
                "backbone": dataclasses.asdict(run.backbone),
                "budgets": [run.plan.max_tokens, run.eval_max_tokens],
                "config": as_dict(run.config),
            },
            adapter_config=adapter_config_json(run.model),
        )
        try:
            save_checkpoint(run.folder / "checkpoints", checkpoint, run.config.checkpoint.keep_last)
        except OSError as error:
            failure = str(error)
    failures = [text for text in gather_object([failure]) if text]
    if failures:
        raise UserError(failures[0])


def restore(run: Training, checkpoint: Checkpoint) -> TrainState:
    """Puts model, optimizer and scaler where the checkpoint left them.

    Raises:
        UserError: the checkpoint is of other data or another backbone, or does not fit the model.
    """
    state = checkpoint.state
    for what in dict.fromkeys([*run.fingerprints, *state["fingerprints"]]):
        if (what, state["fingerprints"].get(what)) == ("backbone", "None"):  # so were hub models once recorded
            run.log.say(f"warning: whether {run.backbone} is the backbone this run began with is not verified")
        elif what == "draw format" and state["fingerprints"].get(what) != run.fingerprints[what]:
            raise UserError(
                f"{run.folder} was begun by a version that draws other dropout masks; finish it with that version, or "
                "start a new run: --run.name NAME"
            )
        elif state["fingerprints"].get(what) != run.fingerprints.get(what):
            hint = " (texts, labels, or tokens of another tokenizer)" if what.endswith(" split") else ""
            raise UserError(
                f"{run.folder} was begun with another {what}{hint}; restore that, or start a new run: --run.name NAME"
            )
    load_adapter_tensors(run.model, checkpoint.adapter, str(run.folder))
    try:
        load_optimizer_tensors(run.optimizer.optimizer, list(run.trained), checkpoint.optimizer)
    except DamagedCheckpoint as error:
        raise UserError(f"{run.folder}: the checkpoint of step {checkpoint.step} does not fit: {error}") from None
    if run.accelerator.scaler is not None and state["scaler"] is not None:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    restored = _state_from_json(state["train"])
    if state["budgets"] != [run.plan.max_tokens, run.eval_max_tokens]:  # the user has changed them
        restored = dataclasses.replace(restored, max_tokens=None)
    return dataclasses.replace(restored, resumed_from=(*restored.resumed_from, restored.step))


def _state_from_json(values: dict[str, Any]) -> TrainState:
    tallies = {name: Tally(**values[name]) for name in ("run", "epoch", "window")}
    lists = {name: tuple(values[name]) for name in ("resumed_from", "world_sizes")}
    return TrainState(**{**values, **tallies, **lists})

"""How far a run has come: the numbers that a checkpoint holds beside the tensors.

Always holds: `TrainState`, adapter, best adapter, optimizer and scaler are all that a checkpoint needs. Everything else
of a run is a pure function of (configuration, data, step).

To add a field: add it to `TrainState` with a default, raise `STATE_VERSION`, and fill it in `migrate`. JSON has neither
tuples nor tallies: `state_from_json` turns them back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError

STATE_VERSION = 2


@dataclass(frozen=True)
class Tally:
    """Sums over several steps and all processes; divided only when they are shown."""

    loss: float = 0.0
    """sum of the steps' mean losses"""
    steps: int = 0
    examples: int = 0
    tokens: int = 0
    """without padding"""
    padded_tokens: int = 0
    """with padding"""
    seconds: float = 0.0
    """in steps, without evaluation and saving"""

    def plus(self, other: Tally) -> Tally:
        """The sum of both."""
        return Tally(*(mine + others for mine, others in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class TrainState:
    """How far a run has come."""

    version: int = STATE_VERSION
    step: int = 0
    """optimizer steps done"""
    evaluated_step: int = 0
    """step of the last finished evaluation"""
    best_step: int = 0
    best_value: float | None = None
    """the metric at best_step"""
    num_worse: int = 0
    """evaluations since best_step"""
    stopped_early: bool = False
    """the patience is used up"""
    max_tokens: int | None = None
    """token budget of a micro-batch after memory ran out; None = the configured one"""
    total: Tally = Tally()
    """since the run began"""
    epoch: Tally = Tally()
    """since the epoch began"""
    window: Tally = Tally()
    """since the last log point"""
    resumed_from: tuple[int, ...] = ()
    """step of each resume, in order"""
    world_sizes: tuple[int, ...] = ()
    """processes of each start, in order"""


def migrate(values: dict[str, Any]) -> dict[str, Any]:
    """Turns the fields of an older version's state into those of this version.

    Raises:
        UserError: a newer version wrote them.
    """
    version = values.get("version", 1)
    if version > STATE_VERSION:
        raise UserError(
            f"its state has version {version}, and this Isotrain reads up to {STATE_VERSION}. "
            "Update Isotrain, or start a new run: --run.name NAME"
        )
    if version == 1:  # it had no version
        new_names = {"run": "total", "stopped": "stopped_early"}
        values = {new_names.get(name, name): value for name, value in values.items()}
    return {**values, "version": STATE_VERSION}


def state_from_json(values: dict[str, Any]) -> TrainState:
    """Reads what `dataclasses.asdict` made of a state, of this version or an older one.

    Raises:
        UserError: a newer version wrote it, or its fields are not those of its version.
    """
    values = migrate(values)
    expected = {field.name for field in dataclasses.fields(TrainState)}
    if differing := sorted(expected ^ values.keys()):
        raise UserError(
            f"its state does not match version {STATE_VERSION}: missing or unknown fields {', '.join(differing)}. "
            "Start a new run: --run.name NAME"
        )
    tallies = {name: Tally(**values[name]) for name in ("total", "epoch", "window")}
    tuples = {name: tuple(values[name]) for name in ("resumed_from", "world_sizes")}
    return TrainState(**{**values, **tallies, **tuples})

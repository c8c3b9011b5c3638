"""The state of a run survives a checkpoint; one of an older version is migrated, and any other is refused."""

import dataclasses
import json

import pytest

from tests.harness.commands import ROOT
from trainer.errors import UserError
from trainer.training.state import STATE_VERSION, Tally, TrainState, state_from_json

# written by commit 702606d, when a state had no version
VERSION_1 = ROOT / "tests/contracts/old_runs/unfinished/checkpoints/step-00000012/trainer_state.json"
STATE = TrainState(
    step=7, best_step=4, best_value=0.25, stopped_early=True, total=Tally(1.5, 7, 50, 400, 410, 2.0), world_sizes=(1, 2)
)


def saved(state):
    return json.loads(json.dumps(dataclasses.asdict(state)))


def test_a_saved_state_is_read_again():
    assert state_from_json(saved(STATE)) == STATE
    assert saved(STATE)["version"] == STATE_VERSION


def test_a_state_of_version_1_is_migrated():
    old = json.loads(VERSION_1.read_text())["train"]
    assert "version" not in old
    state = state_from_json(old)
    assert (state.version, state.step, state.best_value) == (STATE_VERSION, 12, old["best_value"])
    assert state.total == Tally(**old["run"]) and state.window == Tally(**old["window"])
    assert state.stopped_early is False and state.world_sizes == (1,)
    assert state_from_json({**old, "stopped": True}).stopped_early is True


def test_a_state_of_a_newer_version_is_refused():
    newer = {**saved(STATE), "version": STATE_VERSION + 1, "mood": "good"}
    with pytest.raises(
        UserError, match=rf"version {STATE_VERSION + 1}.* up to {STATE_VERSION}.*--run\.name"
    ) as refusal:
        state_from_json(newer)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("version", [1, STATE_VERSION])
def test_a_field_more_or_less_is_refused(version):
    values = json.loads(VERSION_1.read_text())["train"] if version == 1 else saved(STATE)
    less = {name: value for name, value in values.items() if name != "step"}
    for name, other in (("mood", {**values, "mood": "good"}), ("step", less)):
        with pytest.raises(UserError, match=rf"missing or unknown.*{name}.*--run\.name") as refusal:
            state_from_json(other)
        assert "\n" not in str(refusal.value)

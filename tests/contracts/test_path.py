"""The path from the command line to `backward`: five functions in at most four files, in this order."""

import traceback
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from tests.harness.commands import ROOT
from trainer.run import main

PATH = ["main", "train_and_report", "train", "train_step", "add_gradient"]


class Reached(Exception):
    """The first micro-batch's backward was called."""


def test_the_path_from_the_command_line_to_backward(tiny_arguments, monkeypatch):
    frames = []

    def backward(self, loss):
        frames.extend(traceback.extract_stack())
        raise Reached

    monkeypatch.setattr(Accelerator, "backward", backward)
    monkeypatch.setattr("trainer.training.pipeline.StopRequest.listen", lambda _: None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    try:
        with pytest.raises(Reached):
            main([*tiny_arguments, "--run.quiet", "true"])
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT / "trainer")]
    assert [frame.name for frame in ours] == PATH
    assert len({frame.filename for frame in ours}) <= 4

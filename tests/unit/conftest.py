"""Fixtures of several unit tests."""

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState


@pytest.fixture
def unlaunched(monkeypatch):
    """As in a process that no launcher started, without a GPU; gives the monkeypatch."""
    for name in (
        "WORLD_SIZE",
        "RANK",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "ISOTRAIN_NUM_PROCESSES",
        "ACCELERATE_MIXED_PRECISION",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    yield monkeypatch
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of its own for a test: the folder that ours is in."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder / "isotrain"

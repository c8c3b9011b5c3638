"""Work that is recorded once and replayed: what goes wrong is seen, and what came before is kept."""

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from ranks import CpuRecorder

from tests.parity.test_packed import build
from trainer import graphs
from trainer.batching import collate, shape_of
from trainer.config import UserError
from trainer.graphs import Graphs
from trainer.packed import PackedForward
from trainer.tokenising import Examples

LENGTHS = np.array([13, 11, 9, 4, 4, 1, 12, 12, 7, 5, 3])
SMALL, OTHER, LARGE = [0, 1, 2], [3, 4, 5, 6], [2, 3, 4, 5, 6, 7, 8, 9, 10]
EXAMPLES = Examples(
    tokens=np.random.default_rng(0).integers(3, 60, LENGTHS.sum()),
    offsets=np.concatenate([[0], LENGTHS.cumsum()]),
    token_types=None,
    labels=np.arange(len(LENGTHS)) % 3,
    lengths=LENGTHS,
)


class Model:
    """A tiny model, whose work on a micro-batch can be recorded; counts the recordings of each shape."""

    def __init__(self, recorder=CpuRecorder):
        model, self.keys = build()
        self.forward = PackedForward(model, self.keys)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.recordings = Counter()

        class Counted(recorder):
            def record(counted, work):
                self.recordings[self.shape] += 1
                return super().record(work)

        self.graphs = Graphs(self.forward, self.keys, self.parameters, contextlib.nullcontext, Counted)

    def work(self, batch, layout=None):
        losses = torch.nn.functional.cross_entropy(
            self.forward(batch.inputs, batch.lengths, layout), batch.labels, reduction="none"
        )
        losses = losses * batch.weights
        losses.sum().backward()
        return losses.detach()

    def add(self, ids, recorded=True):
        """Adds the gradient of these examples; their losses."""
        shape = self.shape = shape_of(LENGTHS[ids]) if recorded else None
        weights = 1 + np.arange(len(ids)) / 10
        batch = collate(EXAMPLES, np.array(ids), weights, None, torch.device("cpu"), shape)
        with self.keys.micro_batch(2, batch.ids, batch.lengths):
            return (self.graphs.do(self.work, batch, shape) if recorded else self.work(batch))[: len(ids)].clone()

    def gradient(self):
        gradient = torch.cat([parameter.grad.flatten() for parameter in self.parameters])
        for parameter in self.parameters:
            parameter.grad = None
        return gradient


@pytest.fixture
def plain():
    """The gradient that micro-batches add up to."""
    model = Model()

    def add(*parts):
        losses = [model.add(ids, recorded=False) for ids in parts]
        return losses, model.gradient()

    return add


def assert_same(model, plain, *parts):
    """`parts`: examples of each micro-batch, and whether it is recorded."""
    expected_losses, expected = plain(*(ids for ids, _ in parts))
    losses = [model.add(*part) for part in parts]
    for found, wanted in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert expected.norm() > 0.1
    torch.testing.assert_close(model.gradient(), expected, rtol=1e-10, atol=1e-12)


def test_recorded_ones_and_others_add_up_in_any_order(plain):
    model = Model()
    for _ in range(2):
        assert_same(model, plain, (SMALL, True))
        assert_same(model, plain, (SMALL, False), (OTHER, True))
        assert_same(model, plain, (SMALL, True), (OTHER, False), (LARGE, True), (OTHER, True))
    assert sorted(model.recordings.values()) == [1, 2], "the larger one needs more memory, and forgets the others"


def test_the_oldest_is_forgotten_and_recorded_anew(plain, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 1)
    model = Model()
    for _ in range(2):
        assert_same(model, plain, (LARGE, True), (SMALL, True), (SMALL, True))
    assert set(model.recordings.values()) == {2}


def test_memory_is_shared():
    model = Model()
    model.add(LARGE)
    model.add(SMALL)
    places = [
        {mask.untyped_storage().data_ptr() for mask in one.masks.values()} for one in model.graphs._recordings.values()
    ]
    assert len(places) == 2
    assert places[0] == places[1] == {model.graphs._memory.untyped_storage().data_ptr()}


class Forgetful(CpuRecorder):
    """Its replays do nothing."""

    def record(self, work):
        return (lambda: None), super().record(work)[1]


def test_a_replay_that_errs_is_not_believed():
    with pytest.raises(UserError, match="a replay gives another gradient; use auto"):
        Model(Forgetful).add(SMALL)


class Failing(CpuRecorder):
    """Fails as CUDA does, which reports the end of a recording that has failed."""

    reason: Exception

    def record(self, work):
        try:
            raise self.reason
        finally:
            raise RuntimeError("CUDA error: the recording\nhas become invalid")


def test_where_recording_fails_the_user_is_told():
    Failing.reason = ValueError("x")
    with pytest.raises(UserError, match=r"^model\.compile: true .* CUDA error: the recording has become invalid;"):
        Model(Failing).add(SMALL)


def test_lack_of_memory_is_no_failure():
    Failing.reason = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        Model(Failing).add(SMALL)

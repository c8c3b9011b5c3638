"""Work that is recorded once and replayed: what goes wrong is seen, and what came before is kept."""

import contextlib
from collections import Counter

import numpy as np
import pytest
import torch
from ranks import CpuRecorder

from tests.parity.test_packed import build
from trainer.batching.plan import collate, shape_of
from trainer.data.tokens import Examples
from trainer.errors import UserError
from trainer.packed import graphs
from trainer.packed.forward import PackedForward
from trainer.packed.graphs import Graphs

LENGTHS = np.array([13, 11, 9, 4, 4, 1, 12, 12, 7, 5, 3])
SMALL, OTHER, MIDDLE, LARGE = [0, 1, 2], [3, 4, 5, 6], [0, 2, 4, 6, 8, 10], [2, 3, 4, 5, 6, 7, 8, 9, 10]
EXAMPLES = Examples(
    tokens=np.random.default_rng(0).integers(3, 60, LENGTHS.sum()),
    offsets=np.concatenate([[0], LENGTHS.cumsum()]),
    token_types=None,
    labels=np.arange(len(LENGTHS)) % 3,
    lengths=LENGTHS,
)


class Model:
    """A tiny model, whose work on a micro-batch can be recorded; counts the recordings of each shape."""

    def __init__(self, recorder=CpuRecorder, mistake=lambda parameters: None):
        """`mistake` is made in every replay."""
        model, self.keys = build()
        self.forward = PackedForward(model, self.keys)
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.recordings = Counter()

        class Counted(recorder):
            def record(counted, work):
                self.recordings[self.shape] += 1
                replay, losses = super().record(work)
                return lambda: (replay(), mistake(self.parameters)), losses

        self.graphs = Graphs(self.forward, self.keys, self.parameters, contextlib.nullcontext, Counted)

    def work(self, batch, layout=None):
        losses = torch.nn.functional.cross_entropy(
            self.forward(batch.inputs, batch.lengths, layout), batch.labels, reduction="none"
        )
        losses = losses * batch.weights
        losses.sum().backward()
        return losses.detach()

    def add(self, ids, recorded=True, weight=1):
        """Adds the gradient of these examples; their losses."""
        shape = self.shape = shape_of(LENGTHS[ids]) if recorded else None
        weights = weight * (1 + np.arange(len(ids)) / 10)
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


def test_where_there_are_too_many_all_are_forgotten(plain, monkeypatch):
    monkeypatch.setattr(graphs, "MOST", 2)
    model = Model()
    kept = []
    for part in (LARGE, SMALL, LARGE, MIDDLE, MIDDLE, SMALL):
        assert_same(model, plain, (part, True))
        kept.append(len(model.graphs._recordings))
    assert kept == [1, 2, 2, 1, 1, 2]
    assert sum(model.recordings.values()) == 4


def test_what_is_forgotten_is_recorded_again(plain):
    model = Model()
    for _ in range(2):
        assert_same(model, plain, (SMALL, True), (SMALL, True))
        model.graphs.forget()
    assert list(model.recordings.values()) == [2]


def test_memory_is_shared():
    model = Model()
    model.add(LARGE)
    model.add(SMALL)
    places = [
        {mask.untyped_storage().data_ptr() for mask in one.masks.values()} for one in model.graphs._recordings.values()
    ]
    assert len(places) == 2
    assert places[0] == places[1] == {model.graphs._memory.untyped_storage().data_ptr()}


def nothing_at_all(parameters):
    for parameter in parameters:
        parameter.grad.zero_()


def one_that_is_wrong(parameters):
    min(parameters, key=lambda parameter: parameter.grad.norm()).grad.mul_(1.02)


def one_that_is_no_number(parameters):
    parameters[0].grad[0] = float("nan")


@pytest.mark.parametrize("weight", [0, 1])
@pytest.mark.parametrize("mistake", [nothing_at_all, one_that_is_wrong, one_that_is_no_number])
def test_a_replay_that_errs_is_not_believed(mistake, weight):
    with pytest.raises(UserError, match="a replay gives another gradient; auto records nothing"):
        Model(mistake=mistake).add(SMALL, weight=weight)


def test_what_weighs_nothing_adds_nothing():
    model = Model()
    assert not model.add(SMALL, weight=0).any()
    assert not model.gradient().any()


def test_an_overflow_tells_nothing_and_is_not_recorded(plain):
    model = Model()
    right = model.work

    def overflowing(batch, layout=None):
        losses = right(batch, layout)
        model.parameters[0].grad[0] = float("inf")
        return losses

    model.work = overflowing
    [expected], _ = plain(SMALL)
    torch.testing.assert_close(model.add(SMALL), expected, rtol=1e-12, atol=1e-12)
    assert not model.gradient().isfinite().all()
    assert not model.recordings
    model.work = right
    assert_same(model, plain, (SMALL, True))
    assert sum(model.recordings.values()) == 1


class Failing(CpuRecorder):
    reason: Exception

    def record(self, work):
        raise self.reason


def test_where_recording_fails_the_user_is_told():
    Failing.reason = RuntimeError("CUDA error: the recording\nhas become invalid")
    with pytest.raises(UserError, match=r"^model\.compile: true .* CUDA error: the recording has become invalid;"):
        Model(Failing).add(SMALL)


def test_lack_of_memory_is_no_failure():
    Failing.reason = torch.OutOfMemoryError("no memory")
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        Model(Failing).add(SMALL)

"""CUDA graphs: a micro-batch's forward and backward recorded once for each shape, and from then on replayed.

Always holds: a replay gives the losses and gradients that the same work gives without; this is checked for each shape
before it counts. All that changes from one micro-batch to the next lies in tensors that keep their place in memory: its
tokens, labels and weights, where they lie, dropout's masks, the trained parameters and their gradients.

A GPU computes a small micro-batch in less time than its host takes to ask for the two thousand operations of it one by
one. A graph is asked for at once. Micro-batches too large for a `Shape` are not recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch

from trainer.batching.plan import Batch, Shape
from trainer.dropout.sites import DropoutKeys, Wanted
from trainer.errors import UserError
from trainer.packed.attention import Layout
from trainer.packed.forward import PackedForward

MOST = 64  # shapes that are held at a time
TOLERANCE = 1e-2  # of the norm of a parameter's gradient; the operations are the same ones, so a mistake is far larger
NOT_COMPILED = "model.compile: true is not supported here"
Work = Callable[[Batch, Layout | None], torch.Tensor]


class Recorder(Protocol):
    """Records operations. All that one records shares memory, so that only the latest replay's results are there."""

    def rehearse(self, work: Callable[[], torch.Tensor]) -> None:
        """Does the work where it will be recorded."""

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """Records the work, without doing it: what replays it, and where its result will be."""
        ...


class CudaRecorder:
    """Records operations of a GPU."""

    def __init__(self) -> None:
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def rehearse(self, work: Callable[[], torch.Tensor]) -> None:
        """See `Recorder`."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                work()
        finally:  # what it reads is freed and taken again by operations of this stream
            current.wait_stream(self._stream)

    def record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """See `Recorder`."""
        graph = torch.cuda.CUDAGraph()
        # what other threads ask of CUDA meanwhile, such as the watchdog of the collectives, is not this work's
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            result = work()
        return graph.replay, result


@dataclass(frozen=True)
class _Recording:
    """The work on the micro-batches of one shape."""

    tensors: list[torch.Tensor]
    """what it reads of the micro-batch"""
    masks: dict[Wanted, torch.Tensor]
    replay: Callable[[], None]
    losses: torch.Tensor


class Graphs:
    """The recordings of a run."""

    def __init__(
        self,
        forward: PackedForward,
        keys: DropoutKeys,
        parameters: Iterable[torch.nn.Parameter],
        autocast: Callable[[], AbstractContextManager[object]],
        recorder: Callable[[], Recorder] = CudaRecorder,
    ) -> None:
        """`parameters`: those whose gradients the work adds to; `autocast`: makes what the forward runs under."""
        self.seconds = 0.0
        """spent recording"""
        self._forward, self._keys, self._parameters, self._autocast = forward, keys, list(parameters), autocast
        self._new_recorder, self._recorder = recorder, recorder()
        self._recordings: dict[Shape, _Recording] = {}
        self._gradients: dict[torch.nn.Parameter, torch.Tensor] = {}
        self._memory: torch.Tensor | None = None  # of the masks of any one shape

    def do(self, work: Work, batch: Batch, shape: Shape) -> torch.Tensor:
        """Does the work on the micro-batch at hand, which has this shape; what it returns, good until the next work.

        Args:
            work: adds to the gradients of the parameters; the same function of its tensors each time.
            batch: packed and filled up.
            shape: see above.

        Raises:
            UserError: a replay did not give the same gradients, or recording failed.
        """
        with self._autocast():
            layout = self._forward.lay_out(batch.lengths, batch.labels.device, shape.longest)
        read = _read(batch, layout)  # the layout makes some of it now, where nothing is recorded
        if shape not in self._recordings:
            started = time.perf_counter()
            recording = self._recorded(work, batch, layout)
            self.seconds += time.perf_counter() - started
            if recording is None:
                with self._keys.holding({}):
                    return work(batch, layout)
            self._recordings[shape] = recording
        recording = self._recordings[shape]
        torch._foreach_copy_(recording.tensors, read)
        self._keys.draw_into(recording.masks)
        self._attach()
        recording.replay()
        return recording.losses

    def forget(self) -> None:
        """Gives the memory of all recordings back. None goes alone: with one torch frees what its stream's others use.

        See pytorch/pytorch#193402.
        """
        # replays may be in flight: with expandable segments torch would not wait for them
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._recordings.clear()
        self._recorder = self._new_recorder()
        self._memory = None

    def _recorded(self, work: Work, batch: Batch, layout: Layout) -> _Recording | None:
        """The work on micro-batches of this one's shape; None where its gradients overflow, and tell nothing.

        Gradients and batch are left as they were.
        """
        if len(self._recordings) == MOST:
            self.forget()
        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self._parameters]
        weights = batch.weights.clone()
        batch.weights.fill_(1 / len(weights))  # so that all examples have a gradient to compare, whatever they weigh
        masks: dict[Wanted, torch.Tensor] = {}

        def now() -> torch.Tensor:
            with self._keys.holding(masks):
                return work(batch, layout)

        expected = self._rehearsed(now)
        if not self._holds(masks):
            self.forget()
            expected = self._rehearsed(now)
        recording = None
        if all(bool(gradient.isfinite().all()) for gradient in expected.values()):
            self._move(masks)
            self._gradients = self._gradients or {p: torch.zeros_like(gradient) for p, gradient in expected.items()}
            self._set(self._gradients.get(parameter) for parameter in self._parameters)
            replay, losses = self._record(now)
            torch._foreach_zero_(list(self._gradients.values()))
            replay()
            self._compare(expected)
            recording = _Recording(_read(batch, layout), masks, replay, losses)
        self._set(before)
        batch.weights.copy_(weights)
        return recording

    def _rehearsed(self, work: Callable[[], torch.Tensor]) -> dict[torch.nn.Parameter, torch.Tensor]:
        """The gradients that the work gives where it is not recorded."""
        self._set([None] * len(self._parameters))
        self._recorder.rehearse(work)
        return {parameter: parameter.grad for parameter in self._parameters if parameter.grad is not None}

    def _record(self, work: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        try:
            return self._recorder.record(work)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{NOT_COMPILED}: {reason}; auto records nothing") from None

    def _compare(self, expected: dict[torch.nn.Parameter, torch.Tensor]) -> None:
        """Raises where the gradients are others."""
        for parameter, wanted in expected.items():
            apart = (self._gradients[parameter] - wanted).norm()
            if not apart <= TOLERANCE * wanted.norm():  # written so that NaN is refused
                raise UserError(f"{NOT_COMPILED}: a replay gives another gradient; auto records nothing")

    def _set(self, gradients: Iterable[torch.Tensor | None]) -> None:
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _attach(self) -> None:
        """Moves the gradients to where recordings add to them."""
        if all(parameter.grad is held for parameter, held in self._gradients.items()):
            return
        found = [parameter.grad for parameter in self._gradients]
        torch._foreach_zero_(list(self._gradients.values()))
        for gradient, (parameter, held) in zip(found, self._gradients.items(), strict=True):
            if gradient is not None:
                held.copy_(gradient)
            parameter.grad = held

    def _holds(self, masks: dict[Wanted, torch.Tensor]) -> bool:
        return self._memory is None or sum(mask.numel() for mask in masks.values()) <= len(self._memory)

    def _move(self, masks: dict[Wanted, torch.Tensor]) -> None:
        """Moves masks to the memory that those of all shapes share."""
        sizes = [mask.numel() for mask in masks.values()]
        if not sizes:
            return
        if self._memory is None:
            self._memory = next(iter(masks.values())).new_empty(sum(sizes) * 5 // 4)
        for (wanted, mask), part in zip(list(masks.items()), self._memory[: sum(sizes)].split(sizes), strict=True):
            masks[wanted] = part.view_as(mask).copy_(mask)


def _read(batch: Batch, layout: Layout) -> list[torch.Tensor]:
    return [*batch.tensors(), *layout.tensors()]

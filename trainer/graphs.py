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

from trainer.attention import Layout
from trainer.batching import Batch, Shape
from trainer.config import UserError
from trainer.dropout import DropoutKeys, Wanted
from trainer.packed import PackedForward

MOST = 64  # shapes that are held at a time
TOLERANCE = 1e-2  # of the gradient's norm; the operations are the same ones, so a mistake is far larger
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
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        torch.cuda.current_stream().wait_stream(self._stream)

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
        if shape not in self._recordings:
            started = time.perf_counter()
            recording = self._recorded(work, batch, layout)
            if len(self._recordings) == MOST:
                del self._recordings[next(iter(self._recordings))]
            self._recordings[shape] = recording
            self.seconds += time.perf_counter() - started
        recording = self._recordings[shape]
        torch._foreach_copy_(recording.tensors, _read(batch, layout))
        self._keys.draw_into(recording.masks)
        self._attach()
        recording.replay()
        return recording.losses

    def _recorded(self, work: Work, batch: Batch, layout: Layout) -> _Recording:
        """The work on micro-batches of this one's shape. The gradients are left as they were."""
        masks: dict[Wanted, torch.Tensor] = {}

        def now() -> torch.Tensor:
            with self._keys.holding(masks):
                return work(batch, layout)

        before = [None if parameter.grad is None else parameter.grad.clone() for parameter in self._parameters]
        self._set([None] * len(before))
        self._recorder.rehearse(now)
        expected = {p: p.grad for p in self._parameters if p.grad is not None}
        self._settle(masks)
        self._gradients = self._gradients or {p: torch.zeros_like(gradient) for p, gradient in expected.items()}
        self._set([self._gradients.get(parameter) for parameter in self._parameters])
        try:
            replay, losses = self._recorder.record(now)
        except RuntimeError as error:
            if isinstance(error.__context__, torch.OutOfMemoryError):  # the recording has failed since, as it must
                raise error.__context__ from None
            if isinstance(error, torch.OutOfMemoryError):
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"model.compile: true is not to be had: {reason}; auto records nothing") from None
        torch._foreach_zero_(list(self._gradients.values()))
        replay()
        found = torch.cat([self._gradients[parameter].flatten() for parameter in expected])
        wanted = torch.cat([gradient.flatten() for gradient in expected.values()])
        if (found - wanted).norm() > TOLERANCE * wanted.norm():  # false where there was an overflow
            raise UserError("model.compile: true is not to be had: a replay gives another gradient; use auto")
        self._set(before)
        return _Recording(_read(batch, layout), masks, replay, losses)

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

    def _settle(self, masks: dict[Wanted, torch.Tensor]) -> None:
        """Moves masks to the memory that all shapes share. Where it is too small, a larger one forgets them all."""
        sizes = [mask.numel() for mask in masks.values()]
        if not sizes:
            return
        if self._memory is None or sum(sizes) > len(self._memory):
            self._recordings.clear()
            self._recorder = self._new_recorder()
            self._memory = next(iter(masks.values())).new_empty(sum(sizes) * 5 // 4)
        for (wanted, mask), part in zip(list(masks.items()), self._memory[: sum(sizes)].split(sizes), strict=True):
            masks[wanted] = part.view_as(mask).copy_(mask)


def _read(batch: Batch, layout: Layout) -> list[torch.Tensor]:
    return [*batch.tensors(), *layout.tensors()]

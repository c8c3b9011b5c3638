"""kernels.c, compiled for this processor and called: what a step computes beside its matrix products, in fewer passes.

Always holds: each function gives what the operations of torch or numpy give that it stands for, up to rounding; masks
to the bit. Where no compiler is at hand, or the processor lacks AVX512-BF16, these operations do the work.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

SOURCE = Path(__file__).with_name("kernels.c")
# The instructions are named one by one, not as "native", so that each processor that has them gives the same bits.
FLAGS = (
    "-O3", "-shared", "-fPIC", "-fopenmp", "-ffp-contract=fast", "-mfma", "-mbmi2", "-mavx512f", "-mavx512bw",
    "-mavx512dq", "-mavx512vl", "-mavx512bf16",
)  # fmt: skip
HASH_BYTES = hashlib.sha256().digest_size
COMPILES_FOR = 120  # seconds at most; it takes one or two


class NotCompiled(Exception):
    """The kernels are not to be had here; says why in one line."""


@dataclass(frozen=True)
class Spans:
    """Where the B examples lie on the token axis."""

    starts: torch.Tensor
    """first token of each, int64 [B]"""
    lengths: torch.Tensor
    """tokens of each, int64 [B]"""
    squares: torch.Tensor
    """sum of the squared lengths of those before, int64 [B]"""
    num_squares: int
    """and of all"""
    longest: int


@dataclass(frozen=True)
class Units:
    """What one dropout call drops of each example."""

    keep: torch.Tensor
    """bool: where a unit stays, of this call and others"""
    places: torch.Tensor
    """first unit of each example, int64 [B]"""
    scale: float
    """by which the units that stay are multiplied"""


class Kernels:
    """The functions of kernels.c, which says what they compute. Tensors are on the CPU and contiguous, or None."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def take_rows(self, x: torch.Tensor) -> bool:
        """Whether `add_norm` is for x [..., H]."""
        return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] % 16 == 0

    def take_heads(self, qkv: torch.Tensor, num_heads: int) -> bool:
        """Whether `attention` is for these, [T, 3 H]."""
        return qkv.dtype == torch.bfloat16 and qkv.device.type == "cpu" and qkv.shape[-1] % (3 * num_heads * 32) == 0

    def draw_masks(
        self,
        keep: torch.Tensor,
        places: torch.Tensor,
        starts: torch.Tensor,
        rates: torch.Tensor,
        ids: torch.Tensor,
        key: tuple[int, int],
    ) -> None:
        """Draws the units of all sites and examples into `keep`, bool [units].

        Args:
            keep: see above.
            places: first unit of each site and example, int64 [S, B], multiples of 32.
            starts: its first block in the example's stream, int64 [S + 1, B].
            rates: probability of a site's unit to be dropped, float64 [S].
            ids: of the examples, int64 [B].
            key: seed and step.
        """
        self._call("draw_masks", keep, places, starts, rates, ids, *places.shape, *key)

    def add_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        norm: nn.LayerNorm,
        keep: torch.Tensor | None,
        scale: float,
        trains: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """LayerNorm(residual + scale keep x) in fp32 and bf16, [..., H]; where it trains, also what the backward needs.

        Args:
            x: bf16 [..., H].
            residual: fp32 [..., H].
            norm: its weight and bias are fp32.
            keep: bool [..., H].
            scale: by which the units that stay are multiplied.
            trains: see above.
        """
        y, narrow = torch.empty_like(residual), torch.empty_like(x)
        normed = torch.empty_like(x) if trains else None
        inverse = residual.new_empty(residual.shape[:-1]) if trains else None
        results = y, narrow, normed, inverse
        sizes = residual[..., 0].numel(), residual.shape[-1]
        self._call("add_norm", x, residual, keep, norm.weight, norm.bias, *results, *sizes, scale, norm.eps)
        return results

    def add_norm_backward(
        self,
        of_y: torch.Tensor | None,
        of_narrow: torch.Tensor | None,
        normed: torch.Tensor,
        inverse: torch.Tensor,
        norm: nn.LayerNorm,
        keep: torch.Tensor | None,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradients of the residual, fp32, and of x, bf16; [..., H]. Arguments as of `add_norm`."""
        of_residual, of_x = torch.empty_like(normed, dtype=torch.float32), torch.empty_like(normed)
        tensors = of_y, of_narrow, keep, norm.weight, normed, inverse, of_residual, of_x
        self._call("add_norm_backward", *tensors, inverse.numel(), normed.shape[-1], scale)
        return of_residual, of_x

    def attention(
        self, qkv: torch.Tensor, spans: Spans, num_heads: int, scaling: float, units: Units | None, trains: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention within each example, [T, 3 H] -> [T, H]; and, where it trains, the softmax for the backward."""
        y = qkv.new_empty(len(qkv), qkv.shape[1] // 3)
        shares = qkv.new_empty(num_heads * spans.num_squares) if trains else None
        self._call("attention", qkv, y, shares, *_examples(y, spans, num_heads, scaling, units))
        return y, shares

    def attention_backward(
        self,
        qkv: torch.Tensor,
        of_y: torch.Tensor,
        shares: torch.Tensor,
        spans: Spans,
        num_heads: int,
        scaling: float,
        units: Units | None,
    ) -> torch.Tensor:
        """Gradient of qkv, [T, 3 H]."""
        of_qkv = torch.empty_like(qkv)
        examples = _examples(of_y, spans, num_heads, scaling, units)
        self._call("attention_backward", qkv, of_y, of_qkv, shares, *examples)
        return of_qkv

    def _call(self, name: str, *arguments: Any) -> None:
        self._library[name](*map(_as_c, arguments))


def _examples(y: torch.Tensor, spans: Spans, num_heads: int, scaling: float, units: Units | None) -> tuple[Any, ...]:
    """What both directions of attention take besides."""
    keep, places, scale = (units.keep, units.places, units.scale) if units is not None else (None, None, 1.0)
    head_size, threads = y.shape[1] // num_heads, torch.get_num_threads()
    width = -(-spans.longest // 16) * 16
    part = 4 * width * max(width, head_size)
    memory = torch.empty(threads * 5 * part, dtype=torch.uint8)
    sizes = len(spans.starts), threads, part, num_heads, head_size
    return keep, spans.starts, spans.lengths, spans.squares, places, memory, *sizes, scaling, scale


def _as_c(value: Any) -> Any:
    """A tensor's address, an int as long, a float as float."""
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if value is None:
        return ctypes.c_void_p(None)
    return ctypes.c_float(value) if isinstance(value, float) else ctypes.c_long(value)


def are_supported() -> bool:
    """Whether this processor has the instructions."""
    return torch.cpu._is_avx512_bf16_supported()


def load_kernels() -> Kernels:
    """The kernels, compiled now or at an earlier start.

    Raises:
        NotCompiled: no such processor, no compiler, or one that fails.
    """
    if not are_supported():
        raise NotCompiled("this processor has no AVX512-BF16")
    key = hashlib.sha256("\0".join([*FLAGS, SOURCE.read_text()]).encode()).hexdigest()[:16]
    kept = SOURCE.parent / "__pycache__" / f"kernels-{key}.so"
    try:
        return Kernels(ctypes.CDLL(str(kept))) if _is_whole(kept) else _made(kept)
    except OSError as error:
        raise NotCompiled(" ".join(str(error).split())[:200]) from None


def _made(kept: Path) -> Kernels:
    """Compiles the kernels, and keeps them for the next start: whole at any moment, since other ranks do the same."""
    with contextlib.suppress(OSError):
        kept.parent.mkdir(exist_ok=True)
    keeps = kept.parent.is_dir() and os.access(kept.parent, os.W_OK)
    with tempfile.TemporaryDirectory(dir=kept.parent if keeps else None, prefix="kernels-") as folder:
        made = Path(folder) / kept.name
        _compile(made)
        kernels = Kernels(ctypes.CDLL(str(made)))
        if keeps:
            with made.open("ab") as file:
                file.write(hashlib.sha256(made.read_bytes()).digest())
                file.flush()
                os.fsync(file.fileno())
            made.replace(kept)
        return kernels


def _is_whole(library: Path) -> bool:
    """Whether it is there, and ends with the hash of the rest: one that was cut off would end the process."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-HASH_BYTES]).digest() == content[-HASH_BYTES:]


def _compile(made: Path) -> None:
    command = shlex.split(os.environ.get("CC", "")) or ["cc"]  # CC may have arguments: ccache gcc
    compiler = shutil.which(command[0])
    if compiler is None:
        raise NotCompiled(f"there is no C compiler {command[0]!r}")
    try:
        done = subprocess.run(
            [compiler, *command[1:], *FLAGS, "-o", str(made), str(SOURCE)],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=COMPILES_FOR,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise NotCompiled(f"{compiler} was not done in {COMPILES_FOR} s") from None
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if "error" in line] or ["it says nothing"]
        raise NotCompiled(f"{compiler} fails: {said[0].strip()[:160]}")

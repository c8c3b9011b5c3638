"""The difference between the adapters of two finished runs, tensor by tensor. Imports no torch."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file

from trainer.errors import UserError, one_line

Tensors = dict[str, npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Difference:
    """How far two adapters of one shape are apart."""

    largest: float
    """max |a - b| over all values of all tensors"""
    tensor: str
    """name of the tensor that holds it"""
    num_equal: int
    """tensors that are equal to the bit"""
    num_tensors: int

    def __str__(self) -> str:
        equal = f"{self.num_equal} of {self.num_tensors} tensors equal to the bit"
        return equal if self.num_equal == self.num_tensors else f"{equal}\nlargest: {self.largest:.2g} in {self.tensor}"


def read_adapter(run: Path) -> Tensors:
    """Reads the adapter of a finished run, or raises `UserError`."""
    path = run / "adapter" / "adapter_model.safetensors"
    missing = next((file for file in (run / "summary.json", path) if not file.is_file()), None)
    if missing:
        raise UserError(f"{run}: not a finished run: {missing} is missing. Finish it by typing its command again")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from error


def compare_adapters(run: Path, against: Path) -> Difference:
    """Compares the adapters of two finished runs; raises `UserError` where their tensors have other names or shapes."""
    ours, theirs = read_adapter(run), read_adapter(against)
    for name in sorted(ours.keys() | theirs.keys()):
        shapes = [tensors[name].shape if name in tensors else "absent" for tensors in (ours, theirs)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{name} is {shapes[0]} in {run} but {shapes[1]} in {against}: compare runs of one backbone and peft.*"
            )
    distances = {name: float(np.abs(ours[name] - theirs[name]).max(initial=0)) for name in ours}
    largest = max(distances, key=lambda name: math.inf if math.isnan(distances[name]) else distances[name])
    num_equal = sum(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    return Difference(distances[largest], largest, num_equal, len(ours))

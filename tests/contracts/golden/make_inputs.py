"""How inputs/ was made: the tests' tiny data, and their tiny backbone with weights that are 8 times as large.

    PYTHONPATH=. python tests/contracts/golden/make_inputs.py FOLDER

With the weights as initialized, every text looks alike to the head, and nothing is learned. The files are kept because
another version of torch may draw other weights.
"""

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch

from tests import conftest


@dataclass
class Folders:
    """Stands for pytest's tmp_path_factory."""

    place: Path

    def mktemp(self, name):
        return self.place


def main():
    place = Path(sys.argv[1])
    place.mkdir()
    tokenizer = inspect.unwrap(conftest.tiny_tokenizer)()
    weights = inspect.unwrap(conftest.tiny_backbone)(Folders(place), tokenizer) / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    larger = {name: tensor * 8 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(larger, weights, {"format": "pt"})
    conftest.write_csv(place / "train.csv", conftest.topic_rows(40, seed=1))
    conftest.write_csv(place / "test.csv", conftest.topic_rows(9, seed=2))


if __name__ == "__main__":
    main()

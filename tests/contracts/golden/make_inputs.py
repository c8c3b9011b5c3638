"""How inputs/ was made: the tests' tiny data, and their tiny backbone with weights that are 8 times as large.

    python -m tests.contracts.golden.make_inputs FOLDER

With the weights as initialized, every text looks alike to the head, and nothing is learned. The files are kept because
another version of torch may draw other weights.
"""

import sys
from pathlib import Path

import safetensors.torch

from tests.harness.data import save_backbone, topic_rows, write_csv


def main():
    place = Path(sys.argv[1])
    place.mkdir()
    weights = save_backbone(place / "tiny-roberta") / "model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    larger = {name: tensor * 8 if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(larger, weights, {"format": "pt"})
    write_csv(place / "train.csv", topic_rows(40, seed=1))
    write_csv(place / "test.csv", topic_rows(9, seed=2))


if __name__ == "__main__":
    main()

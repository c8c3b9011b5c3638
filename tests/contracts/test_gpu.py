"""What a training step asks of a GPU, seen without one: see tests/gpu/step.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

GPU = Path(__file__).resolve().parents[1] / "gpu"
TORCH = Path(torch.__file__).parent

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++ and a torch without CUDA"
)


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """Takes a training step; returns what it asked for, or the last line of its error."""
    shim = tmp_path_factory.mktemp("gpu") / "device.so"
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", GPU / "device.cpp", "-o", shim]
    subprocess.run([*command, *libraries], check=True, timeout=300)

    def take(num_layers, *mistake):
        command = [sys.executable, GPU / "step.py", shim, str(num_layers), *mistake]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        return json.loads(done.stdout) if done.returncode == 0 else done.stderr

    return take


def test_a_step_asks_little_and_waits_twice(step):
    few, many = step(2), step(4)
    a_layer = (many["operations"] - few["operations"]) / 2
    assert a_layer <= 95
    assert (
        few["operations"] - 2 * a_layer <= 700
    )  # of which 423 draw the words of all masks, where they are not compiled
    assert few["waits"] == many["waits"] == 2
    assert (step(4, "many groups")["operations"] - step(2, "many groups")["operations"]) / 2 > 2 * a_layer
    theirs = (step(4, "transformers")["operations"] - step(2, "transformers")["operations"]) / 2
    assert 2.5 * a_layer < theirs
    assert step(2, "asks for a number")["waits"] > 2
    assert step(2, "copies and waits")["waits"] > 2


def test_everything_is_on_the_device(step):
    assert "FakeTensorDeviceMismatchError" in step(2, "left on the host") or "on the same device" in step(2)

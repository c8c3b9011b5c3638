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
CASES = [
    "2 ours", "4 ours", "2 transformers", "4 transformers", "2 many groups", "4 many groups", "2 asks for a number",
    "2 copied and waited for", "2 left on the host", "2 recorded", "4 recorded", "2 recorded asking for a number",
]  # fmt: skip

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None, reason="needs g++ and a torch without CUDA"
)


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """What each of the CASES asked for."""
    shim = tmp_path_factory.mktemp("gpu") / "device.so"
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
    command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{TORCH / 'include'}", GPU / "device.cpp", "-o", shim]
    subprocess.run([*command, *libraries], check=True, timeout=300)
    done = subprocess.run([sys.executable, GPU / "step.py", shim, *CASES], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def operations_a_layer(steps, whose):
    return (steps[f"4 {whose}"]["operations"] - steps[f"2 {whose}"]["operations"]) / 2


def test_a_step_asks_little(steps):
    a_layer = operations_a_layer(steps, "ours")
    assert a_layer <= 95
    assert 2.5 * a_layer < operations_a_layer(steps, "transformers")
    assert 2 * a_layer < operations_a_layer(steps, "many groups")
    # some 420 of them draw the words of all masks, where that is not compiled
    assert steps["2 ours"]["operations"] - 2 * a_layer <= 650


def test_the_host_waits_for_nothing(steps):
    assert steps["2 ours"]["waits"] == steps["4 ours"]["waits"] == 0
    assert steps["2 ours"]["sent"] == steps["4 ours"]["sent"] == 1, "the numbers, for whose arrival `on_host` waits"
    assert steps["2 asks for a number"]["waits"] > 0
    assert steps["2 copied and waited for"]["waits"] > 0


def test_what_is_recorded_is_asked_for_at_once(steps):
    assert operations_a_layer(steps, "recorded") <= 20
    assert (steps["2 recorded"]["waits"], steps["2 recorded"]["sent"]) == (0, 1)


def test_while_recording_the_host_does_nothing(steps):
    assert "the host waits while recording" in steps["2 recorded asking for a number"]["error"]


def test_everything_is_on_the_device(steps):
    assert "error" not in steps["4 ours"]
    assert "on the same device" in steps["2 left on the host"]["error"]

"""The comparison of two adapters: what it measures, and what it refuses."""

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.harness.commands import run_script
from trainer.errors import UserError
from trainer.reporting.compare import compare_adapters


def write_finished_run(folder, **tensors):
    (folder / "adapter").mkdir(parents=True)
    (folder / "summary.json").write_text("{}")
    save_file(
        {name: np.float32(values) for name, values in tensors.items()}, folder / "adapter/adapter_model.safetensors"
    )
    return folder


def test_the_largest_difference_is_found_with_its_tensor(tmp_path):
    one = write_finished_run(tmp_path / "one", a=[1, 2], b=[3, 4], c=[5])
    other = write_finished_run(tmp_path / "other", a=[1, 2], b=[3, 4.5], c=[5.25])
    found = compare_adapters(one, other)
    assert (found.largest, found.tensor, found.num_equal, found.num_tensors) == (0.5, "b", 1, 3)
    assert "0.5" in str(found)
    assert "b" in str(found)


def test_equal_to_the_bit_tells_signed_zeros_apart(tmp_path):
    one, other = write_finished_run(tmp_path / "one", a=[0.0]), write_finished_run(tmp_path / "other", a=[-0.0])
    assert compare_adapters(one, one).num_equal == 1
    assert compare_adapters(one, other).num_equal == 0


def test_nan_is_the_largest_difference(tmp_path):
    one = write_finished_run(tmp_path / "one", a=[1], b=[2])
    other = write_finished_run(tmp_path / "other", a=[9], b=[np.nan])
    assert compare_adapters(one, other).tensor == "b"


@pytest.mark.parametrize("other", [{"a": [1, 2], "b": [1]}, {"a": [1]}])
def test_adapters_with_different_tensors_are_refused(tmp_path, other):
    with pytest.raises(UserError, match=r"one.*other.*peft"):
        compare_adapters(
            write_finished_run(tmp_path / "one", a=[1, 2]), write_finished_run(tmp_path / "other", **other)
        )


@pytest.mark.parametrize("lacks", ["summary.json", "adapter/adapter_model.safetensors"])
def test_a_run_that_is_not_finished_is_refused(tmp_path, lacks):
    whole, partial = write_finished_run(tmp_path / "whole", a=[1]), write_finished_run(tmp_path / "partial", a=[1])
    (partial / lacks).unlink()
    with pytest.raises(UserError, match=rf"partial.*{lacks}"):
        compare_adapters(whole, partial)


def test_a_damaged_adapter_is_named(tmp_path):
    run = write_finished_run(tmp_path / "run", a=[1])
    path = run / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(UserError, match=str(path)):
        compare_adapters(run, run)


def test_the_command_prints_the_difference(tmp_path):
    one, other = write_finished_run(tmp_path / "one", a=[1]), write_finished_run(tmp_path / "other", a=[1.5])
    done = run_script("report.py", ["--run", one, "--against", other])
    assert done.returncode == 0, done.stderr
    assert "0.5" in done.stdout
    assert not (one / "report.html").exists()


def test_the_command_refuses_a_folder_that_is_not_a_run_in_one_line(tmp_path):
    one = write_finished_run(tmp_path / "one", a=[1])
    done = run_script("report.py", ["--run", one, "--against", tmp_path / "none"])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert str(tmp_path / "none") in done.stderr

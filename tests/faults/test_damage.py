"""Damaged checkpoints, changed data, a second command, a full disk: found, named, and nothing harmed."""

import errno
import json
import os
import shutil
import signal
import subprocess

import pytest

from tests.harness.commands import changed, command, on_ranks, start
from tests.harness.data import topic_rows, write_csv
from tests.harness.runs import assert_same, checkpoints, outcome, tensors

LESS = ("no_figures",)
FILES = ["adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "trainer_state.json"]
FILES += ["best_adapter.safetensors", "manifest.json"]


def damage(path, kind):
    if kind == "removed":
        path.unlink()
        return
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def contents(folder):
    """All files below a folder, but the log of its events and the note of who holds it."""
    return {
        path.relative_to(folder): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "tfevents" not in path.name and path.name != ".lock"
    }


# the unit tests have every file with every kind of damage
@pytest.mark.parametrize(("name", "kind"), [("optimizer.safetensors", "flipped"), ("manifest.json", "removed")])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(name, kind, killed, reference):
    folder, arguments = killed
    damage(folder / "checkpoints" / "step-00000006" / name, kind)
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert "checkpoint step-00000006 is damaged" in ended.stderr
    assert name in ended.stderr
    assert "continuing after step 3 of 12" in ended.stderr
    assert_same(folder, reference)


def test_all_checkpoints_damaged(killed, reference):
    folder, arguments = killed
    for path in checkpoints(folder):
        damage(path / "optimizer.safetensors", "flipped")
    ended = command("run", arguments, [LESS, ("at_call", "train_step", 3, int(signal.SIGTERM))])
    assert "step-00000003 is damaged" in ended.stderr
    assert "step-00000006 is damaged" in ended.stderr
    assert "starting from the beginning" in ended.stderr
    # what was just saved is not the one that makes room
    assert [path.name for path in checkpoints(folder)] == ["step-00000003"]
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert "continuing after step 3 of 12" in ended.stderr
    assert_same(folder, reference)


def test_leftovers_are_removed_and_the_newest_are_kept(killed, reference):
    folder, arguments = killed
    for name in (".unfinished-step-00000009", ".unfinished-old-step-00000003"):
        shutil.copytree(folder / "checkpoints" / "step-00000006", folder / "checkpoints" / name)
    arguments = changed(arguments, checkpoint__keep_last=3)
    assert command("run", arguments, [LESS, ("at_call", "train_step", 2)]).code == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-00000003", "step-00000006"]
    assert command("run", arguments, [LESS]).code == 0
    names = ["step-00000006", "step-00000009", "step-00000012"]
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == names
    assert_same(folder, reference)


def test_a_checkpoint_holds_what_trains_and_nothing_else(uninterrupted):
    folder, _ = uninterrupted
    summary = json.loads((folder / "summary.json").read_text())
    trained = summary["trainable_parameters"]
    limit = 1.05 * 4 * trained + 64 * 1024
    assert [path.name for path in checkpoints(folder)] == ["step-00000009", "step-00000012"]
    for path in (*(place / "adapter_model.safetensors" for place in checkpoints(folder)), folder / "adapter"):
        path = path / "adapter_model.safetensors" if path.is_dir() else path
        assert path.stat().st_size <= limit
        names = tensors(path)
        assert sum(tensor.size for tensor in names.values()) == trained
        assert all("lora_" in name or "classifier" in name for name in names)
    assert summary["adapter_bytes"] <= limit
    for place in checkpoints(folder):
        assert sorted(path.name for path in place.iterdir()) == sorted(FILES)
        # two moments a parameter, and their step
        assert (place / "optimizer.safetensors").stat().st_size <= 2.1 * 4 * trained + 64 * 1024
        assert sum(path.stat().st_size for path in place.iterdir()) < 5 * limit


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_other_data_is_refused(killed, tmp_path, reference):
    folder, arguments = killed
    other = write_csv(tmp_path / "train.csv", topic_rows(61, seed=9))
    before = contents(folder)
    ended = command("run", changed(arguments, data__train=other), [LESS])
    assert ended.code == 2
    assert "started with another train split" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert contents(folder) == before
    assert command("run", arguments, [LESS]).code == 0
    assert_same(folder, reference)


def test_a_split_left_out_is_refused(killed):
    """Without that of validation the best adapter so far would be forgotten."""
    folder, arguments = killed
    before = contents(folder)
    ended = command("run", changed(arguments, data__test=None), [LESS])
    assert ended.code == 2
    assert "started with another test split" in ended.stderr
    assert contents(folder) == before


def test_the_place_of_data_and_the_rhythm_of_saving_may_change(killed, fault_data, reference, tmp_path):
    folder, arguments = killed
    moved = shutil.copytree(fault_data, tmp_path / "moved")
    places = {"data__train": moved / "train.csv", "data__test": moved / "test.csv"}
    ended = command("run", changed(arguments, **places, checkpoint__every_steps=5, run__quiet="true"), [LESS])
    assert ended.code == 0, ended.stderr
    assert (ended.stdout, ended.stderr) == ("", "")
    found = outcome(folder)
    assert found["adapter"] == reference["adapter"]
    assert found["records"] == reference["records"]


def test_a_finished_run_is_finished_for_a_host_that_does_not_see_it(uninterrupted, options, tmp_path):
    folder, _ = uninterrupted
    before = contents(folder)
    arguments = changed(options, run__output_dir=folder.parent.name)
    folders = {0: folder.parents[1], 1: tmp_path}
    ranks = on_ranks(2, arguments, [LESS], folders=folders, local_world_size=1)
    assert [rank.code for rank in ranks] == [0, 0], ranks[1].stderr
    assert "is finished" in ranks[0].stderr
    assert not ranks[1].stderr
    assert contents(folder) == before
    assert not any(tmp_path.iterdir())


def test_a_damaged_record_of_starts_stops_nothing(killed, reference):
    folder, arguments = killed
    (folder / "environment.json").write_text('{"starts": [')
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert len(json.loads((folder / "environment.json").read_text())["starts"]) == 1


def test_a_second_command_is_refused_while_the_first_runs(options, reference, tmp_path):
    arguments = changed(options, run__output_dir=tmp_path)
    folder = tmp_path / "run"
    first = start("run", arguments, [LESS, ("at_call", "train_step", 8, int(signal.SIGSTOP))])
    first.wait_until_stopped()
    before = contents(folder)
    second = command("run", arguments, [LESS])
    assert second.code == 2
    assert "is in use by another running command" in second.stderr
    assert contents(folder) == before
    os.kill(first.pid, signal.SIGCONT)
    ended = first.wait()
    assert ended.code == 0, ended.stderr
    assert_same(folder, reference)


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk(killed, reference):
    folder, arguments = killed
    ended = command("run", arguments, [LESS, ("full_disk", 7 + 6 + 2)])  # in the middle of the evaluation's files
    assert ended.code == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert os.strerror(errno.ENOSPC) in line
    assert str(folder) in line
    whole = [path for path in folder.rglob("*") if "unfinished" in path.name]
    assert not whole
    assert command("run", arguments, [LESS]).code == 0
    assert_same(folder, reference)


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], capture_output=True)
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_really_full(killed, options, small_disk, reference):
    folder = small_disk / "run"
    shutil.copytree(killed[0], folder)
    arguments = changed(options, run__output_dir=small_disk)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(max(0, free - 40_000) // 4096 * 4096))
    ended = command("run", arguments, [LESS])
    assert ended.code == 2, ended.stderr
    assert "Traceback" not in ended.stderr, ended.stderr
    assert sum(line.startswith("error: ") for line in ended.stderr.splitlines()) == 1
    assert "No space left" in ended.stderr
    (small_disk / "filler").unlink()
    ended = command("run", arguments, [LESS])
    assert ended.code == 0, ended.stderr
    assert_same(folder, reference)

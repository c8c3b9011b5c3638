"""Checkpoints are whole or not there: atomic, hashed, rotating, strict."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from trainer import files
from trainer.errors import UserError
from trainer.files import remove_unfinished, replace_folder, write_atomic
from trainer.training.checkpoint import Checkpoint, DamagedCheckpoint, load_newest, read_checkpoint, write_checkpoint

FILES = ("adapter_model.safetensors", "best_adapter.safetensors", "optimizer.safetensors")
FILES += ("adapter_config.json", "trainer_state.json")


def example(step, best=True):
    generator = torch.Generator().manual_seed(step)
    tensors = {"layer.lora_A.weight": torch.randn(3, 4, generator=generator), "head.bias": torch.randn(4)}
    return Checkpoint(
        step=step,
        adapter=tensors,
        best_adapter={name: tensor + 1 for name, tensor in tensors.items()} if best else None,
        optimizer={"head.bias/exp_avg": torch.randn(4), "head.bias/step": torch.tensor(float(step))},
        state={"train": {"step": step, "loss": 0.1 + 0.2}, "scaler": None},
        adapter_config='{"r": 4}\n',
    )


def equal(one, other):
    def same(first, second):
        if first is None or second is None:
            return first is second
        return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

    return (
        same(one.adapter, other.adapter)
        and same(one.best_adapter, other.best_adapter)
        and same(one.optimizer, other.optimizer)
        and (one.step, one.state, one.adapter_config) == (other.step, other.state, other.adapter_config)
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("best", [True, False])
def test_what_is_saved_is_loaded(tmp_path, best):
    saved = example(7, best)
    path = write_checkpoint(tmp_path / "checkpoints", saved, keep_last=2)
    assert path.name == "step-00000007"
    assert equal(read_checkpoint(path), saved)
    newest, damage = load_newest(tmp_path / "checkpoints")
    assert equal(newest, saved)
    assert damage == []


def test_only_the_newest_are_kept(tmp_path):
    for step in (3, 6, 9, 12):
        write_checkpoint(tmp_path, example(step), keep_last=3)
    assert names(tmp_path) == ["step-00000006", "step-00000009", "step-00000012"]
    write_checkpoint(tmp_path, example(15), keep_last=2)
    assert names(tmp_path) == ["step-00000012", "step-00000015"]


def test_the_same_step_again_replaces_it(tmp_path):
    write_checkpoint(tmp_path, example(3), keep_last=2)
    again = example(3, best=False)
    assert equal(read_checkpoint(write_checkpoint(tmp_path, again, keep_last=2)), again)
    assert names(tmp_path) == ["step-00000003"]
    assert "best_adapter.safetensors" not in names(tmp_path / "step-00000003")


@pytest.mark.parametrize("kind", ["cut", "longer", "flipped", "removed", "emptied", "a folder"])
@pytest.mark.parametrize("name", ["manifest.json", *FILES])
def test_every_damage_of_every_file_is_found_and_named(tmp_path, name, kind):
    write_checkpoint(tmp_path, example(3), keep_last=2)
    path = write_checkpoint(tmp_path, example(6), keep_last=2) / name
    data = path.read_bytes()
    if kind == "flipped":
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif kind in ("removed", "a folder"):
        path.unlink()
        if kind == "a folder":
            path.mkdir()
    else:
        path.write_bytes({"cut": data[:-2], "longer": data + b"x", "emptied": b""}[kind])
    newest, damage = load_newest(tmp_path)
    assert newest.step == 3
    (line,) = damage
    assert "step-00000006" in line
    assert name in line
    assert "\n" not in line


def test_no_altered_byte_of_the_manifest_changes_what_is_loaded(tmp_path):
    saved = example(5)
    manifest = write_checkpoint(tmp_path, saved, keep_last=2) / "manifest.json"
    data = manifest.read_bytes()
    for position in range(len(data)):
        for mask in (0x01, 0x20, 0xFF):
            manifest.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
            try:
                assert equal(read_checkpoint(manifest.parent), saved)
            except (DamagedCheckpoint, UserError) as error:
                assert str(error)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"format": 1, "files": [], "step": 5}', '"'])
def test_a_manifest_of_another_kind_is_damage(tmp_path, text):
    path = write_checkpoint(tmp_path, example(5), keep_last=2)
    (path / "manifest.json").write_text(text)
    assert load_newest(tmp_path)[0] is None


def test_a_checkpoint_under_another_step_is_damage(tmp_path):
    path = write_checkpoint(tmp_path, example(5), keep_last=2)
    moved = shutil.copytree(path, tmp_path / "step-00000006")
    with pytest.raises(DamagedCheckpoint, match="another step"):
        read_checkpoint(moved)


def test_one_of_a_newer_version_or_unreadable_is_no_damage_and_stays(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, example(5), keep_last=2)
    path = write_checkpoint(tmp_path, example(6), keep_last=2) / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(UserError, match="step-00000006 is of a newer version"):
        load_newest(tmp_path)

    def stale(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "read_bytes", stale)
    with pytest.raises(UserError, match=r"Stale file handle.*remove .*step-00000006 to continue"):
        load_newest(tmp_path)
    assert names(tmp_path) == ["step-00000005", "step-00000006"]


def test_other_names_are_no_checkpoints(tmp_path):
    path = write_checkpoint(tmp_path, example(5), keep_last=2)
    for name in ("step-5", "step-000000050", "step-0000000x", ".unfinished-step-00000009", "step-00000009.bak"):
        shutil.copytree(path, tmp_path / name)
    newest, damage = load_newest(tmp_path)
    assert newest.step == 5
    assert damage == []
    remove_unfinished(tmp_path)
    assert ".unfinished-step-00000009" not in names(tmp_path)
    assert "step-00000009.bak" in names(tmp_path)


@pytest.mark.parametrize("call", range(1, 7))
def test_a_full_disk_harms_nothing(tmp_path, monkeypatch, call):
    kept = example(3)
    write_checkpoint(tmp_path, kept, keep_last=2)
    calls = 0

    def full(path, data):
        nonlocal calls
        calls += 1
        path.write_bytes(data if calls < call else data[:10])
        if calls == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "write_synced", full)
    for step in (3, 6):
        calls = 0
        with pytest.raises(OSError, match=r"cannot save .*step-.*: No space left on device; what was saved before"):
            write_checkpoint(tmp_path, example(step, best=True), keep_last=2)
        assert names(tmp_path) == ["step-00000003"]
        assert equal(load_newest(tmp_path)[0], kept)


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_harms_nothing(tmp_path, monkeypatch, call):
    kept = example(3)
    write_checkpoint(tmp_path, kept, keep_last=2)
    rename, calls = type(tmp_path).rename, 0

    def refused(path, target):
        nonlocal calls
        calls += 1
        if calls == call:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", refused)
    with pytest.raises(OSError, match="cannot save"):
        write_checkpoint(tmp_path, example(3), keep_last=2)
    assert names(tmp_path) == ["step-00000003"]
    assert equal(load_newest(tmp_path)[0], kept)


def test_killed_anywhere_a_folder_is_old_or_new_or_found_again(tmp_path):
    """A child is killed at its n-th touch of the disk, for every n until none is left to kill."""
    states = set()
    for count in range(1, 60):
        folder = tmp_path / str(count)
        replace_folder(folder / "target", {"a": b"old", "b": b"old"})
        pid = os.fork()
        if not pid:
            _die_at(folder, count)
        if os.waitpid(pid, 0)[1] == 0:
            break
        target = folder / "target"
        if target.exists():
            state = {(target / name).read_bytes() for name in ("a", "b")}
            assert len(state) == 1, "a mixture of old and new"
            states |= state
        else:  # between the two renames both are there, whole, under their other names
            whole = [folder / f".unfinished-{name}" for name in ("target", "old-target")]
            assert [{path.read_bytes() for path in place.iterdir()} for place in whole] == [{b"new"}, {b"old"}]
        replace_folder(target, {"a": b"newer"})
        assert names(folder) == ["target"]
        assert (target / "a").read_bytes() == b"newer"
    else:
        pytest.fail("the child was never left alone")
    assert states == {b"old", b"new"}
    assert count > 8


def _die_at(folder, count):
    calls = 0

    def audit(event, arguments):
        nonlocal calls
        if event in ("open", "os.rename", "os.mkdir", "os.rmdir", "os.remove") and arguments:
            calls += 1
            if calls == count:
                os.kill(os.getpid(), 9)

    try:
        sys.addaudithook(audit)
        replace_folder(folder / "target", {"a": b"new", "b": b"new"})
        os._exit(0)
    finally:
        os._exit(1)


def test_write_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.csv"
    write_atomic(path, "caf\u00e9 \ud800\n")  # a lone surrogate may stand in a text
    assert path.read_bytes() == "caf\u00e9 \\ud800\n".encode()
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"

    def full(place, data):
        place.write_bytes(data[:1])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write_synced", full)
    with pytest.raises(OSError, match=r"cannot write .*file\.csv: No space left on device"):
        write_atomic(path, "other")
    assert path.read_bytes() == b"\x00\xff"
    assert names(path.parent) == ["file.csv"]

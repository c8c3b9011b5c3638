"""Run folders and caches that several commands share: one at a time, and none waits for ever."""

import errno
import fcntl
import os
import socket
import stat
import subprocess
import sys

import pytest

from tests.harness.processes import ROOT
from trainer import files as locks
from trainer.errors import UserError
from trainer.files import hold_run_folder, lock_cache_entry, share, write_atomic
from trainer.run import main

NO_LOCKS = [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS]


@pytest.fixture
def no_locks(monkeypatch, request):
    """A file system whose flock gives an errno."""

    def flock(descriptor, operation):
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", flock)


def other_command(code):
    command = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom trainer.files import *\n{code}"
    return subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=60)


# --- run folders ---


def test_a_run_folder_is_locked_and_names_its_holder(tmp_path):
    with hold_run_folder(tmp_path / "run"), pytest.raises(UserError) as refused, hold_run_folder(tmp_path / "run"):
        pass
    message = str(refused.value)
    assert f"{tmp_path}/run is in use by another running command (process {os.getpid()} on {socket.gethostname()})" in (
        message
    )
    assert message.endswith(f"rm {tmp_path}/run/.lock")


@pytest.mark.parametrize("no_locks", NO_LOCKS, indirect=True)
def test_without_file_locks_a_run_folder_is_still_locked(tmp_path, no_locks):
    folder = tmp_path / "run"
    with hold_run_folder(folder):
        (folder / "config.yaml").touch()
        with (
            pytest.raises(UserError, match=f"process {os.getpid()} on {socket.gethostname()}"),
            hold_run_folder(folder),
        ):
            pass
    with hold_run_folder(folder):
        pass
    assert (folder / "config.yaml").exists()


@pytest.mark.parametrize("no_locks", NO_LOCKS, indirect=True)
def test_a_lock_of_a_dead_process_on_this_machine_is_released(tmp_path, no_locks):
    done = other_command(
        f"import os; lock = SoftFileLock({str(tmp_path / '.lock-file')!r}); lock.acquire(); os._exit(9)"
    )
    assert done.returncode == 9 and (tmp_path / ".lock-file").exists(), done.stderr
    with hold_run_folder(tmp_path):
        pass


@pytest.mark.parametrize("no_locks", NO_LOCKS, indirect=True)
def test_a_lock_of_a_dead_machine_names_it_and_the_fix(tmp_path, no_locks):
    (tmp_path / ".lock").touch()  # as from a start on a machine where locks work
    (tmp_path / ".lock-file").write_text("4711\nnode-17\n")
    with pytest.raises(UserError, match=r"\(process 4711 on node-17\)") as refused, hold_run_folder(tmp_path):
        pass
    os.remove(str(refused.value).rpartition("rm ")[2])
    with hold_run_folder(tmp_path):
        pass


def test_a_folder_created_for_a_refused_run_is_removed(tmp_path):
    with pytest.raises(UserError, match="no such file"), hold_run_folder(tmp_path / "runs" / "x"):
        raise UserError("no such file")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "runs").mkdir()
    with hold_run_folder(tmp_path / "runs" / "x"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]


def test_a_run_folder_in_the_users_home(tmp_path, monkeypatch):
    """Shells leave --run.output_dir=~ as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "letters" / "old").mkdir(parents=True)
    with pytest.raises(UserError, match=f"{tmp_path}/letters is not a run folder"):
        main(["--data.train=x.csv", "--run.output_dir=~", "--run.name=letters"])


def test_a_full_disk_is_noticed_at_once(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with (
        pytest.raises(UserError, match=f"{tmp_path}/run cannot be written: No space left"),
        hold_run_folder(tmp_path / "run"),
    ):
        pass


# --- caches ---


def test_two_writers_of_a_shared_file_do_not_touch_each_other(tmp_path, monkeypatch):
    right, path = locks.write_synced, tmp_path / "p.csv"

    def write(temporary, data):
        right(temporary, data)
        if data == b"first":  # another command writes the whole of its file here
            write_atomic(path, "second", is_shared=True)
            assert path.read_text() == "second"

    monkeypatch.setattr(locks, "write_synced", write)
    write_atomic(path, "first", is_shared=True)
    assert path.read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["p.csv"]


def test_a_cache_entry_is_prepared_by_one_process_at_a_time(tmp_path):
    entry = tmp_path / "x"
    with lock_cache_entry(entry, True) as part:
        assert part == tmp_path / "x.part"
        other = other_command(f"print(FileLock({str(entry) + '.lock'!r}).acquire(timeout=0))")
        assert "Timeout" in other.stderr


@pytest.mark.parametrize("no_locks", NO_LOCKS, indirect=True)
def test_without_locks_each_process_prepares_its_own_entry(tmp_path, no_locks):
    (tmp_path / "x.lock").touch()  # filelock leaves it
    with lock_cache_entry(tmp_path / "x", True) as one, lock_cache_entry(tmp_path / "x", True) as other:
        assert len({one, other, tmp_path / "x.part"}) == 3


def test_a_wait_for_a_lock_is_reported_and_ends(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "LOCK_TIMEOUT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "MESSAGE_SECONDS", 0.1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with open(tmp_path / "x.lock", "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with lock_cache_entry(tmp_path / "x", False) as part:
            assert part != tmp_path / "x.part"
    assert f"waiting for another process that prepares the same data (it holds {tmp_path}/x.lock)" in (
        capsys.readouterr().err
    )


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(("folder", "file", "inner"), [(0o2775, 0o664, 0o2775), (0o1777, 0o666, 0o777)])
def test_in_a_shared_folder_new_files_are_shared(tmp_path, folder, file, inner):
    tmp_path.chmod(folder)
    before = os.umask(0o077)
    try:
        with lock_cache_entry(tmp_path / "x", True) as part:
            part.mkdir()
            (part / "tokens").touch()
            share(part)
    finally:
        os.umask(before)
    assert mode(tmp_path / "x.lock") == file
    assert (mode(part), mode(part / "tokens")) == (inner, file)


def test_in_a_private_folder_the_umask_applies(tmp_path):
    tmp_path.chmod(0o755)
    before = os.umask(0o077)
    try:
        with lock_cache_entry(tmp_path / "x", True) as part:
            part.touch()
            share(part)
    finally:
        os.umask(before)
    assert (mode(tmp_path / "x.lock"), mode(part)) == (0o600, 0o600)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs two users")
def test_an_unreadable_lock_of_another_user_stops_no_one(tmp_path):
    place = tmp_path
    while place != place.parent:
        place.chmod(place.stat().st_mode | 0o055)
        place = place.parent
    tmp_path.chmod(0o777)
    (tmp_path / "x.lock").touch(0o600)
    child = os.fork()
    if child == 0:  # another user, who may not be able to read our environment: all is imported by now
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            with lock_cache_entry(tmp_path / "x", True) as part:
                part.touch()
                os._exit(0 if part.exists() else 3)
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [path.stat().st_uid for path in tmp_path.glob("*.part")] == [65534]

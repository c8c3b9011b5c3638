"""Streams that nobody reads, bars in log files, and paths in messages."""

import contextlib
import errno
import os
import pty
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from tests.harness.processes import ROOT
from trainer.errors import UserError, bar_settings, main_guard, quote_path
from trainer.files import writing

# A command that tells much in every way that a run does, and then leaves a file: whatever became of its words.
COMMAND = """
import logging, os, sys, threading, time, warnings
sys.path.insert(0, sys.argv[1])
from trainer.errors import UserError, main_guard

def main():
    from tqdm import tqdm
    for number in range(3):
        print("x" * 100_000, file=sys.stderr)
        print("x" * 100_000, flush=True)
        time.sleep(0.02)
    warnings.warn("a warning of a library")
    logging.getLogger().error("an error that a library logs")
    for _ in tqdm(range(3), file=sys.stderr, mininterval=0):
        tqdm.write("a line", file=sys.stderr)
    thread = threading.Thread(target=print, args=("from a thread",), kwargs={"file": sys.stderr})
    thread.start()
    thread.join()
    open(sys.argv[2], "w").write("trained")
    if sys.argv[3] == "refused":
        raise UserError("no such file")

sys.exit(main_guard(main, result_on_stdout=sys.argv[3] == "result"))
"""


@contextlib.contextmanager
def stream(kind):
    """A descriptor to write to: a pipe whose reader has left or reads nothing, a closed terminal, a full disk."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    elif kind == "terminal":
        master, descriptor = pty.openpty()
        os.close(master)
    else:
        reading, descriptor = os.pipe()
        os.set_blocking(descriptor, kind != "stuck")
        if kind == "left":
            os.close(reading)
    yield descriptor
    os.close(descriptor)
    if kind == "stuck":
        os.close(reading)


def run_command(place, out, err, how="run"):
    """Runs COMMAND with these streams, None for a closed one; returns its exit code, and whether it did its work."""
    with contextlib.ExitStack() as stack:
        given = {name: stack.enter_context(stream(kind)) for name, kind in (("stdout", out), ("stderr", err)) if kind}
        arguments = [sys.executable, "-c", COMMAND, ROOT, place / "done", how]
        closed = " ".join(f"{n}>&-" for n, kind in ((1, out), (2, err)) if kind is None)
        shell = ["sh", "-c", f"exec {shlex.join(map(str, arguments))} {closed}"]
        code = subprocess.run(shell, **{"stdout": -3, "stderr": -3, **given}, timeout=60).returncode
    return code, (place / "done").exists()


KINDS = ["left", "terminal", "full", "stuck", None]


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_continues_without_a_reader(tmp_path, kind):
    assert run_command(tmp_path, kind, kind) == (0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_without_a_reader_keeps_its_exit_code(tmp_path, kind):
    assert run_command(tmp_path, kind, kind, "refused") == (2, True)


@pytest.mark.parametrize(("kind", "code"), [("left", 0), ("full", 2), ("terminal", 2)])
def test_a_result_may_be_read_in_part_but_never_lost(tmp_path, kind, code):
    assert run_command(tmp_path, kind, "full", "result")[0] == code


def test_a_closed_stream_does_not_become_a_file(tmp_path):
    run_command(tmp_path, None, None)
    assert (tmp_path / "done").read_text() == "trained"


def test_another_broken_pipe_is_an_error(capsys):
    def main():
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    assert main_guard(main, result_on_stdout=True) == 2
    assert "Broken pipe" in capsys.readouterr().err


def test_a_bar_in_a_log_file_is_separate_lines(capsys):
    with tqdm(total=3, desc="training", **{**bar_settings(), "delay": 0, "mininterval": 0}) as bar:
        bar.update(1)
        tqdm.write("step 1", file=sys.stderr)
        bar.update(2)
    said = capsys.readouterr().err
    assert "\r" not in said
    assert "step 1" in said.splitlines()
    assert all(line.startswith(("training: ", "step 1")) for line in said.splitlines())


@pytest.mark.parametrize(
    ("path", "typed"),
    [
        ("runs/x", "runs/x"),
        ("my runs/it's", "'my runs/it'\"'\"'s'"),
        ("-x/$HOME", "'./-x/$HOME'"),
        ("--run", "./--run"),
        ("a;b", "'a;b'"),
    ],
)
def test_a_quoted_path_is_read_by_a_shell(path, typed):
    assert quote_path(path) == quote_path(Path(path)) == typed
    assert os.path.normpath(*shlex.split(quote_path(path))) == path


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")]
)
def test_a_disk_error_names_the_path(error):
    with pytest.raises(OSError, match=r"^cannot write a/b: No space left on device"), writing(Path("a/b")):
        raise error
    with pytest.raises(ValueError, match="else"), writing(Path("a/b")):
        raise ValueError("something else")


def test_main_guard(capsys, monkeypatch):
    def fails(error):
        def main():
            raise error

        return main

    assert main_guard(lambda: 143) == 143 and main_guard(lambda: None) == 0
    assert main_guard(fails(UserError("one\ntwo"))) == 2
    assert capsys.readouterr().err == "error: one\ntwo\n"
    assert main_guard(fails(OSError(28, "No space left on device", "x"))) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'x'\n"
    assert main_guard(fails(UserError("column '\033[2J\x9b\a' of x\ny"))) == 2
    assert capsys.readouterr().err == "error: column '\\x1b[2J\\x9b\\x07' of x\ny\n"
    for name, value in (("LOCAL_RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    assert main_guard(fails(UserError("one"))) == 2
    assert capsys.readouterr().err == ""
    with pytest.raises(ZeroDivisionError):
        main_guard(fails(ZeroDivisionError()))

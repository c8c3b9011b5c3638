"""launch.sh around a stub of trainer/run.py: what it starts, where, with which exit code, and how signals travel."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
STUB = """
import json, os, signal, sys, time
names = ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS", "ISOTRAIN_NUM_PROCESSES", "ACCELERATE_USE_CPU")
told = {"arguments": sys.argv[1:], "folder": os.getcwd(), **{name: os.environ.get(name) for name in names}}
print(json.dumps(told) + "\\n", end="", flush=True)
match os.environ.get("STUB", ""):
    case "mistake":
        sys.exit(2 * (print("data.train: no such file", file=sys.stderr) is None))
    case "mistake of rank 1" if os.environ["RANK"] == "1":
        sys.exit(3)
    case "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    case "long" | "mistake of rank 1":
        received = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: received.append(number))
        print("ready\\n", end="", flush=True)
        while not received:
            time.sleep(0.05)
        time.sleep(0.5)
        print("saved\\n", end="", flush=True)
        sys.exit(128 + received[0])
"""
both_topologies = pytest.mark.parametrize("topology", ["cpu", "cpu_multi"])


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    (folder / "trainer").mkdir(parents=True)
    (folder / "trainer/run.py").write_text(STUB)
    shutil.copytree(REPOSITORY / "accelerate_configs", folder / "accelerate_configs")
    for name in ("launch.sh", "requirements.txt", "requirements-quickstart.txt"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture
def start(clone: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts launch.sh from another folder, as a shell starts the foreground job: a group of its own, SIGINT heeded."""
    outer = {name: value for name, value in os.environ.items() if not re.match("NNODES|OMP_|STUB|VIRTUAL_ENV", name)}

    def foreground() -> None:
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def start(*arguments: str, path: Path = clone / "launch.sh", **environment: str) -> subprocess.Popen[str]:
        defaults = {"ISOTRAIN_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [path, *arguments],
            cwd=tmp_path,
            env=outer | defaults | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=foreground,
        )

    return start


@pytest.fixture
def launch(start: Callable[..., subprocess.Popen[str]]) -> Callable[..., subprocess.CompletedProcess[str]]:
    def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, **environment)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    return launch


@pytest.fixture
def programs(tmp_path: Path) -> Callable[..., str]:
    """A PATH that begins with small shell scripts: programs(python3="exit 1")."""

    def programs(**scripts: str) -> str:
        folder = tmp_path / "bin"
        folder.mkdir()
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return programs


def told(out: str) -> list[dict]:
    """What each rank's stub said of itself."""
    ranks = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    return sorted(ranks, key=lambda rank: int(rank["RANK"] or 0))


def test_starts_run_py_in_the_callers_folder(launch, clone, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(clone / "launch.sh")
    result = launch("--recipe", "mine.yaml", "--data.train", "a file.csv", path=link)
    assert result.returncode == 0, result.stderr
    (rank,) = told(result.stdout)
    assert rank["arguments"] == ["--recipe", "mine.yaml", "--data.train", "a file.csv"]
    assert rank["folder"] == str(tmp_path)
    assert rank["ISOTRAIN_NUM_PROCESSES"] == "1"
    assert 1 <= int(rank["OMP_NUM_THREADS"]) <= os.cpu_count()


def test_cpu_multi_is_really_several_ranks(launch):
    result = launch("--recipe=x", "--topology", "cpu_multi", "--processes", "2")
    assert result.returncode == 0, result.stderr
    ranks = told(result.stdout)
    assert [(rank["RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [("0", "2"), ("1", "2")]
    assert all(rank["ACCELERATE_USE_CPU"] == "true" and rank["ISOTRAIN_NUM_PROCESSES"] == "2" for rank in ranks)


def test_a_stale_default_config_does_not_rule(launch, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    result = launch("--recipe=x", HF_HOME=str(tmp_path))
    assert [rank["WORLD_SIZE"] for rank in told(result.stdout)] == [None]


@both_topologies
def test_run_pys_exit_code_and_words_are_the_launchers(launch, topology):
    result = launch("--recipe=x", "--topology", topology, STUB="mistake")
    assert result.returncode == 2
    assert "data.train: no such file\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert "FAILED" not in result.stderr


def test_the_first_rank_to_fail_gives_the_exit_code(launch):
    result = launch("--recipe=x", "--topology=cpu_multi", STUB="mistake of rank 1")
    assert result.returncode == 3


@both_topologies
def test_a_killed_run_is_named(launch, topology):
    result = launch("--recipe=x", "--topology", topology, STUB="killed")
    assert result.returncode == 128 + signal.SIGKILL
    assert result.stderr.splitlines()[-1].startswith("launch.sh: a process was killed")


@both_topologies
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to launch.sh", "to the group"])
def test_after_a_signal_run_py_saves_before_launch_sh_leaves(start, topology, number, send):
    process = start("--recipe=x", "--topology", topology, STUB="long")
    num_ranks = 1 if topology == "cpu" else 2
    for _ in range(num_ranks):
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, process.stderr.read()
    send(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert out.count("saved") == num_ranks
    assert "Traceback" not in err


def test_dry_run_prints_the_plan_and_the_command_and_starts_nothing(launch, clone):
    result = launch("--dry-run", "--run.precision", "bf16")
    assert result.returncode == 0
    assert told(result.stdout) == []
    words = shlex.split(result.stdout)
    config = str(clone / "accelerate_configs/cpu.yaml")
    assert words[words.index("--config_file") + 1] == config
    run = [str(clone / "trainer/run.py"), "--recipe", "quickstart", "--run.precision", "bf16"]
    assert words[-len(run) :] == run
    plan = {
        name: (value, source) for name, value, source in re.findall(r"^(\w+) +(.+?) +\((.*)\)$", result.stderr, re.M)
    }
    assert plan["topology"] == ("cpu", "no GPU visible")
    assert plan["processes"][0] == "1"
    assert plan["precision"] == ("bf16", "--run.precision")
    assert plan["python"] == (sys.executable, "ISOTRAIN_PYTHON")
    assert plan["config"][0] == config


def test_the_dry_runs_command_is_what_would_have_been_started(launch):
    command = launch("--dry-run", "--recipe", "x y").stdout
    printed = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert told(printed.stdout)[0]["arguments"] == ["--recipe", "x y"]


@pytest.mark.parametrize(
    ("visible", "nodes", "topology", "total"),
    [
        (None, "1", "multi_gpu", 4),
        ("2", "1", "gpu", 1),
        ("-1", "1", "cpu", 1),
        ("0,1", "1", "multi_gpu", 2),
        (None, "3", "multi_node", 12),
    ],
)
def test_gpus_and_nodes_choose_the_topology(launch, programs, visible, nodes, topology, total):
    path = programs(**{"nvidia-smi": "for i in 0 1 2 3; do echo GPU $i: H200; done"})
    unset = {"CUDA_VISIBLE_DEVICES": "0,1,2,3"} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    node = {"NNODES": nodes, "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    result = launch("--dry-run", PATH=path, **unset, **node)
    assert f"accelerate_configs/{topology}.yaml --num" in result.stdout.replace("\\", "")
    assert f"ISOTRAIN_NUM_PROCESSES={total} " in result.stdout
    assert ("--machine_rank 1 --main_process_ip 10.0.0.1 --main_process_port 29500" in result.stdout) == (nodes != "1")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology", "tpu"], "--topology tpu: there are cpu cpu_multi fsdp gpu multi_gpu multi_node"),
        (["--topology"], "--topology needs a value"),
        (
            ["--topology", "fsdp"],
            "--topology fsdp needs a GPU and none is visible (nvidia-smi -L); --processes N insists",
        ),
        (["--processes", "2"], "--processes 2: cpu is one process; see cpu_multi and multi_gpu"),
        (["--topology=cpu_multi", "--processes=0"], "--processes 0: 1 or more"),
        (["--topology=multi_node", "--processes=1"], "multi_node needs NNODES (and all of NNODES, NODE_RANK, "),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(launch, arguments, message):
    result = launch(*arguments)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"launch.sh: {message}")
    assert result.stderr.count("\n") == 1


def test_an_environment_without_the_pins_is_left_alone(launch, clone, programs):
    result = launch("--dry-run", ISOTRAIN_PYTHON="", PATH=programs(python3="exit 1"))
    assert "the active python3 lacks Python 3.11 or later; .venv will be made" in result.stderr
    assert not list(clone.glob(".venv*"))


def test_two_first_launches_heal_a_half_made_environment_together(start, clone, programs):
    (clone / "requirements.txt").write_text("# nothing to fetch\n")
    (clone / "requirements-quickstart.txt").write_text("")
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").symlink_to(sys.executable)
    (clone / ".venv.unfinished").touch()
    path = programs(**{"python3": "exit 1", "python3.14": f'exec "{sys.executable}" "$@"'})
    launches = [start("--setup-only", ISOTRAIN_PYTHON="", PATH=path) for _ in range(2)]
    for launched in launches:
        out, err = launched.communicate(timeout=120)
        assert out == f"{clone}/.venv/bin/python\n", err
    assert not (clone / ".venv.unfinished").exists()
    subprocess.run([clone / ".venv/bin/python", "-m", "pip", "--version"], check=True, capture_output=True)

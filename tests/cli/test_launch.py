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

    def foreground() -> None:
        os.setpgrp()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGQUIT, signal.SIG_DFL)  # a shell's & ignores both

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


def test_cpu_multi_is_really_several_ranks(launch):
    result = launch("--recipe=x", "--topology", "cpu_multi", "--processes", "2")
    assert result.returncode == 0, result.stderr
    ranks = [rank["environment"] for rank in told(result.stdout)]
    assert [(rank["RANK"], rank["WORLD_SIZE"]) for rank in ranks] == [("0", "2"), ("1", "2")]
    assert all(rank["ACCELERATE_USE_CPU"] == "true" and rank["ISOTRAIN_NUM_PROCESSES"] == "2" for rank in ranks)


def test_a_stale_default_config_does_not_rule(launch, tmp_path):
    (tmp_path / "accelerate").mkdir()
    (tmp_path / "accelerate/default_config.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    result = launch("--recipe=x", HF_HOME=str(tmp_path))
    (rank,) = told(result.stdout)
    assert "WORLD_SIZE" not in rank["environment"]


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
    [  # every pair of values once
        pytest.param("cpu", signal.SIGINT, os.kill, id="cpu-INT-to launch.sh"),
        pytest.param("cpu", signal.SIGTERM, os.killpg, id="cpu-TERM-to the group"),
        pytest.param("cpu_multi", signal.SIGINT, os.killpg, id="cpu_multi-INT-to the group"),
        pytest.param("cpu_multi", signal.SIGTERM, os.kill, id="cpu_multi-TERM-to launch.sh"),
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


def test_a_mistake_is_not_tried_again(launch):
    result = launch("--recipe=x", "--max-restarts=1", STUB="mistake")
    assert result.returncode == 2
    assert len(told(result.stdout)) == 1


@pytest.mark.parametrize(
    ("code", "lost"),
    [(0, False), (1, True), (2, False), (3, False), (75, True), (129, False), (130, False), (131, False), (137, True),
     (138, False), (139, True), (143, False)],
)  # fmt: skip
def test_which_ends_are_a_loss(code, lost):
    assert launcher._was_lost(code) == lost


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
    time.sleep(launcher.PAUSE_SECONDS / 2)
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


def slurm(rank: int, tasks_per_node: str) -> dict[str, str]:
    """What srun sets for a task, of a step with so many on each host: 2(x3),1 reads 2, 2, 2 and 1."""
    counts = [
        int(count)
        for count, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks_per_node)
        for _ in range(int(times or 1))
    ]
    hosts = [host for host, count in enumerate(counts) for _ in range(count)]
    return {
        "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_JOB_NUM_NODES": str(len(counts)),
        "SLURM_STEP_NUM_NODES": str(len(counts)), "SLURM_STEP_NUM_TASKS": str(len(hosts)),
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_STEP_NODELIST": "node[7-9]",
        "SLURM_PROCID": str(rank), "SLURM_NODEID": str(hosts[rank]),
        "SLURM_LOCALID": str(hosts[:rank].count(hosts[rank])),
    }  # fmt: skip


SCONTROL = '[ "$*" = "show hostnames node[7-9]" ] && printf "%s\\n" 127.0.0.1 elsewhere'


def test_two_tasks_of_srun(start_nodes, programs):
    ended = start_nodes(
        "--recipe=x", node=lambda rank: slurm(rank, "1(x2)"), PATH=programs(scontrol=SCONTROL),
        OMP_NUM_THREADS="3", STUB_MEETS="yes",
    )  # fmt: skip
    assert [node.returncode for node in ended] == [0, 0], ended[0].stderr
    ranks = [rank for node in ended for rank in told(node.stdout)]
    assert seen(ranks) == two_ranks(a_node_each=True)
    assert 20_000 <= int(ranks[0]["environment"]["MASTER_PORT"]) < 40_000
    assert [node.stderr.count("topology ") for node in ended] == [1, 0]  # srun shows both


# ---- the plan --------------------------------------------------------------------------------------------------------


def plan(err: str) -> dict[str, tuple[str, str]]:
    return {name: (value, source) for name, value, source in re.findall(r"^(\w+) +(.+?) +\((.*)\)$", err, re.MULTILINE)}


def test_dry_run_prints_the_plan_and_the_command_and_starts_nothing(launch, clone):
    result = launch("--dry-run", "--run.precision", "bf16")
    assert result.returncode == 0
    assert told(result.stdout) == []
    words = shlex.split(result.stdout)
    config = str(clone / "accelerate_configs/cpu.yaml")
    assert words[words.index("--config_file") + 1] == config
    run = [str(clone / "trainer/run.py"), "--recipe", "quickstart", "--run.precision", "bf16"]
    assert words[-len(run) :] == run
    printed = plan(result.stderr)
    assert printed["topology"] == ("cpu", "no GPU visible")
    assert printed["processes"][0] == "1"
    assert printed["precision"] == ("bf16", "--run.precision")
    assert printed["python"] == (sys.executable, "ISOTRAIN_PYTHON")
    assert printed["config"][0] == config


def test_the_dry_runs_command_is_what_would_have_been_started(launch, tmp_path):
    command = launch("--dry-run", "--recipe", "x y").stdout
    printed = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
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
    ("tasks_per_node", "rank", "gpus", "arguments", "total", "devices"),
    [
        ("1(x2)", 1, "0,1,2,3", [], 8, None),  # one task a host: it takes all
        ("1(x2)", 1, "", [], 2, None),
        ("1(x2)", 1, "", ["--processes=3"], 6, None),
        ("4(x2)", 6, "4,5,6,7", [], 8, "6"),  # each task its own
        ("2(x2)", 3, "4,5,6,7", ["--processes=2"], 8, "6,7"),
        ("4(x2)", 6, "3", [], 8, None),  # as Slurm has shared them out
        ("2,1", 2, "0,1", [], 3, None),
        ("2(x3),1", 5, "0,1", [], 7, "1"),
    ],
)
def test_processes_and_gpus_of_a_task(launch, programs, tasks_per_node, rank, gpus, arguments, total, devices):
    path = programs(scontrol=SCONTROL, **{"nvidia-smi": "for i in 0 1 2 3 4 5 6 7; do echo GPU $i: H200; done"})
    result = launch("--dry-run", *arguments, PATH=path, CUDA_VISIBLE_DEVICES=gpus, **slurm(rank, tasks_per_node))
    words = shlex.split(result.stdout)
    assert f"ISOTRAIN_NUM_PROCESSES={total}" in words, result.stderr
    assert ("ACCELERATE_USE_CPU=true" in words) == (gpus == "")
    assert [word for word in words if word.startswith("CUDA_")] == [f"CUDA_VISIBLE_DEVICES={devices}"] * bool(devices)
    assert words[words.index("--machine_rank") + 1] == str(rank)


def test_more_tasks_than_gpus(launch, programs):
    path = programs(**{"nvidia-smi": "for i in 0 1; do echo GPU $i: H200; done"})
    result = launch(PATH=path, CUDA_VISIBLE_DEVICES="0,1", **slurm(1, "3"))
    assert result.returncode == 2
    assert re.search(r"^launch.sh: 3 tasks on .* need 3 GPUs, and 2 are visible$", result.stderr, re.MULTILINE)


def test_the_plan_of_a_task(launch, programs):
    own = {"MASTER_ADDR": "", "MASTER_PORT": "29500"}
    result = launch("--dry-run", PATH=programs(scontrol=SCONTROL), **slurm(1, "1(x2)"), **own)
    assert (
        plan(result.stderr).items()
        >= {
            "topology": ("multi_node", "srun with several tasks"),
            "nodes": ("2", "tasks of srun"),
            "node_rank": ("1", "SLURM_PROCID"),
            "master": ("127.0.0.1:29500", "the first of SLURM_STEP_NODELIST and MASTER_PORT"),
            "processes": ("1", "default of multi_node"),
        }.items()
    )


def test_a_job_script_without_srun_is_told_so(launch):
    note = "note: one task only runs here"
    assert note in launch("--dry-run", SLURM_JOB_NUM_NODES="2").stderr
    assert note in launch("--dry-run", SLURM_NTASKS="2").stderr
    assert note not in launch("--dry-run", SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1").stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-restarts=-1"], "--max-restarts -1: 0 or more"),
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

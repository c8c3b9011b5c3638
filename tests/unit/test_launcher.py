"""What launch.sh plans: topology, processes, threads, devices and precision, by its options and the environment."""

import argparse
import os
import re

import psutil
import pytest

from trainer import launcher
from trainer.launcher import Choice, Mistake

MASTER = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
PODS = {**MASTER, "WORLD_SIZE": "2", "RANK": "1"}
NODE = {**MASTER, "NNODES": "3", "NODE_RANK": "1"}


def srun(rank, tasks_per_node, **more):
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
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node, "SLURM_PROCID": str(rank), "SLURM_NODEID": str(hosts[rank]),
        "SLURM_LOCALID": str(hosts[:rank].count(hosts[rank])), "MASTER_ADDR": "10.0.0.1", **more,
    }  # fmt: skip


def plan(*words, num_gpus=0, **environment):
    """The rows of the plan as {name: "value (reason)"}, and the words of the command."""
    options = launcher.parse_options(words)
    rows, command = launcher.make_plan(options, Choice("python", "a test"), environment, num_gpus)
    return {name: f"{choice.value} ({choice.reason})" for name, choice in rows.items()}, command


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts small shell scripts first on the PATH: programs(rocminfo="exit 1")."""

    def programs(**scripts):
        for name, script in scripts.items():
            path = tmp_path / name.replace("_", "-")
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return programs


# ---- who else is there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "environment", "nodes", "rank", "total"),
    [
        ([], PODS, "2 (WORLD_SIZE)", "1 (RANK)", 2),
        (["--processes=2"], PODS, "2 (WORLD_SIZE)", "1 (RANK)", 4),
        ([], PODS | {"WORLD_SIZE": "4", "PET_NNODES": "2", "PET_NPROC_PER_NODE": "2"}, "2 (PET_NNODES)", "1 (RANK)", 4),
        (
            [],
            {"PET_NNODES": "3", "PET_NODE_RANK": "2", "PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "10.0.0.1",
             "PET_MASTER_PORT": "29500"},
            "3 (PET_NNODES)", "2 (PET_NODE_RANK)", 3,
        ),
        ([], PODS | {"NNODES": "3", "NODE_RANK": "0"}, "3 (NNODES)", "0 (NODE_RANK)", 3),
        ([], srun(2, "4", WORLD_SIZE="4", RANK="2", LOCAL_RANK="2", PMI_SIZE="4"), "4 (tasks of srun)",
         "2 (SLURM_PROCID)", 4),
        (["--topology=cpu"], srun(2, "4"), None, None, 1),
        ([], {"WORLD_SIZE": "1", "RANK": "0", "PET_NNODES": "1"}, None, None, 1),
        ([], {"PET_NNODES": "1", "PET_NPROC_PER_NODE": "2"}, None, None, 2),
        (["--processes=3"], {}, None, None, 3),
    ],
)  # fmt: skip
def test_the_group_is_that_of_the_launcher_around_it(words, environment, nodes, rank, total):
    rows, command = plan(*words, **environment)
    assert (rows.get("nodes"), rows.get("node_rank")) == (nodes, rank)
    assert f"ISOTRAIN_NUM_PROCESSES={total}" in command
    assert {"ISOTRAIN_DEVICE=cpu", "ISOTRAIN_PRECISION=auto", "ACCELERATE_USE_CPU=true"} <= set(command)


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        (["--topology=cpu_multi"], PODS, "--topology=cpu_multi is for one machine, and WORLD_SIZE=2"),
        (["--topology=cpu"], NODE, "--topology=cpu is for one machine, and NNODES=3"),
        (["--topology=cpu_multi"], srun(2, "4"), "--topology=cpu_multi is for one machine, and srun has several tasks"),
        ([], PODS | {"RANK": ""}, "multi_node needs NODE_RANK"),
        ([], PODS | {"LOCAL_RANK": "0"}, "WORLD_SIZE=2 and LOCAL_RANK=0: another launcher started this"),
        ([], PODS | {"WORLD_SIZE": "two"}, "WORLD_SIZE=two: must be a whole number, 1 or more"),
        ([], NODE | {"NNODES": "two"}, "NNODES=two: must be a whole number, 1 or more"),
        ([], NODE | {"NNODES": "10", "NODE_RANK": "08"}, "NODE_RANK=08: must be a whole number from 0 to 9"),
        ([], PODS | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999: must be a whole number from 1 to 65535"),
        ([], PODS | {"PET_NNODES": "1:3", "PET_RDZV_BACKEND": "c10d"}, "PET_NNODES=1:3: must be a whole number"),
        ([], {"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: this is one of several processes"),
        (["--topology=cpu"], {"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "MPI_LOCALNRANKS=2: this is one of several"),
        ([], {"SM_HOSTS": '["algo-1","algo-2"]'}, "SM_HOSTS="),
        (["--max-restarts=-1"], {}, "--max-restarts=-1: must be a whole number, 0 or more"),
        (["--topology", "tpu"], {}, "--topology=tpu: must be one of cpu cpu_multi fsdp gpu multi_gpu multi_node"),
        (["--topology="], {}, "--topology=: must be one of cpu"),
        (["--topology", "fsdp"], {}, "--topology=fsdp needs a GPU"),
        (["--topology=cpu", "--processes=2"], {}, "--processes=2: cpu is one process; use cpu_multi or multi_gpu"),
        (["--topology=cpu_multi", "--processes=0"], {}, "--processes=0: must be a whole number, 1 or more"),
        (["--processes="], {}, "--processes=: must be a whole number, 1 or more"),
        (["--topology=multi_node", "--processes=1"], {}, "multi_node needs NNODES; set NNODES, NODE_RANK, "),
    ],
)
def test_what_would_train_alone_or_not_at_all_is_refused(words, environment, message):
    with pytest.raises(Mistake, match=f"^{re.escape(message)}"):
        plan(*words, **environment)


def test_an_option_without_its_value_is_named():
    with pytest.raises(argparse.ArgumentError, match="--topology: expected one argument"):
        launcher.parse_options(["--dry-run", "--topology"])


def test_the_options_of_run_py_pass_unchanged():
    words = ["--data.train", "a file.csv", "--recipe=mine.yaml", "--optim.eps", "-1", "--top", "x", "--run.name", "-hi"]
    assert launcher.parse_options([*words, "--dry-run"]).arguments == words
    assert launcher.parse_options(["--run.name", "x"]).arguments == ["--recipe", "quickstart", "--run.name", "x"]


def test_a_job_script_without_srun_is_told_so(capsys):
    def note_of(**environment):
        launcher.print_plan({}, environment)
        return capsys.readouterr().err

    assert "srun ./launch.sh" in note_of(SLURM_JOB_NUM_NODES="2")
    assert "srun ./launch.sh" in note_of(SLURM_NTASKS="2")
    assert note_of(SLURM_NTASKS="1", SLURM_JOB_NUM_NODES="1") == note_of(**srun(0, "2")) == "\n"


# ---- GPUs, cores and precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "num_gpus", "topology", "total"),
    [
        ({}, 4, "multi_gpu (4 GPUs visible)", 4),
        ({}, 1, "gpu (one GPU visible)", 1),
        ({}, 0, "cpu (no GPU visible)", 1),
        (NODE, 4, "multi_node (NNODES=3)", 12),
    ],
)
def test_gpus_and_nodes_choose_the_topology(environment, num_gpus, topology, total):
    rows, command = plan(num_gpus=num_gpus, **environment)
    assert rows["topology"] == topology
    assert f"ISOTRAIN_NUM_PROCESSES={total}" in command
    address = "GROUP_RANK=1 MASTER_ADDR=10.0.0.1 MASTER_PORT=29500"
    assert (address in " ".join(command)) == (environment == NODE)


@pytest.mark.parametrize(
    ("tasks_per_node", "rank", "gpus", "words", "total", "devices"),
    [
        ("1(x2)", 1, "0,1,2,3", [], 8, None),  # one task a host: it takes all
        ("1(x2)", 1, "", [], 2, None),
        ("1(x2)", 1, "", ["--processes=3"], 6, None),
        ("4(x2)", 6, "4,5,6,7", [], 8, "6"),  # each task its own
        ("2(x2)", 3, "4,5,6,7", ["--processes=2"], 8, "6,7"),
        ("4(x2)", 6, "3", [], 8, None),  # as Slurm has shared them out
        ("2,1", 2, "0,1", [], 3, None),
        ("2(x3),1", 5, "0,1", [], 7, "1"),
        ("2", 1, "0,1", ["--topology=gpu"], 1, "1"),  # a sweep
    ],
)
def test_processes_and_gpus_of_a_task(tasks_per_node, rank, gpus, words, total, devices):
    task = srun(rank, tasks_per_node, CUDA_VISIBLE_DEVICES=gpus)
    _, command = plan(*words, num_gpus=len(gpus.split(",")) if gpus else 0, **task)
    assert f"ISOTRAIN_NUM_PROCESSES={total}" in command
    assert ("ACCELERATE_USE_CPU=true" in command) == (gpus == "")
    assert [word for word in command if word.startswith("CUDA_")] == [f"CUDA_VISIBLE_DEVICES={devices}"] * bool(devices)
    if "--topology=gpu" not in words:
        assert f"GROUP_RANK={rank}" in command


def test_more_tasks_than_gpus():
    with pytest.raises(Mistake, match=r"^3 tasks on .* need 3 GPUs, and 2 are visible$"):
        plan(num_gpus=2, **srun(1, "3"))


def test_the_plan_of_a_task(programs):
    programs(scontrol='[ "$*" = "show hostnames node[7-9]" ] && printf "%s\\n" 10.0.0.7 elsewhere')
    task = srun(1, "1(x2)", MASTER_ADDR="", SLURM_STEP_NODELIST="node[7-9]")
    rows, _ = plan(**task, MASTER_PORT="29500")
    assert rows.items() >= {
        "topology": "multi_node (srun has several tasks)",
        "nodes": "2 (tasks of srun)",
        "node_rank": "1 (SLURM_PROCID)",
        "master": "10.0.0.7:29500 (the first of SLURM_STEP_NODELIST and MASTER_PORT)",
        "processes": "1 (default of multi_node)",
    }.items()  # fmt: skip
    port = int(plan(**task)[0]["master"].partition(":")[2].split(" ")[0])
    assert 20_000 <= port < 32_000 and plan(**task | {"SLURM_PROCID": "0"})[0]["master"] == plan(**task)[0]["master"]


def test_the_plan_of_gpus_goes_to_run_py():
    _, command = plan("--run.precision=bf16", num_gpus=2)
    assert {"ISOTRAIN_DEVICE=cuda", "ISOTRAIN_PRECISION=bf16", "ACCELERATE_USE_CPU=false"} <= set(command)


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({}, 4),
        ({"CUDA_VISIBLE_DEVICES": "2"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1,GPU-2,GPU-3"}, 3),
        ({"ACCELERATE_USE_CPU": "true"}, 0),
    ],
)
@pytest.mark.parametrize("maker", ["nvidia", "amd"])
def test_visible_gpus_are_counted(programs, maker, environment, count):
    if maker == "nvidia":
        programs(nvidia_smi="for i in 0 1 2 3; do echo GPU $i: H200; done")
    else:
        agents = "for i in 0 1 2 3; do echo '  Device Type:             GPU'; done"
        programs(nvidia_smi="echo no driver; exit 9", rocminfo=f"echo '  Device Type:             CPU'; {agents}")
    assert launcher.count_gpus(environment) == count


def test_amds_own_variable_hides_gpus(programs):
    programs(nvidia_smi="exit 9", rocminfo="echo '  Device Type:             GPU'")
    assert launcher.count_gpus({"HIP_VISIBLE_DEVICES": "-1"}) == 0


def test_cores_are_shared_by_processes_and_tasks(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(32)), raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda logical: 16)
    assert launcher.count_cores({}, 0) <= 16  # a container may have less
    assert launcher.count_cores({"SLURM_CPUS_ON_NODE": "7"}, 4) == 2
    rows, _ = plan("--topology=cpu_multi", "--processes=40")
    assert rows["threads"] == "1 (cores / processes)"
    assert plan(OMP_NUM_THREADS="3")[0]["threads"] == "3 (OMP_NUM_THREADS)"


def test_the_topologys_file_may_set_the_precision(monkeypatch, tmp_path):
    for text, row in (("bf16", "bf16 (cpu.yaml)"), ("no", "auto (run.precision decides; cpu.yaml leaves it open)")):
        (tmp_path / "cpu.yaml").write_text(f"mixed_precision: {text}\n")
        monkeypatch.setitem(launcher.TOPOLOGIES, "cpu", tmp_path / "cpu.yaml")
        assert plan()[0]["precision"] == row
    assert plan("--run.precision", "fp16")[0]["precision"] == "fp16 (--run.precision)"


# ---- the ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "lost"),
    [(0, False), (1, True), (2, False), (3, False), (75, True), (129, False), (130, False), (131, False), (137, True),
     (138, False), (139, True), (143, False)],
)  # fmt: skip
def test_which_ends_are_a_loss(code, lost):
    assert launcher.is_lost(code) == lost


# ---- --verify --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "num_gpus", "topology", "processes"),
    [
        ([], 0, "cpu_multi", 2),
        (["--topology=cpu"], 2, "cpu_multi", 2),
        (["--processes=4"], 0, "cpu_multi", 4),
        ([], 1, "gpu", 1),
        ([], 4, "multi_gpu", 4),
    ],
)
def test_verify_runs_on_all_gpus_or_two_processes(monkeypatch, capsys, words, num_gpus, topology, processes):
    monkeypatch.setattr(launcher, "count_gpus", lambda environment: num_gpus)
    assert launcher.follow_options(launcher.Choice("python", "a test"), True, ["--verify", "--dry-run", *words]) == 0
    command = capsys.readouterr().out.split()
    assert command == ["python", launcher.VERIFY, "--topology", topology, "--processes", str(processes)]


def test_verify_checks_one_machine():
    words = ["--verify", "--dry-run", "--topology=fsdp", "--processes=2"]
    with pytest.raises(launcher.Mistake, match="checks one machine: use --topology"):
        launcher.follow_options(launcher.Choice("python", "a test"), True, words)

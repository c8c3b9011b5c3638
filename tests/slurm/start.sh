#!/usr/bin/env bash
# A Slurm of this machine alone, on loopback: start.sh FOLDER keeps all it writes in FOLDER, says "SLURM_CONF=..." once a
# job can run, and stops when its input ends or a signal comes. A Slurm that is configured here is not touched: conf, key,
# socket and ports are its own. As root, for slurmd starts tasks as any user. No cgroups, no accounting.
set -euo pipefail

folder=$(readlink -f -- "$1") host=$(hostname -s) cpus=$(nproc)
export SLURM_CONF=$folder/slurm.conf
PATH+=:/usr/sbin

daemons=()
stop() {
    trap - EXIT
    scancel --quiet --user root 2>/dev/null || true
    # The steps first: what outlives the daemons tries for minutes to reach them.
    for ((i = 0; i < 100; i++)); do [[ -n $(squeue --noheader 2>/dev/null) ]] && sleep 0.1 || break; done
    kill "${daemons[@]}" 2>/dev/null || true
    wait
}
trap stop EXIT
trap exit INT TERM

read -r controller node < <(python3 - <<'PYTHON'
import socket
free = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(port.getsockname()[1] for port in free))
PYTHON
)

mkdir -p "$folder"/{state,spool}
# cred_expire, 5 s at least, is also how long a job that is queued again waits: 2 minutes, if nothing is said.
cat >"$SLURM_CONF" <<EOF
ClusterName=isotrain
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$controller
SlurmdPort=$node
SlurmUser=root
AuthInfo=socket=$folder/munge.socket,cred_expire=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=bf_interval=1,sched_interval=1
KillWait=5
MailProg=/bin/true
NodeName=$host NodeAddr=127.0.0.1 CPUs=$((cpus > 2 ? cpus : 2))
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE
EOF

start() {
    "$@" </dev/null >>"$folder/daemons.log" 2>&1 &
    daemons+=($!)
}
await() { # seconds command...
    local deadline=$((SECONDS + $1))
    until "${@:2}" >/dev/null 2>&1; do
        if ((SECONDS >= deadline)); then
            echo "start.sh: no success within $1 s: ${*:2}; see $folder/*.log" >&2
            exit 1
        fi
        sleep 0.2
    done
}

(umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
start munged --foreground --force --key-file "$folder/munge.key" --socket "$folder/munge.socket" \
    --pid-file "$folder/munged.pid" --log-file "$folder/munged.log" --seed-file "$folder/munged.seed"
await 10 test -S "$folder/munge.socket"
start slurmctld -D -f "$SLURM_CONF"
start slurmd -D -f "$SLURM_CONF"
await 30 srun --immediate=5 true
echo "SLURM_CONF=$SLURM_CONF"
cat >/dev/null

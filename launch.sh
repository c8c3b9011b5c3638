#!/usr/bin/env bash
# The front door: finds a Python for trainer/launcher.py, which makes the environment, plans the run and starts it.
# It never changes directory, so relative paths stay the caller's and `runs/` appears where the command was typed.
[ -n "${BASH_SOURCE-}" ] || { echo "launch.sh: type ./launch.sh or bash launch.sh (no other shell, no pipe)" >&2; exit 2; }
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")

# Becomes the launcher if this is Python 3.11 or later, the first to know -P.
try() { # PYTHON REASON OPTIONS...
    ! "$1" -P -c '' 2>/dev/null || exec "$1" -P "$root/trainer/launcher.py" active "${@:2}"
}

die() {
    echo "launch.sh: $*" >&2
    exit 2
}

if [[ -n ${ISOTRAIN_PYTHON-} ]]; then
    try "$ISOTRAIN_PYTHON" "" "$@"
    die "ISOTRAIN_PYTHON=$ISOTRAIN_PYTHON lacks Python 3.11 or later; name another interpreter, or unset it"
fi
try "${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python3" "" "$@"
for python in python3.14 python3.13 python3.12 python3.11 "$root/.venv/bin/python"; do
    try "$python" "the active python3 lacks Python 3.11 or later" "$@"
done
die "no Python 3.11 or later on the PATH"

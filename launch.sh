#!/usr/bin/env bash
# The front door: finds a Python for trainer/launcher.py, which makes the environment, plans the run and starts it.
# It never changes directory, so relative paths stay the caller's and `runs/` appears where the command was typed.
[ -n "${BASH_SOURCE-}" ] || { echo "launch.sh: type ./launch.sh or bash launch.sh (no other shell, no pipe)" >&2; exit 2; }
set -euo pipefail

root=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
launcher=$root/trainer/launcher.py

main() {
    if [[ -n ${ISOTRAIN_PYTHON-} ]]; then
        missing=$(missing_pin "$ISOTRAIN_PYTHON" any)
        [[ -z $missing ]] ||
            die "ISOTRAIN_PYTHON=$ISOTRAIN_PYTHON lacks $missing; install requirements.txt into it, or unset it"
        plan "$ISOTRAIN_PYTHON" ISOTRAIN_PYTHON "$@"
    fi
    active=${VIRTUAL_ENV:+$VIRTUAL_ENV/bin/}python3
    missing=$(missing_pin "$active")
    [[ -n $missing ]] || plan "$(command -v "$active")" "the active environment" "$@"
    python=$root/.venv/bin/python reason="the active python3 lacks $missing"
    if [[ ! -e $root/.venv.unfinished && -z $(missing_pin "$python") ]]; then plan "$python" "$reason" "$@"; fi
    base=$(find_python)
    exec "$base" -P "$launcher" create "$python" "$reason; .venv will be made" "$@"
}

# Prints the first pin that an interpreter does not meet. With `any`, every version of a package will do.
missing_pin() { # python [any]
    "$1" -P "$launcher" missing "$root/requirements.txt" "${@:2}" 2>/dev/null || echo "Python 3.11 or later"
}

plan() { exec "$1" -P "$launcher" plan "$@"; }

find_python() {
    for name in python3.14 python3.13 python3.12 python3.11 python3; do
        "$name" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue
        echo "$name"
        return
    done
    die "no Python 3.11 or later (with its venv module) on the PATH"
}

die() {
    echo "launch.sh: $*" >&2
    exit 2
}

main "$@"

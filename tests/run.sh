#!/usr/bin/env bash
# All the project checks of itself: lint, format, types, tests. Arguments go to pytest: tests/run.sh tests/unit -k name
set -euo pipefail
cd -- "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/.."

stage() {
    echo "==> $*"
    "$python" -m "$@"
}

python=$(./launch.sh --setup-only) # the active environment if it has the pins, else .venv
export HF_HUB_OFFLINE=1            # no test may need a model hub

stage pip install -qq -r requirements-dev.txt
stage ruff check
stage ruff format --check
stage mypy trainer
echo "==> lint-imports"
"${python%/*}/lint-imports" --no-cache

# More processes than there are cores here: half of the tests wait. In the order of the folders, which begins with the
# slow files; else those of few tests would come last, and the longest alone.
stage pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder "$@"

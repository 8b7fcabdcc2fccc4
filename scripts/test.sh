#!/usr/bin/env bash
# Makes .venv in a fresh clone, builds the package in it, and runs pytest.
# Arguments are passed to pytest: scripts/test.sh tests/indexer/test_quantize.py -k token
# The tests run in one process per core. -n 0 and --pdb run them in a single process.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env "[test]"
# Each process has a core, so it needs one thread. tests/tooling/test_openmp.py sets more.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A process needs 1 GB. It gets neighbouring tests, so that few files run in two processes.
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"

#!/usr/bin/env bash
# From a fresh clone to a test run: makes .venv, builds the package in it, runs pytest.
# Arguments go to pytest: scripts/test.sh tests/indexer/test_quantize.py -k token
# The tests run in as many processes as there are cores; -n 0 keeps them in one, and so does --pdb.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env "[test]"
# Each process has a core, so it needs one thread. tests/tooling/test_openmp.py sets more.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A process takes 1 GB. It gets neighbouring tests, so that few files are shared by two.
exec .venv/bin/python -m pytest -n auto --maxprocesses 8 --dist worksteal "$@"

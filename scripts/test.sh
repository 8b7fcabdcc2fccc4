#!/usr/bin/env bash
# From a fresh clone to a test run: makes .venv, builds the package in it, runs pytest.
# Arguments go to pytest: scripts/test.sh tests/indexer/test_quantize.py -k token
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env "[test]"
# NumPy's matrix products wait busily on a machine with other work.
export OPENBLAS_NUM_THREADS="${OPENBLAS_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest "$@"

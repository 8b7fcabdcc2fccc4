#!/usr/bin/env bash
# From a fresh clone to the demo: makes .venv, builds the package in it, runs the demo.
# Arguments go to the demo: scripts/demo.sh --prompt "The yield"
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env ""
exec .venv/bin/python -m fastattn demo "$@"

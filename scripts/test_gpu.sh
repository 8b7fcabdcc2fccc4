#!/usr/bin/env bash
# Tests a GPU library on a machine with a GPU, with a CUDA build of Paddle.
#
#   scripts/test_gpu.sh [--library build/gpu/_fastattn_ops.so] [--log FILE]
#                       [--python python3] [--sanitize "PYTEST ARGUMENTS"]
#
# It runs all tests on the CPU and on the GPU, then compute-sanitizer's memcheck and racecheck on
# the tests that --sanitize selects. The log has the machine and all commands. The status is 0 if
# all passed.
set -euo pipefail

cd "$(dirname "$0")/.."
library=build/gpu/_fastattn_ops.so
log=build/gpu/test_gpu.log
python=python3
sanitize="tests/cache/test_append_cache.py -k gpu"
while [ $# -gt 0 ]; do
  case "$1" in
    --library) library=$2 ;;
    --log) log=$2 ;;
    --python) python=$2 ;;
    --sanitize) sanitize=$2 ;;
    *)
      echo "unknown argument: $1" >&2
      exit 2
      ;;
  esac
  shift 2
done

FASTATTN_LIBRARY=$(cd "$(dirname "$library")" && pwd)/$(basename "$library")
export FASTATTN_LIBRARY
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1
mkdir -p "$(dirname "$log")"

sanitizer() {
  if [ -n "${COMPUTE_SANITIZER:-}" ]; then
    echo "$COMPUTE_SANITIZER"
  else
    command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer
  fi
}

run() {
  echo
  echo "\$ $*"
  "$@" || failed="$failed; $*"
}

failed=""
{
  date -u +%Y-%m-%dT%H:%M:%SZ
  nvidia-smi --query-gpu=name,compute_cap,driver_version,memory.total --format=csv,noheader
  run "$python" -m fastattn show-config --check
  run "$python" -m pytest tests -p no:cacheprovider
  read -r -a chosen <<<"$sanitize"
  for tool in memcheck racecheck; do
    # Only fastattn's kernels are instrumented, because Paddle's driver probes count as errors.
    run "$(sanitizer)" --tool "$tool" --error-exitcode 9 --report-api-errors no \
      --kernel-name kernel_substring=fastattn --print-limit 20 "$python" -m pytest -p no:cacheprovider "${chosen[@]}"
  done
  echo
  echo "failed:${failed:- nothing}"
} 2>&1 | tee "$log"
grep -q '^failed: nothing$' "$log"

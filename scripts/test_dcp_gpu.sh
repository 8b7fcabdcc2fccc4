#!/usr/bin/env bash
# Tests decode context parallelism on two GPUs through NCCL, with a CUDA build of Paddle.
#
#   scripts/test_dcp_gpu.sh [--library build/gpu/_fastattn_ops.so] [--python python3]
#
# tests/server/test_dcp.py and test_dcp_latent.py run in CPU processes through gloo, and on the GPUs
# ("gpu2"). Only collectives and fastattn's operators run on the GPUs, so a Paddle without kernels
# for them is sufficient.
set -euo pipefail

cd "$(dirname "$0")/.."
library=build/gpu/_fastattn_ops.so
python=python3
while [ $# -gt 0 ]; do
  case "$1" in
    --library) library=$2 ;;
    --python) python=$2 ;;
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
# Multicast over NVLink may crash GPUs that a virtual machine shares with others.
export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}

gpus=$(nvidia-smi --query-gpu=index --format=csv,noheader | wc -l)
if [ "$gpus" -lt 2 ]; then
  echo "two GPUs are needed, found $gpus" >&2
  exit 2
fi
nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv,noheader
exec "$python" -m pytest -p no:cacheprovider tests/server/test_dcp.py tests/server/test_dcp_latent.py -rs

#!/usr/bin/env bash
# CUDA kernels without a GPU: compiles some of them to PTX and runs their tests in the interpreter
# of tests/virtual_gpu (CONTRIBUTING.md, "Without a GPU").
#
#   scripts/test_virtual_gpu.sh [PYTEST ARGUMENTS]
#
#   KERNELS               regular expression of the .cu files to compile
#   FASTATTN_HEAD_DIMS    head dimensions to compile, default 64
#
# Needs nvcc, a CPU with AVX2, and the .venv that scripts/test.sh makes.
set -euo pipefail

cd "$(dirname "$0")/.."
attention='attention/(launch|query_transform)|mma_sm80/(merge|(e2m1|int4|e4m3|bf16)_64_paged)'
writers='rope_write/(launch|bf16_(none|fp8_e4m3|block_wise_(int4|mxfp4)))|kv_signal'
KERNELS=${KERNELS:-"$attention|$writers|cuda/(common|cache/append|topk|mxfp4|merge_many)"}
export FASTATTN_HEAD_DIMS=${FASTATTN_HEAD_DIMS:-64}

if ! grep -q '\bavx2\b' /proc/cpuinfo; then
  echo "skipped: the interpreter needs a CPU with AVX2"
  exit 0
fi
.venv/bin/python scripts/build_virtual_gpu.py --python .venv/bin/python --only "$KERNELS"

export FASTATTN_LIBRARY=$PWD/build/virtual_gpu/_fastattn_ops.so
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ $# -eq 0 ]; then
  .venv/bin/python -m pytest -q -p no:cacheprovider tests/virtual_gpu
  set -- -q tests/cache/test_4_bit_caches.py tests/cache/test_append_cache.py \
    tests/attention/test_paged_attention.py tests/indexer/test_topk.py -k gpu
fi
exec .venv/bin/python -m pytest -p no:cacheprovider "$@"

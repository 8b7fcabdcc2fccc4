#!/usr/bin/env bash
# Tests CUDA kernels without a GPU. It compiles some kernels to PTX and runs their tests in the
# interpreter of tests/virtual_gpu (CONTRIBUTING.md, "Without a GPU").
#
#   scripts/test_virtual_gpu.sh [PYTEST ARGUMENTS]
#
#   KERNELS               regular expression of the .cu files to compile
#   FASTATTN_HEAD_DIMS    head dimensions to compile, default 64
#
# It needs nvcc, a CPU with AVX2, and the .venv of scripts/test.sh.
set -euo pipefail

cd "$(dirname "$0")/.."
codes='e2m1|int4|int8_int4|e4m3|bf16'
attention="attention/(launch|query_transform)|split_kv|mma_sm80/($codes)_64_paged"
writers='rope_write/(launch|bf16_(bf16|e4m3|token_int4|token_int8_int4|group32ue8m0))|host_calls'
others="cuda/(common|cache/append|topk|block_summaries|mxfp4|merge_many)"
KERNELS=${KERNELS:-"$attention|$writers|$others"}
export FASTATTN_HEAD_DIMS=${FASTATTN_HEAD_DIMS:-64}

for needed in avx2 fma f16c; do
  grep -qw "$needed" /proc/cpuinfo && continue
  echo "skipped: the interpreter needs a CPU with $needed"
  exit 0
done
.venv/bin/python scripts/build_virtual_gpu.py --python .venv/bin/python --only "$KERNELS"

export FASTATTN_LIBRARY=$PWD/build/virtual_gpu/_fastattn_ops.so
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
[ $# -eq 0 ] || exec .venv/bin/python -m pytest -p no:cacheprovider "$@"

.venv/bin/python -m pytest -p no:cacheprovider -q tests/virtual_gpu
# A test whose kernel is not in the build is skipped. At least 5 of each file must run.
tested="cache/test_append_cache indexer/test_topk"
tested="$tested attention/test_paged_attention attention/test_block_selection"
for file in $tested; do
  VIRTUAL_GPU_LEAST=5 .venv/bin/python -m pytest -p no:cacheprovider -q "tests/$file.py" -k gpu
done

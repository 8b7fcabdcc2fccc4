"""Times of other libraries' kernels, which another program measured on the same machine.

Those libraries do not run in Paddle. The program's report is a JSON file ``{"rows": [..]}``, its
name is in the environment variable ``FASTATTN_BENCH_PEERS``. A row names its ``section`` and
``peer``, its shape, and its microseconds: as medians of replayed CUDA graphs, like those here.
"""

from __future__ import annotations

import functools
import json
from typing import Any

from fastattn import env

COPY, READ, EMPTY = "copy of as many bytes", "reading as many bytes", "empty kernel"

#: Start of a name in a report -> the short public name that tables and plots show.
_PUBLIC = {
    COPY: "copy",
    READ: "read",
    "vllm_fa3_fp8_varlen": "vLLM FA3 FP8 ragged",
    "vllm_fa3_bf16_varlen": "vLLM FA3 BF16 ragged",
    "vllm_fa3_fp8": "vLLM FA3 FP8",
    "vllm_fa3_bf16": "vLLM FA3 BF16",
    "vllm_triton_fp8": "vLLM Triton FP8",
    "vllm_triton_int8": "vLLM Triton INT8",
    "cudnn_fp8": "cuDNN FP8",
    "cudnn_bf16": "cuDNN BF16",
    "vLLM Triton q_rope_quant": "vLLM Triton",
    "vllm reshape_and_cache": "vLLM",
    "vllm rope": "vLLM, 2 kernels",
    "vLLM rope + write + Q + FA3 FP8": "vLLM FP8, 4 kernels",
    "vLLM rope + write + FA3 BF16": "vLLM BF16, 3 kernels",
    "vllm fa3": "vLLM FA3",
    "merge, vllm": "vLLM CUDA",
    "vllm_cuda_fused": "vLLM CUDA",
    "vllm_cuda_unfused": "vLLM CUDA, 2 kernels",
    "vllm_triton_fused": "vLLM Triton",
    "vllm triton fused_indexer": "vLLM Triton",
    "vllm persistent_topk": "vLLM persistent",
    "vllm cooperative_topk": "vLLM cooperative",
    "vllm top_k_per_row_prefill": "vLLM per row",
    "vllm top_k_per_row_decode": "vLLM per row, decode",
    "merge, then quantize_fp8": "in two calls",
    "NumPy": "NumPy fp32",
    "itself, nothing registered": "alone",
    "Paddle's registry": "registry",
}


def public_name(peer: str) -> str:
    """Short public name of a peer."""
    return next((name for start, name in _PUBLIC.items() if peer.startswith(start)), peer)


@functools.lru_cache(maxsize=1)
def _rows() -> tuple[dict[str, Any], ...]:
    path = env.bench_peers()
    return tuple(json.loads(path.read_text())["rows"]) if path else ()


def peers(section: str, **shape: object) -> list[dict[str, Any]]:
    """Rows of a section with these values of its fields; a field that a row lacks fits any."""
    return [
        row
        for row in _rows()
        if row["section"] == section
        and all(row.get(name, value) == value for name, value in shape.items())
    ]

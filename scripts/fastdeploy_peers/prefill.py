"""A step with prefill as FastDeploy's FLASH_ATTN backend runs it.

A layer calls four operators: `gqa_rope_write_cache`, a flash attention over all keys in bf16,
`append_attention` for the decoding sequences, and `merge_prefill_decode_output`. FastDeploy uses
Paddle's FlashAttention-3 for the second; here vLLM's replaces it, which is the same kernel.
"""

from __future__ import annotations

import torch
from library import Cache, Library, Shape, Step
from vllm_operators import attend_ragged

#: Head dimension for which FastDeploy's prefix kernel is compiled.
HEAD_DIM = 128


def lacking(shape: Shape, sinks: bool) -> str:
    """Reason why FastDeploy's backend does not serve such a layer correctly; empty if it does."""
    if shape.dim != HEAD_DIM:
        return (
            f"gqa_rope_write_cache reads a cached prefix with a head dimension of {HEAD_DIM} only"
        )
    return "its flash attention takes no sinks" if sinks else ""


def known_fault(shape: Shape) -> str:
    """Known fault of FastDeploy with a cached prefix; empty if none is known."""
    if shape.quant == "block_wise_fp8":
        return "a cached prefix takes V's scales from other tokens"
    return ""


def misread_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales (T, ..) with which FastDeploy mistakenly reads V of a cached prefix.

    The last eight of every 16 tokens use the scales of the sixth token before them.
    `append_cache_kv_c8` in `gqa_rope_write_cache.cu` (lines 831 and 832 of FastDeploy 2.6) advances
    by 2 tokens where its values advance by 8.
    """
    tokens = torch.arange(len(scales), device=scales.device)
    return scales[torch.where(tokens % 16 < 8, tokens, tokens - 6)]


def run(
    library: Library,
    step: Step,
    shape: Shape,
    qkv: torch.Tensor,
    cache: Cache,
    out: torch.Tensor,
    rotary: torch.Tensor,
) -> torch.Tensor:
    """Run the operators of one layer; returns its output (T, heads * D). `out` is for decode."""
    q, k, v = library.gqa_rope_write_cache(step, shape, qkv, cache, rotary)
    starts = step.starts, step.key_starts
    prefill = attend_ragged(q, k, v, starts, step.longest_ragged).view(step.tokens, -1)
    out.zero_()  # as append_attention allocates it
    library.append_attention(step, shape, qkv, cache, out, rotary, decode_only=True)
    library.merge_prefill_decode(step, shape, prefill, out)
    return prefill

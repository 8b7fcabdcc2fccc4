"""A step with prefill as FastDeploy's FLASH_ATTN backend runs it.

Four operators a layer: `gqa_rope_write_cache`, a flash attention over all keys in bf16,
`append_attention` for the sequences that decode, and `merge_prefill_decode_output`. The flash
attention is Paddle's FlashAttention-3 there; vLLM's stands in for it, which is the same kernel.
"""

from __future__ import annotations

import torch
from library import Cache, Library, Shape, Step
from vllm_operators import attend_ragged

#: Of what FastDeploy's prefix kernel is compiled for.
HEAD_DIM = 128


def lacking(shape: Shape, sinks: bool) -> str:
    """Why FastDeploy's backend does not serve such a layer right; nothing if it does."""
    if shape.dim != HEAD_DIM:
        return (
            f"gqa_rope_write_cache reads a cached prefix with a head dimension of {HEAD_DIM} only"
        )
    return "its flash attention takes no sinks" if sinks else ""


def known_fault(shape: Shape) -> str:
    """What FastDeploy itself does wrong with a cached prefix; nothing if not known."""
    if shape.quant == "block_wise_fp8":
        return "a cached prefix takes V's scales from other tokens"
    return ""


def misread_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales (T, ..) of V that a cached prefix is read with, by mistake.

    Of 16 tokens the last eight take those of the sixth token before them: `append_cache_kv_c8` in
    `gqa_rope_write_cache.cu` (lines 831 and 832 of FastDeploy 2.6) goes on by 2 tokens where its
    values go on by 8.
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
    """The operators of one layer; its output (T, heads * D). `out` is that of decode."""
    q, k, v = library.gqa_rope_write_cache(step, shape, qkv, cache, rotary)
    starts = step.starts, step.key_starts
    prefill = attend_ragged(q, k, v, starts, step.longest_ragged).view(step.tokens, -1)
    out.zero_()  # as append_attention allocates it
    library.append_attention(step, shape, qkv, cache, out, rotary, decode_only=True)
    library.merge_prefill_decode(step, shape, prefill, out)
    return prefill

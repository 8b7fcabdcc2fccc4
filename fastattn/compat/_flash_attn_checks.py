"""Checks of arguments that flash-attn's functions share, and what to write for a refused one."""

from __future__ import annotations

import numbers
from typing import Any

from fastattn._foreign import is_torch, not_a_tensor
from fastattn.compat._paged import refuse

_ROTATE = (
    "no rotation inside the call; q, _ = fastattn.functional.rope_write_cache_kv(qkv, ..) rotates "
    "and writes, then call without k, v, rotary_cos and rotary_sin (docs/coming_from.md, Rotation)"
)
_RAGGED = (
    "no ragged tokens here; write them with fastattn.functional.write_cache_kv, then "
    "flash_attn_varlen_func(q, k_cache, v_cache, .., block_table=block_table)"
)
_LATENT = (
    "values of a latent cache; write fastattn.functional.mla_attention with "
    "q = paddle.concat([qv, q], -1)"
)
_RANKS = "not supported; write fastattn.distributed.paged_attention_dcp"

#: By argument: what to write in its place.
INSTEAD = {
    "alibi_slopes": "no operator here adds a bias to the logits; keep flash-attn for such layers",
    "attention_chunk": "not supported; write fastattn.functional.paged_attention with "
    "mask_offsets [position // chunk * chunk, position + 1] of each query",
    "cache_batch_idx": "not supported; the rows are pages: "
    "write block_table=cache_batch_idx.unsqueeze(-1)",
    "cache_leftpad": "not supported; begin each sequence at its row's start, or write "
    "fastattn.functional.paged_attention with mask_offsets [leftpad, position + 1] of each query",
    "cp_rank": _RANKS,
    "cp_tot_seqused_k": _RANKS,
    "cp_world_size": _RANKS,
    "cu_seqlens_k_new": _RAGGED,
    "cu_seqlens_q": _RAGGED,
    "dropout_p": "dropout is for training; write dropout_p=0.0",
    "q_v": _LATENT,
    "qv": _LATENT,
    "rotary_cos": _ROTATE,
    "rotary_seqlens": _ROTATE,
    "rotary_sin": _ROTATE,
}


def check_number(op: str, name: str, value: Any, expected: float, why: str) -> None:
    """Refuse another number than the expected one, and what is no number."""
    if is_torch(value):
        raise not_a_tensor(op, name, value)
    if not isinstance(value, numbers.Real):
        raise TypeError(
            f"{op}: {name}: expected a number, got {type(value).__name__}; the packages' positions "
            "differ from here on, so pass arguments by name"
        )
    if value != expected:
        refuse(op, name, why)


def check_common(op: str, causal: Any, softmax_scale: Any) -> None:
    """Refuse values that belong to another argument, which indicate mixed-up positions."""
    for name, value in (("causal", causal), ("softmax_scale", softmax_scale)):
        if is_torch(value):
            raise not_a_tensor(op, name, value)
    if not isinstance(causal, (bool, int)):
        raise TypeError(
            f"{op}: causal: expected bool, got {type(causal).__name__}; pass arguments by name"
        )
    if softmax_scale is not None and not isinstance(softmax_scale, numbers.Real):
        raise TypeError(
            f"{op}: softmax_scale: expected float, got {type(softmax_scale).__name__}; pass "
            "arguments by name"
        )


def window_of(window_size: Any) -> Any:
    """The packages' None means no window."""
    return (-1, -1) if window_size is None else window_size

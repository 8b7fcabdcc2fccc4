"""A layer's step: the models of the cache write and of the attention in turn."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastattn.reference.attention import paged_attention
from fastattn.reference.rope import rope_write_cache_kv

Array = NDArray[Any]

#: What both halves are told of the cache.
_STORED = ("cache_k_scales", "cache_v_scales", "cache_quant_type", "fp8_format")


def write_step(
    qkv: Array,
    caches: tuple[Array, Array],
    rotary_embs: Array | None,
    seqs: tuple[Array, Array, Array, Array],
    *,
    scores: bool,
    k_rotation: str = "none",
    k_center: Array | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a step's keys and values, as the first half of :func:`attention_step`.

    Parameters
    ----------
    qkv, caches, rotary_embs, seqs, k_rotation, k_center, **options
        As for :func:`fastattn.reference.rope_write_cache_kv`.
    scores : bool
        Whether the attention needs the scores of K with its centre, for an LSE or a sink.

    Returns
    -------
    dict
        ``q`` and ``q_descale``, and the ``k_rotation`` and ``k_center`` that the attention has to
        undo. Mostly it has none: Q is rotated along with K, and a constant that all scores of a
        query lack changes no output.
    """
    left = scores and k_center is not None
    q, descale = rope_write_cache_kv(
        qkv,
        *caches,
        rotary_embs,
        *seqs,
        k_rotation=k_rotation,
        k_center=k_center,
        q_rotation="none" if left else k_rotation,
        **options,
    )
    return {
        "q": q,
        "q_descale": descale,
        "k_rotation": k_rotation if left else "none",
        "k_center": k_center if left else None,
    }


def attention_step(
    qkv: Array,
    key_cache: Array,
    value_cache: Array,
    rotary_embs: Array | None,
    block_tables: Array,
    cu_seqlens_q: Array,
    seq_lens_decoder: Array,
    seq_lens_this_time: Array,
    *,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Array | None = None,
    mask_offsets: Array | None = None,
    out_scale: Array | None = None,
    return_softmax_lse: bool = True,
    precision: str = "float64",
    **options: Any,
) -> tuple[Array, Array]:
    """Write a step's keys and values, then attend; see :func:`fastattn.functional.attention_step`.

    The caches and dynamic scales change in place. `options` are the writer's.

    Returns
    -------
    out : array, shape [T, H * D]
        fp64 (or fp32), not rounded; uint8 e4m3 codes if `out_scale` is given.
    softmax_lse : array, shape [H, T]
        Without `return_softmax_lse` it lacks the scores of the keys' centre.
    """
    seqs = block_tables, cu_seqlens_q, seq_lens_decoder, seq_lens_this_time
    caches = key_cache, value_cache
    scores = sinks is not None or return_softmax_lse
    written = write_step(qkv, caches, rotary_embs, seqs, scores=scores, **options)
    out, lse = paged_attention(
        written.pop("q"),
        key_cache,
        value_cache,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        mask_offsets=mask_offsets,
        out_scale=out_scale,
        precision=precision,
        **written,
        **{name: options[name] for name in _STORED if name in options},
    )
    return np.reshape(out, (len(out), -1)), lse

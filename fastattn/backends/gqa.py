"""Replacements for FastDeploy's ``APPEND_ATTN``, ``FLASH_ATTN`` and ``FLASH_MASK_ATTN``."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class AppendAttentionBackend(PagedAttentionBackend):
    """Replacement for FastDeploy's default backend, for decoding, speculative and prefill
    sequences.

    A speculative sequence has one new token and its draft tokens. All of them are written to the
    cache and attended to. The next step overwrites rejected ones.
    """


class FlashAttentionBackend(PagedAttentionBackend):
    """Prefill and decoding sequences in one call, over the quantised cache itself.

    FastDeploy's class of this name runs prefill sequences on a bfloat16 copy of the whole prefix
    and decoding sequences through its append attention, and then merges the two.
    """


class FlashMaskAttentionBackend(PagedAttentionBackend):
    """Attention under ``forward_meta.attn_mask_offsets``, or causal attention without offsets.

    The offsets, int32 ``[T, 2]`` or ``[2 T]``, are the interval ``[start, end)`` of keys that each
    new token sees. They are the whole mask: a token may see later tokens, such as others of its
    image. The intervals of different tokens need not be ordered. A layer with a window of W keys
    sees the last W keys of each interval. The other backends accept offsets in the same way.
    """

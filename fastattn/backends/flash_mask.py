"""Replacement for FastDeploy's ``FLASH_MASK_ATTN`` backend."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class FlashMaskAttentionBackend(PagedAttentionBackend):
    """Attention under ``forward_meta.attn_mask_offsets``, or causal attention without offsets.

    The offsets, int32 ``[T, 2]`` or ``[2 T]``, are the interval ``[start, end)`` of keys that each
    new token sees. They are the whole mask: a token may see later tokens, such as others of its
    image. The intervals of different tokens need not be ordered. A layer with a window of W keys
    sees the last W keys of each interval. The other backends accept offsets in the same way.
    """

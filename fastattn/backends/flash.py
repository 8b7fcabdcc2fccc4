"""Replacement for FastDeploy's ``FLASH_ATTN`` backend."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class FlashAttentionBackend(PagedAttentionBackend):
    """Prefill and decoding sequences in one call, over the quantised cache itself.

    FastDeploy's class of this name runs prefill sequences on a bfloat16 copy of the whole prefix
    and decoding sequences through its append attention, and then merges the two.
    """

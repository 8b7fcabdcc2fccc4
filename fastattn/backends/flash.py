"""The backend that takes the place of FastDeploy's ``FLASH_ATTN``."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class FlashAttentionBackend(PagedAttentionBackend):
    """Prefill and decoding sequences in one call, over the quantised cache itself.

    FastDeploy's class of this name runs prefill sequences on a bfloat16 copy of the whole prefix,
    decoding sequences through its append attention, and merges the two.
    """

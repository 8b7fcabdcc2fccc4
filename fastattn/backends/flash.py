"""The backend that takes the place of FastDeploy's ``FLASH_ATTN``."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class FlashAttentionBackend(PagedAttentionBackend):
    """Prefill and decode rows in one call, over the cache as it is stored.

    FastDeploy's class of this name runs prefill rows on a bfloat16 copy of the whole prefix, decode
    rows through the append attention, and merges the two.
    """

"""The backend that takes the place of FastDeploy's ``FLASH_MASK_ATTN``."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class FlashMaskAttentionBackend(PagedAttentionBackend):
    """Attention under ``forward_meta.attn_mask_offsets``, causal where a step has none.

    The offsets, int32 ``[T, 2]`` or ``[2 T]``, are the interval ``[start, end)`` of keys that each
    new token sees. They are the whole mask: a token may see later ones, such as those of its image.
    The intervals of different tokens need not be ordered. A layer with a window of W keys sees the
    last W of each. The other backends take offsets alike.
    """

"""FlashInfer's module of this name: pages are written."""

from fastattn.compat._flashinfer_pages import (
    append_paged_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)

__all__ = ["append_paged_kv_cache", "get_batch_indices_positions", "get_seq_lens"]

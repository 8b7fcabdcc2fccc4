"""FlashInfer's paged attention wrappers, with its page tables, plans, layouts and conventions.

A program that uses them changes one line::

    # from flashinfer import BatchDecodeWithPagedKVCacheWrapper, merge_state
    from fastattn.compat.flashinfer import BatchDecodeWithPagedKVCacheWrapper, merge_state

LSEs have FlashInfer's form: ``[T, H]``, base 2. Caches are read in place. They are tuples (k, v),
or pools with K and V in one tensor:

==========  ===========================================  ==========================================
layout      tuple, each                                  pool
==========  ===========================================  ==========================================
``NHD``     ``[pages, P, KV, D]``                        ``[pages, 2, P, KV, D]``
``HND``     ``[pages, KV, 64, D]``                       ``[pages, 2, KV, 64, D]``
==========  ===========================================  ==========================================

The table shows 16-bit caches. P is 64, or a multiple of 64 if the tensor is contiguous. 8-bit
caches (uint8 is e4m3, float8_e4m3fn, float8_e5m2, int8) are tuples with pages of 64 tokens, and V
has this package's layout ``[pages, KV, D, 64]`` (docs/formats.md). Every other cache is refused.
"""

from __future__ import annotations

from fastattn.compat._flashinfer_plan import dense_block_tables
from fastattn.compat.flashinfer.cascade import merge_state, merge_state_in_place, merge_states
from fastattn.compat.flashinfer.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    single_decode_with_kv_cache,
)
from fastattn.compat.flashinfer.page import (
    append_paged_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
)
from fastattn.compat.flashinfer.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    single_prefill_with_kv_cache,
)

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "append_paged_kv_cache",
    "dense_block_tables",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
    "single_decode_with_kv_cache",
    "single_prefill_with_kv_cache",
]

"""Rules of the index maps' arguments, as in `_rules`."""

from __future__ import annotations

from fastattn._rules import OpRules, anything, block_stride, dtypes, int32_from, rank, tile

_INT32 = dtypes("int32")
_INDEX = dtypes("int32", "int64")
_COUNT = int32_from(1)
_BLOCKS = int32_from(-1)

RULES: dict[str, OpRules] = {
    "topk_to_slots": OpRules(
        {"indices": _INT32, "block_tables": _INT32, "batch_ids": _INDEX, "row_ids": _INDEX},
        {
            "block_size": _COUNT,
            "block_stride": block_stride,
            "num_blocks": _BLOCKS,
            "compact": anything,
            "rank": rank,
            "world_size": _COUNT,
            "interleave": _COUNT,
        },
    ),
    "token_maps": OpRules(
        {
            "batch_ids": _INDEX,
            "block_tables": _INT32,
            "cu_seqlens_q": _INT32,
            "seq_lens_decoder": _INT32,
            "position_ids": _INDEX,
        },
        {"num_tokens": int32_from(0), "block_size": _COUNT, "num_blocks": _BLOCKS},
    ),
    "query_rows": OpRules(
        {"batch_ids": _INDEX, "positions": _INT32, "block_tables": _INT32, "cu_seqlens_q": _INT32},
        {"tile": tile},
    ),
    "window_indices": OpRules(
        {"positions": _INDEX, "batch_ids": _INDEX, "block_tables": _INT32, "starts": _INT32},
        {"window": _COUNT, "block_size": _COUNT, "num_blocks": _BLOCKS},
    ),
    "short_context_indices": OpRules(
        {"positions": _INDEX, "batch_ids": _INDEX}, {"k": _COUNT, "compress_ratio": _COUNT}
    ),
    "combine_topk_window": OpRules(
        {
            "topk": _INT32,
            "window": _INT32,
            "topk_lengths": _INT32,
            "window_lengths": _INT32,
            "batch_ids": _INDEX,
        },
        {
            "seq_stride": int32_from(0),
            "window_offset": int32_from(0),
            "multiple": _COUNT,
        },
    ),
}

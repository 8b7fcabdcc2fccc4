"""Inputs of the indexer operators."""

from __future__ import annotations

import numpy as np

from fastattn.reference import indexer as model


def cos_sin(max_positions, dtype=np.float32):
    angle = np.arange(max_positions)[:, None] * 10000.0 ** (-np.arange(32) / 32)
    return np.concatenate([np.cos(angle), np.sin(angle)], axis=1).astype(dtype)


def key_case(rng, quant, ratio, positions, page_size=16, state_block=4, pages=3, **options):
    """Inputs of the operator by name; `positions` is a list of arrays, one a request."""
    head = model.PAGE_FORMATS[quant].head_dim
    width = head * (2 if ratio == 4 else 1)
    batch_ids = np.repeat(np.arange(len(positions)), [len(p) for p in positions])
    flat = np.concatenate(positions)
    blocks = int(flat.max()) // state_block + 1
    num_blocks = len(positions) * blocks + 2
    state = rng.normal(size=(num_blocks, state_block, 2 * width))
    state[..., width:] *= 3
    tables = rng.permutation(num_blocks)[: len(positions) * blocks].reshape(-1, blocks)
    page_bytes = page_size * sum(model.PAGE_FORMATS[quant][1:]) + options.get("padding", 0)
    return {
        "state_cache": state.astype(options.get("state_dtype", np.float32)),
        "block_tables": tables.astype(np.int32),
        "batch_id_per_token": batch_ids.astype(np.int32),
        "positions": flat.astype(options.get("index_dtype", np.int64)),
        "state_slots": np.arange(len(flat)).astype(options.get("index_dtype", np.int64)),
        "kv_slots": rng.permutation(pages * page_size)[: len(flat)].astype(np.int64),
        "rms_norm_weight": rng.uniform(0.5, 2, head).astype(
            options.get("weight_dtype", np.float32)
        ),
        "cos_sin_cache": cos_sin(int(flat.max()) + 1, options.get("table_dtype", np.float32)),
        "kv_cache": np.full((pages, page_bytes), 0xA5, np.uint8),
        "compress_ratio": ratio,
        "page_size": page_size,
        "rms_norm_eps": 1e-5,
        "quant": quant,
    }


def slots_for(rng, count, slots):
    """Distinct slots, with padding and slots out of range among them."""
    mapping = rng.permutation(slots + count)[:count].astype(np.int64)  # some past the cache
    mapping[::5] = rng.choice([-1, -7, slots, 2**31 - 1, -(2**31)], len(mapping[::5]))
    return mapping

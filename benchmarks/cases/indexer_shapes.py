"""Shapes at which the indexer's kernels are timed, here and by other libraries' programs.

Needs neither Paddle nor torch.
"""

from __future__ import annotations

HEADS, DIM, PAGE = 64, 128, 64
#: Logits of a chunk of a prompt: new tokens and thousands of keys.
CHUNKS = {
    "gpu": [(s, k) for s in (2048, 4096) for k in (4, 32, 64)],
    "gpu quick": [(2048, 4)],
}
#: Logits of a decode step: sequences, thousands of keys, queries a sequence.
STEPS = {
    "gpu": [(b, k, n) for n in (1, 2) for k in (8, 64) for b in (1, 16, 64, 128)],
    "gpu quick": [(1, 8, 1)],
}
#: Logits and their top-k: new tokens and thousands of keys.
TOPK_CHUNKS = {
    "gpu": [(2048, 32), (4096, 64), (4096, 128)],
    "gpu quick": [(2048, 4)],
    "cpu": [(64, 4)],
    "cpu quick": [(8, 1)],
}
#: The same of a decode step: sequences, thousands of keys, queries a sequence.
TOPK_STEPS = {
    "gpu": [(1, 64, 1), (1, 64, 2), (64, 64, 1), (64, 64, 2)],
    "gpu quick": [(4, 8, 2)],
    "cpu": [(2, 4, 2)],
    "cpu quick": [(1, 1, 1)],
}


def selected(keys: int) -> int:
    """Indices of a query of a call over so many keys."""
    return min(2048, keys // 2)

"""Models with sparse latent attention and the steps that a rank of theirs is timed at.

Facts alone, without an import of the package: programs that time other libraries in torch run this
file for them.
"""

from __future__ import annotations

from typing import NamedTuple

#: Tokens, or compressed tokens, of a page of a cache.
PAGE = 64
INDEX_DIM = 128
#: Heads that FlashMLA takes at least: queries of fewer are padded for it.
PADDED_HEADS = 64


class SparseModel(NamedTuple):
    """What a rank has of a layer with an indexer."""

    cache_format: str
    token_bytes: int  # of the cache
    heads: int
    dim: int  # of a query and of a key; a value has 512 channels
    topk: int
    ratio: int  # tokens of a compressed one: of a key of the attention and of the indexer
    window: int  # last tokens that are seen beside the chosen ones
    index_heads: int = 64

    @property
    def parts(self) -> tuple[str, ...]:
        """Parts of a step, in their order."""
        if self.window:
            return ("write", "compress", *_CHOICE, "slots", "attention", "output")
        return ("write", *_CHOICE, "slots", "attention")

    @property
    def vllm_parts(self) -> tuple[str, ...]:
        """Parts that compiled kernels of vLLM do, and its Triton kernel of index queries."""
        keys = () if self.window else ("index key",)
        return ("write", "index query", *keys, "selection", "attention")


_CHOICE = ("index query", "index key", "selection")
MODELS = {
    "V3.2 TP8": SparseModel("fp8_656", 656, 16, 576, 2048, 1, 0),
    "V4-Flash TP8": SparseModel("fp8_584", 584, 8, 512, 512, 4, 128),
}

#: Cached tokens and new tokens of each sequence.
Seqs = list[tuple[int, int]]
_CONTEXT = 32768


def decode(batch: int, context: int) -> Seqs:
    """Sequences of one new token each, whose positions in a group of 4 tokens take turns."""
    return [(context - 1 - i % 4, 1) for i in range(batch)]


STEPS: dict[str, Seqs] = {
    **{f"decode {batch} x 32k": decode(batch, _CONTEXT) for batch in (1, 16, 64, 128)},
    "4096 behind 28k": [(_CONTEXT - 4096, 4096)],
}
QUICK_STEPS: dict[str, Seqs] = {
    "decode 4 x 4k": decode(4, 4096),
    "512 behind 3584": [(3584, 512)],
}
CPU_STEPS: dict[str, Seqs] = {
    "decode 2 x 2k": decode(2, 2048),
    "64 behind 1984": [(1984, 64)],
}
CPU_QUICK_STEPS: dict[str, Seqs] = {
    "decode 2 x 256": decode(2, 256),
    "16 behind 240": [(240, 16)],
}
#: What the writers of latent caches are timed at: formats and tokens; heads and tokens of V4's.
WRITE_TOKENS = (1, 128, 1024, 8192, 16384, 65536)
WRITE_FORMATS = ("bf16", "fp8", "fp8_656")
QKV_HEADS, QKV_TOKENS = (8, 16, 64), (1, 128, 1024, 4096, 16384)

_LAYER_BYTES, _MOST_LAYERS = 4e8, 48


def entries(model: SparseModel, seqs: Seqs) -> list[int]:
    """Keys of each sequence, of the attention and of the indexer."""
    return [(cached + new) // model.ratio for cached, new in seqs]


def chosen(model: SparseModel, seqs: Seqs) -> int:
    """Keys that each query chooses: the model's number, but half of a short context."""
    return min(model.topk, max(1, max(entries(model, seqs)) // 2))


def layer_count(model: SparseModel, seqs: Seqs) -> int:
    """Layers whose index keys and chosen tokens exceed an L2 cache together."""
    keys = sum(entries(model, seqs)) * (INDEX_DIM + 4)
    tokens = sum(new for _, new in seqs) * chosen(model, seqs) * model.token_bytes
    return int(min(max(_LAYER_BYTES / (keys + tokens), 1), _MOST_LAYERS))

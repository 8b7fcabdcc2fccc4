"""Attention backends that a FastDeploy-like server plugs in."""

from fastattn.backends.base import AttentionBackend, AttentionMetadata
from fastattn.backends.block_sparse import BlockChoice, BlockSparseAttentionBackend
from fastattn.backends.convert import convert_caches
from fastattn.backends.dsa import DSAAttentionBackend
from fastattn.backends.forward_meta import ForwardMeta, ForwardMode
from fastattn.backends.gqa import (
    AppendAttentionBackend,
    FlashAttentionBackend,
    FlashMaskAttentionBackend,
)
from fastattn.backends.layer_cache import LayerCache
from fastattn.backends.mla import MLAAttentionBackend
from fastattn.backends.scales import HeadShard
from fastattn.backends.standalone import AttentionLayer, make_config, make_latent_config

__all__ = [
    "AppendAttentionBackend",
    "AttentionBackend",
    "AttentionLayer",
    "AttentionMetadata",
    "BlockChoice",
    "BlockSparseAttentionBackend",
    "DSAAttentionBackend",
    "FlashAttentionBackend",
    "FlashMaskAttentionBackend",
    "ForwardMeta",
    "ForwardMode",
    "HeadShard",
    "LayerCache",
    "MLAAttentionBackend",
    "convert_caches",
    "make_config",
    "make_latent_config",
]

"""The attention layer, FastDeploy's own backends and their choice."""

from .attention import Attention
from .attention_selecter import get_attention_backend
from .base_attention_backend import AttentionBackend


class AppendAttentionBackend(AttentionBackend):
    def init_attention_metadata(self, forward_meta):
        raise AssertionError("FastDeploy's own backend was used")


class FlashAttentionBackend(AppendAttentionBackend):
    pass


class FlashMaskAttentionBackend(AppendAttentionBackend):
    pass


class DecodeUnifiedAttentionBackend(AppendAttentionBackend):
    pass


class PlasAttentionBackend(AppendAttentionBackend):
    pass


class MLAAttentionBackend(AppendAttentionBackend):
    pass


class DSAAttentionBackend(AppendAttentionBackend):
    pass


__all__ = ["Attention", "AttentionBackend", "get_attention_backend"]

"""Replacements for methods of FastDeploy's latent attention models.

FastDeploy's sparse layers select keys in a class of the model, ``Indexer``. It gathers only the
keys of the step, takes one query per decoding sequence, and waits for lengths. Its results name
rows of the step in prefill but slots in decode. :func:`take_indexer` replaces its ``forward`` by
:func:`indexer_forward`, which uses the model's own projections, norm and rotation. Its other
attributes stay.
"""

from __future__ import annotations

import importlib
from typing import Any

import paddle

from fastattn._plugin import patches

#: FastDeploy's module of DeepSeek's and GLM's models.
MODELS = "fastdeploy.model_executor.models.deepseek_v3"


def take_indexer() -> None:
    """Replace methods of FastDeploy's ``Indexer`` once, if its models were imported.

    Backends call this in every step, because FastDeploy may import its models after it has made the
    backends.
    """
    patches.KEY_NORM.apply(_with_key_norm)
    patches.INDEXER.apply(_selecting)


def _with_key_norm(make: Any) -> Any:
    def __init__(self: Any, fd_config: Any, layer_id: int, prefix: str = "") -> None:
        make(self, fd_config, layer_id, prefix)
        norms = importlib.import_module("fastdeploy.model_executor.layers.normalization")
        self.k_norm = norms.LayerNorm(  # as the development branch has it
            fd_config, self.index_head_dim, 1e-6, prefix=f"{prefix}.k_norm", with_bias=True
        )

    return __init__


def _selecting(own: Any) -> Any:
    def forward(self: Any, forward_meta: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(forward_meta.attn_backend, "select"):
            return own(self, forward_meta, *args, **kwargs)
        return indexer_forward(self, forward_meta, *args, **kwargs)

    return forward


def _lacks_bias(norm: Any) -> bool:
    """Whether a norm of index keys has no parameter for the bias that checkpoints have."""
    return getattr(norm, "bias", None) is None


def indexer_forward(
    self: Any,
    forward_meta: Any,
    hidden_states: Any,
    qr: Any,
    positions: Any = None,
    rotary_emb: Any = None,
) -> Any:
    """Slots [T, topk] of the keys that each query reads; replaces ``Indexer.forward``.

    `positions` is passed by release 2.6; later releases have them in `forward_meta`. `rotary_emb`
    rotates neighbouring channels. For models whose pairs are half of the channels apart
    (DeepSeek-V3.2), the channels are reordered before and after.
    """
    if _lacks_bias(self.k_norm):
        raise NotImplementedError(
            "DSAAttentionBackend: Indexer.k_norm has no bias, the checkpoint's LayerNorm has one; "
            "register the plug-in before the model is made"
        )
    backend = forward_meta.attn_backend
    heads, dim, rotated = self.index_n_heads, self.index_head_dim, self.rope_dim
    positions = forward_meta.position_ids if positions is None else positions
    query = self.wq_b(qr).reshape([-1, heads, dim])
    key = self.k_norm(self.wk(hidden_states)).reshape([-1, 1, dim])
    q_pe, k_pe = query[..., :rotated], key[..., :rotated]
    if not backend.indexer.interleaved:
        q_pe, k_pe = _reordered(q_pe, [2, -1]), _reordered(k_pe, [2, -1])
    q_pe, k_pe = rotary_emb(positions, q_pe.contiguous(), k_pe.contiguous())
    q_pe, k_pe = q_pe.reshape([-1, heads, rotated]), k_pe.reshape([-1, 1, rotated])
    if not backend.indexer.interleaved:
        q_pe, k_pe = _reordered(q_pe, [-1, 2]), _reordered(k_pe, [-1, 2])
    return backend.select(
        paddle.concat([q_pe, query[..., rotated:]], axis=-1),
        paddle.concat([k_pe, key[..., rotated:]], axis=-1),
        self.weights_proj(hidden_states),
        self.layer_id,
        forward_meta,
    )


def _reordered(x: Any, pairs: list[int]) -> Any:
    """Channels [T, H, D] as rows of a matrix of the shape `pairs`, read by its columns.

    ``[2, -1]`` puts channels i and D/2 + i next to each other, and ``[-1, 2]`` puts them back.
    """
    split = x.reshape([*x.shape[:2], *pairs])
    return split.transpose([0, 1, 3, 2]).reshape(x.shape)

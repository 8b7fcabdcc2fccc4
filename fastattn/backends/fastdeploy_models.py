"""What FastDeploy's models of latent attention do themselves, and have to do otherwise here.

FastDeploy's sparse layers choose keys in a class of the model, ``Indexer``: it gathers the keys of
the step only, takes one query a decoding sequence, waits for lengths, and names rows of the step in
prefill but slots in decode. :func:`take_indexer` puts :func:`indexer_forward` in place of its
``forward``, with the model's own projections, norm and rotation. Its other attributes stay.
"""

from __future__ import annotations

import sys
from typing import Any

import paddle

from fastattn import env

#: FastDeploy's module of DeepSeek's and GLM's models.
MODELS = "fastdeploy.model_executor.models.deepseek_v3"


class KeyNorm(paddle.nn.Layer):  # type: ignore[misc]
    """LayerNorm of index keys with a bias, where FastDeploy has an RMSNorm (release 2.6).

    Its parameters have the names that a checkpoint has for them, so that FastDeploy loads both.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        constant = paddle.nn.initializer.Constant
        self.weight = self.create_parameter([channels], default_initializer=constant(1.0))
        self.bias = self.create_parameter([channels], is_bias=True)

    def forward(self, keys: Any) -> Any:
        """Keys [T, channels], normalised in float32."""
        parameters = (self.weight.astype("float32"), self.bias.astype("float32"))
        normed = paddle.nn.functional.layer_norm(
            keys.astype("float32"), self.channels, *parameters, 1e-6
        )
        return normed.astype(keys.dtype)


def take_indexer() -> None:
    """Replace ``forward`` of FastDeploy's ``Indexer``, if its models were imported; once.

    Backends call it for every step, since FastDeploy may import its models after it made them.
    """
    kind = getattr(sys.modules.get(MODELS), "Indexer", None)
    if kind is None or getattr(kind.forward, "fastattn", False):
        return
    make, own = kind.__init__, kind.forward

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        if _is_rms(self.k_norm):
            self.k_norm = KeyNorm(self.index_head_dim)

    def forward(self: Any, forward_meta: Any, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(forward_meta.attn_backend, "select"):
            return own(self, forward_meta, *args, **kwargs)
        return indexer_forward(self, forward_meta, *args, **kwargs)

    forward.fastattn = True  # type: ignore[attr-defined]
    kind.__init__, kind.forward = init, forward


def _is_rms(norm: Any) -> bool:
    return type(norm).__name__ == "RMSNorm"


def indexer_forward(
    self: Any,
    forward_meta: Any,
    hidden_states: Any,
    qr: Any,
    positions: Any = None,
    rotary_emb: Any = None,
) -> Any:
    """Slots of the keys that each query of a layer reads: ``forward`` of FastDeploy's ``Indexer``.

    Parameters
    ----------
    self : object
        The model's ``Indexer``: ``wq_b``, ``wk``, ``k_norm``, ``weights_proj``.
    forward_meta : ForwardMeta
        ``attn_backend`` is a :class:`fastattn.backends.DSAAttentionBackend`.
    hidden_states : Tensor, shape [T, hidden], bfloat16
    qr : Tensor, shape [T, q_lora_rank], bfloat16
    positions : Tensor, shape [T], optional
        Release 2.6 passes them; later ones have them in `forward_meta`.
    rotary_emb : object
        The model's rotation of neighbouring channels. Models whose pairs are a half apart
        (DeepSeek-V3.2) get that by the order of channels.

    Returns
    -------
    Tensor, shape [T, topk], int32

    Raises
    ------
    NotImplementedError
        If keys have an RMSNorm, so that the checkpoint's bias was not loaded.
    """
    if _is_rms(self.k_norm):
        raise NotImplementedError(
            "DSAAttentionBackend: Indexer.k_norm is an RMSNorm, the checkpoint's is a LayerNorm "
            "with a bias; register the plug-in before the model is made"
        )
    backend = forward_meta.attn_backend
    heads, dim, rotated = self.index_n_heads, self.index_head_dim, self.rope_dim
    positions = forward_meta.position_ids if positions is None else positions
    query = self.wq_b(qr).reshape([-1, heads, dim])
    key = self.k_norm(self.wk(hidden_states)).reshape([-1, 1, dim])
    q_pe, k_pe = query[..., :rotated], key[..., :rotated]
    if not backend.indexer.interleaved:
        q_pe, k_pe = _neighbours(q_pe), _neighbours(k_pe)
    q_pe, k_pe = rotary_emb(positions, q_pe.contiguous(), k_pe.contiguous())
    q_pe, k_pe = q_pe.reshape([-1, heads, rotated]), k_pe.reshape([-1, 1, rotated])
    if not backend.indexer.interleaved:
        q_pe, k_pe = _halves(q_pe), _halves(k_pe)
    return backend.select(
        paddle.concat([q_pe, query[..., rotated:]], axis=-1),
        paddle.concat([k_pe, key[..., rotated:]], axis=-1),
        self.weights_proj(hidden_states),
        self.layer_id,
        forward_meta,
    )


def _neighbours(x: Any) -> Any:
    """Channels i and D/2 + i of [T, H, D] side by side."""
    tokens, heads, dim = x.shape
    return x.reshape([tokens, heads, 2, dim // 2]).transpose([0, 1, 3, 2]).reshape(x.shape)


def _halves(x: Any) -> Any:
    """The way back from :func:`_neighbours`."""
    tokens, heads, dim = x.shape
    return x.reshape([tokens, heads, dim // 2, 2]).transpose([0, 1, 3, 2]).reshape(x.shape)


def refuse_one_token_layers(backend: str) -> None:
    """Refuse where FastDeploy's MLA layers would give one token of each sequence.

    Its development branch does so before it calls a backend, on other GPUs than Hopper's and with
    ``USE_FLASH_MLA``. Prefilled tokens and drafts would be missing.

    Raises
    ------
    NotImplementedError
        In that case.
    """
    layer = getattr(sys.modules.get(MODELS), "DeepseekV3MLAAttention", None)
    code = getattr(getattr(layer, "forward", None), "__code__", None)
    if "extract_decoder_token_from_q" not in getattr(code, "co_names", ()):
        return
    if env.flash_mla():
        raise NotImplementedError(f"{backend}: USE_FLASH_MLA is not supported; unset it")
    major = paddle.device.cuda.get_device_properties().major
    if major != 9:
        raise NotImplementedError(
            f"{backend}: this FastDeploy's MLA layers on a GPU of compute capability {major}.x "
            "are not supported; supported: 9.x"
        )

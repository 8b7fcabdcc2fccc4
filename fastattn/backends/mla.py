"""Replacement for FastDeploy's ``MLA_ATTN`` backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle

from fastattn import _views, functional
from fastattn.backends.forward_meta import field, max_len_tensor, optional, sequences
from fastattn.backends.latent import LatentAttentionBackend
from fastattn.backends.latent_config import LATENT_DIM, ROPE_DIM


class MLAAttentionBackend(LatentAttentionBackend):
    """Write the new tokens into a latent cache, then attend to it with absorbed Q of all tokens.

    FastDeploy's class of this name expands the latents of prefilled tokens to K and V of every
    head, attends to them separately from decoding sequences, and pads heads to 64. Here prefill,
    chunks, cached prefixes, decode and draft tokens are one call over the cache in place.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The lengths of a step of one sequence, which decodes.
        self._lengths = max_len_tensor(*np.array([[1], [1], [0]]))

    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Shapes of a layer's cache, bfloat16, and of its value cache, which does not exist.

        Raises
        ------
        NotImplementedError
            If `kv_cache_quant_type` is a quantised type.
        """
        if kv_cache_quant_type not in (None, "none"):
            self._refuse(f"kv_cache_quant_type = {kv_cache_quant_type!r}")
        return [max_num_blocks, 1, self.config.block_size, LATENT_DIM + ROPE_DIM], []

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Prepare a step; see :meth:`fastattn.backends.AttentionBackend.init_attention_metadata`.

        Afterwards ``forward_meta.max_len_tensor_cpu`` says that the step has decoding sequences
        only. FastDeploy's models read it to decide whether to expand K and V of prefilled tokens.
        So they pass absorbed queries for all tokens (``LENGTHS`` in fastattn/_plugin/patches.py).
        """
        super().init_attention_metadata(forward_meta)
        forward_meta.max_len_tensor_cpu = self._lengths

    def forward_mixed(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """Attention of one layer.

        Parameters
        ----------
        q : Tensor, shape [T, H * 576] or [T, H, 576], bfloat16
            Absorbed queries: the latent channels of a head, then its rotated channels.
        k, v, qkv
            Must be None.
        compressed_kv : Tensor, shape [T, 512], bfloat16
            Normalised latent channels of the step's tokens.
        k_pe : Tensor, shape [T, 1, 64] or [T, 64], bfloat16
            Rotated channels of the step's tokens.
        layer : object
            FastDeploy's ``Attention`` layer or an :class:`fastattn.backends.AttentionLayer`.
        forward_meta : ForwardMeta
            The step that was passed to :meth:`init_attention_metadata`; ``caches[layer_id]`` is the
            layer's cache.

        Returns
        -------
        Tensor, shape [T, H * 512], bfloat16
            0 for padding tokens.

        Raises
        ------
        NotImplementedError
            If K and V are expanded, or the layer requires something that is not supported.
        ValueError
            If the step lacks a field, or shapes do not match.
        """
        if k is not None or v is not None:
            self._refuse(
                f"{'v' if k is None else 'k'}, expanded keys or values,",
                "; the model has to give absorbed queries, as it does by the max_len_tensor_cpu "
                "that init_attention_metadata sets",
            )
        if optional(forward_meta, "cache_seqlens") is not None:
            # FastDeploy's layers set it together with queries of one token of each sequence.
            self._refuse(
                "forward_meta.cache_seqlens, of layers that leave out draft tokens and prefilled "
                "tokens,",
                "; supported: GPUs of compute capability 9.x without USE_FLASH_MLA",
            )
        queries, latents = self._queries(q, compressed_kv, layer)
        tokens = queries.shape[0]
        if tokens == 0:
            return paddle.empty([0, self.num_heads * LATENT_DIM], dtype=q.dtype)
        cache = field(forward_meta, "caches")[layer.layer_id]
        maps = self._maps(tokens, cache.shape[0], layer.layer_id, forward_meta, begin=True)
        self._write(latents, k_pe, cache, maps.slots, "bf16", "pow2")
        if self._signals is not None:
            self._signals.send(cache, cache, layer, forward_meta)
        seqs = sequences(forward_meta)
        out = functional.mla_attention(
            queries,
            cache,
            *seqs,
            self._most_new_tokens(tokens, seqs[1], forward_meta),
            self._most_keys(seqs[0]),
            cache_format="bf16",
            softmax_scale=self.config.softmax_scale,
            causal=self.config.causal,
            sinks=getattr(layer, "sinks", None),
        )
        return _views.view(out, [tokens, self.num_heads * LATENT_DIM])

    def attend(self, q: Any, compressed_kv: Any, k_pe: Any, layer: Any, forward_meta: Any) -> Any:
        """Attention of one layer: :meth:`forward_mixed` without the arguments that it ignores.

        Parameters
        ----------
        q, compressed_kv, k_pe, layer, forward_meta
            As for :meth:`forward_mixed`.
        """
        return self.forward_mixed(q, None, None, None, compressed_kv, k_pe, layer, forward_meta)

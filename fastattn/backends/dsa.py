"""Replacement for FastDeploy's ``DSA_ATTN`` backend."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, NoReturn

import paddle

from fastattn import _views, functional
from fastattn.backends import fastdeploy_models
from fastattn.backends.config import PD_MODES, read
from fastattn.backends.forward_meta import field, sequences
from fastattn.backends.indexer import QueryRows, query_rows
from fastattn.backends.latent import (
    LatentAttentionBackend,
    LatentAttentionMetadata,
    TokenMaps,
)
from fastattn.backends.latent_config import INDEX_DIM, LATENT_DIM, ROPE_DIM, IndexerConfig

#: Bytes per token. A latent token has 512 e4m3 codes, 4 float32 scales and 64 bfloat16 channels. An
#: index key has its codes and a float32 scale.
TOKEN_BYTES = LATENT_DIM + LATENT_DIM // 128 * 4 + 2 * ROPE_DIM
KEY_BYTES = INDEX_DIM + 4


@dataclass
class DSAAttentionMetadata(LatentAttentionMetadata):
    """Metadata of a step with an indexer.

    Attributes
    ----------
    rows : list of (TokenMaps, QueryRows)
        Query rows of the step or of its two micro-batches, with the maps that they belong to.
    chosen : dict
        For each layer, the `forward_meta` that it has selected keys for, and the number per query.
    """

    rows: list[tuple[TokenMaps, QueryRows]] = dataclass_field(default_factory=list)
    chosen: dict[int, tuple[Any, Any]] = dataclass_field(default_factory=dict)


class DSAAttentionBackend(LatentAttentionBackend):
    """DeepSeek sparse attention: an indexer selects the keys of a query; attention reads only
    those.

    Each step of a layer calls :meth:`select`, which writes the index keys and selects keys, and
    then :meth:`forward`, which writes the latents and attends. Both read only the cache, so keys of
    a cached prefix or an earlier chunk are treated like all others. Indices are slots of the cache
    in every step, with -1 after the last one.

    Parameters
    ----------
    scale_rule : {"pow2", "amax"}
        Rule for the scales of the latent cache, as in :func:`fastattn.functional.mla_write_cache`.
        FlashMLA reads "pow2" without loss.
    **kwargs
        See :class:`LatentAttentionBackend`.

    Raises
    ------
    NotImplementedError
        If the configuration requires something that is not supported. The message names it. Servers
        that prefill for others, and pools, are not supported, because FastDeploy does not move
        index keys.
    ValueError
        If the configuration lacks an option, or `scale_rule` is unknown.
    """

    _metadata_class = DSAAttentionMetadata

    def __init__(self, fd_config: Any, *args: Any, scale_rule: str = "pow2", **kwargs: Any) -> None:
        super().__init__(fd_config, *args, **kwargs)
        name = type(self).__name__
        if scale_rule not in ("pow2", "amax"):
            raise ValueError(f"{name}: scale_rule: expected pow2 or amax, got {scale_rule!r}")
        self.scale_rule = scale_rule
        self.indexer = IndexerConfig.of(fd_config, name)
        if not self.config.causal:
            self._refuse("model_config.causal = False")
        self._refuse_moves(fd_config)

    def _refuse_moves(self, fd_config: Any) -> None:
        """Refuse options that would move blocks without their index keys."""
        mode = read(fd_config, "parallel_config.pd_disaggregation_mode", "None")
        role = read(fd_config, "scheduler_config.splitwise_role", "mixed")
        pool = read(fd_config, "cache_config.kvcache_storage_backend")
        swapped = read(fd_config, "cache_config.num_cpu_blocks", 0)
        for what, value, moves in (
            ("parallel_config.pd_disaggregation_mode", mode, mode in PD_MODES),
            ("scheduler_config.splitwise_role", role, role != "mixed"),
            ("cache_config.kvcache_storage_backend", pool, pool is not None),
            ("cache_config.num_cpu_blocks", swapped, bool(swapped)),
        ):
            if moves:
                self._refuse(f"{what} = {value!r}, which does not move index keys,")

    def get_kv_cache_shape(  # type: ignore[override]
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], ...]:
        """Shapes of a layer's caches, all uint8, with FastDeploy's bytes.

        Returns
        -------
        key : list of int
            Shape of the latent cache.
        value : list of int
            Empty, because there is no value cache.
        index_key : list of int
            Only present if `kv_cache_quant_type` is "uint8", with which FastDeploy's runner asks
            for the caches of such models. FastDeploy's engine, which attaches to caches, unpacks
            two shapes.
        """
        size = self.config.block_size
        key, value = [max_num_blocks, 1, size, TOKEN_BYTES], list[int]()
        if kv_cache_quant_type != "uint8":
            return key, value
        return key, value, [max_num_blocks, size, KEY_BYTES]

    def create_kv_cache(
        self, num_layers: int, num_blocks: int, *_: Any, layer_offset: int = 0, **__: Any
    ) -> dict[tuple[str, int], Any]:
        """Caches by ("key", layer) and ("indexer", layer), as FastDeploy's cache controller asks.

        All are zeros of uint8, whatever dtype and type it passes.
        """
        key, _none, index = self.get_kv_cache_shape(num_blocks, "uint8")
        return {
            (role, layer): paddle.zeros(shape, "uint8")
            for layer in range(layer_offset, layer_offset + num_layers)
            for role, shape in (("key", key), ("indexer", index))
        }

    def create_host_kv_cache(self, *_: Any, **__: Any) -> NoReturn:
        """Refused, because blocks would be moved to the host without their index keys."""
        self._refuse("create_host_kv_cache, which leaves index keys behind,")

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Prepare a step."""
        fastdeploy_models.take_indexer()
        super().init_attention_metadata(forward_meta)

    def select(
        self, queries: Any, keys: Any, weights: Any, layer_id: int, forward_meta: Any
    ) -> Any:
        """Write a layer's index keys and select the keys of each query, for any kind of step.

        Every rank of a tensor-parallel group computes the same indices: the order of logits is
        total, and no arithmetic depends on other ranks.

        Parameters
        ----------
        queries : Tensor, shape [T, H, 128], bfloat16
            Rotated queries of the indexer, H heads on every rank.
        keys : Tensor, shape [T, 128], bfloat16
            Normalised and rotated index keys of the step's tokens.
        weights : Tensor, shape [T, H]
            Weight of each head. This function multiplies it by ``(128 H) ** -0.5``.
        layer_id : int
        forward_meta : ForwardMeta
            ``caches[2 * layer_id + 1]`` is the layer's cache of index keys.

        Returns
        -------
        Tensor, shape [T, topk], int32
            Slots of the layer's caches, in the order of positions; -1 after the last slot and for
            padding tokens.
        """
        heads, topk = self.indexer.heads, self.indexer.topk
        tokens = queries.shape[0]
        if tokens == 0:
            return paddle.empty([0, topk], "int32")
        keys = self._rows("keys", keys, tokens, INDEX_DIM)
        weights = self._rows("weights", weights, tokens, heads)
        cache = field(forward_meta, "caches")[2 * layer_id + 1]
        blocks = cache.shape[0]
        maps = self._maps(tokens, blocks, layer_id, forward_meta, begin=True)
        functional.indexer_k_write_cache(keys, cache, maps.slots)
        rows = self._query_rows(maps, forward_meta)
        codes, folded = functional.indexer_q_quant(
            _views.view(queries, [tokens, heads, INDEX_DIM]),
            weights,
            (INDEX_DIM * heads) ** -0.5,
            token_of_query=rows.token_of_query,
        )
        tables = sequences(forward_meta)[0]
        chosen = functional.paged_indexer_topk(
            _views.view(codes, [*rows.lengths.shape, heads, INDEX_DIM]),
            cache,
            folded,
            rows.lengths,
            rows.tables,
            self._most_keys(tables),
            topk,
        )
        slots, lengths = functional.topk_to_slots(
            chosen,
            tables,
            maps.batch_ids,
            row_ids=rows.query_of_token,
            block_size=self.config.block_size,
            num_blocks=blocks,
        )
        self._metadata().chosen[layer_id] = forward_meta, lengths
        return slots

    def _query_rows(self, maps: TokenMaps, forward_meta: Any) -> QueryRows:
        """Rows of the step's queries, made together with the step's maps."""
        metadata = self._metadata()
        for made_for, rows in metadata.rows:
            if made_for is maps:
                return rows
        tokens, seqs = maps.slots.shape[0], sequences(forward_meta)[1].shape[0] - 1
        decoding, prefills = self._kind(forward_meta)
        tiled = prefills or tokens > seqs * decoding
        made = query_rows(forward_meta, maps, tiled=tiled)
        metadata.rows = [*metadata.rows[-1:], (maps, made)]
        return made

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
        q : Tensor, shape [T, H, 576] or [T, H * 576], bfloat16
            Absorbed queries: the latent channels of a head, then its rotated channels.
        k
            Not used. FastDeploy's models pass the step's latents here.
        v : Tensor, shape [T, 1, topk] or [T, topk], int32
            Result of :meth:`select` for the layer.
        qkv
            Not used.
        compressed_kv : Tensor, shape [T, 512], bfloat16
            Normalised latent channels of the step's tokens.
        k_pe : Tensor, shape [T, 1, 64] or [T, 64], bfloat16
            Rotated channels of the step's tokens.
        layer : object
            FastDeploy's ``Attention`` layer or an :class:`fastattn.backends.AttentionLayer`.
        forward_meta : ForwardMeta
            The step that was passed to :meth:`init_attention_metadata`; ``caches[2 * layer_id]`` is
            the layer's latent cache.

        Returns
        -------
        Tensor, shape [T, H, 512], bfloat16
            0 for padding tokens.

        Raises
        ------
        NotImplementedError
            If the layer requires something that is not supported.
        ValueError
            If the step lacks a field, or shapes do not match.
        """
        queries, latents = self._queries(q, compressed_kv, layer)
        tokens = queries.shape[0]
        if v is None:
            raise ValueError(f"{type(self).__name__}: v: expected indices of select(), got None")
        if tokens == 0:
            return paddle.empty([0, self.num_heads, LATENT_DIM], dtype=q.dtype)
        chosen = self._rows("v", v, tokens, self.indexer.topk)
        cache = field(forward_meta, "caches")[2 * layer.layer_id]
        maps = self._maps(tokens, cache.shape[0], layer.layer_id, forward_meta, begin=False)
        self._write(latents, k_pe, cache, maps.slots, "fp8_656", self.scale_rule)
        made_for, lengths = self._metadata().chosen.get(layer.layer_id, (None, None))
        return functional.mla_sparse_attention(
            queries,
            cache,
            chosen,
            cache_format="fp8_656",
            topk_length=lengths if made_for is forward_meta else None,
            sinks=getattr(layer, "sinks", None),
            softmax_scale=self.config.softmax_scale,
        )

    def attend(
        self, q: Any, slots: Any, compressed_kv: Any, k_pe: Any, layer: Any, forward_meta: Any
    ) -> Any:
        """Attention of one layer: :meth:`forward_mixed` without the arguments that it ignores.

        Parameters
        ----------
        slots : Tensor, shape [T, topk], int32
            Result of :meth:`select` for the layer; `v` of :meth:`forward_mixed`.
        q, compressed_kv, k_pe, layer, forward_meta
            As for :meth:`forward_mixed`.
        """
        return self.forward_mixed(q, None, slots, None, compressed_kv, k_pe, layer, forward_meta)

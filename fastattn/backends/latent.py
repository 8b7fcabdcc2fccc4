"""Base class of the backends of latent (MLA) caches."""

from __future__ import annotations

import math
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any, NamedTuple

from fastattn import _views, functional
from fastattn.backends.base import AttentionBackend, AttentionMetadata
from fastattn.backends.config import keep_out_of_graphs
from fastattn.backends.forward_meta import (
    current_plan,
    field,
    guess_new_tokens,
    host_lengths,
    optional,
    sequences,
)
from fastattn.backends.kv_signals import KvSignals
from fastattn.backends.latent_config import LATENT_DIM, ROPE_DIM, LatentConfig
from fastattn.backends.stale_starts import StaleStarts


class TokenMaps(NamedTuple):
    """Sequences, positions and slots of the tokens of a step.

    Attributes
    ----------
    batch_ids : Tensor, shape [T], int32
        Sequence of each token; -1 for padding.
    positions : Tensor, shape [T], int32
        Position of each token in its sequence; -1 for padding.
    slots : Tensor, shape [T], int32
        Slot of each token in the cache; -1 for padding, and for a token without an assigned block.
    """

    batch_ids: Any
    positions: Any
    slots: Any


@dataclass
class LatentAttentionMetadata(AttentionMetadata):
    """Metadata that the layers of a step share.

    Attributes
    ----------
    host_lengths : (int, int) or None
        Maximum numbers of new tokens and of keys of a sequence; None if unknown on the host.
    maps : list of (forward_meta, layer_id, TokenMaps)
        Maps of the step or of its micro-batches, and the layer that made them.
    """

    host_lengths: tuple[int, int] | None = None
    maps: list[tuple[Any, int, TokenMaps]] = dataclass_field(default_factory=list)


class LatentAttentionBackend(AttentionBackend):
    """Common base of the backends of latent caches: their configuration and the write of tokens.

    Queries are absorbed, so all heads read the same 576 channels of a token. Any number of heads
    from 1 to 128 is computed without padding.

    Parameters
    ----------
    fd_config : object
        A FastDeploy ``FDConfig``, or the result of :func:`fastattn.backends.make_latent_config`.
    kv_num_heads : int
        Not used, because a latent cache has one head.
    num_heads : int
        Number of query heads of this process, 1 to 128.
    head_dim, encoder_block_shape_q, decoder_block_shape_q : int
        Arguments of FastDeploy's backends. Not used.

    Raises
    ------
    NotImplementedError
        If the configuration requires something that is not supported. The message names it.
    ValueError
        If the configuration lacks an option.
    """

    __infer_dynamic_dims_fields__ = ("attention_metadata",)
    _metadata_class: type[LatentAttentionMetadata] = LatentAttentionMetadata

    def __init__(
        self,
        fd_config: Any,
        kv_num_heads: int,
        num_heads: int,
        head_dim: int,
        encoder_block_shape_q: int = -1,
        decoder_block_shape_q: int = -1,
    ) -> None:
        name = type(self).__name__
        self.config = LatentConfig.of(fd_config, name, num_heads)
        keep_out_of_graphs(fd_config)
        self.num_heads = num_heads
        self.kv_num_heads = 1
        self.head_dim = LATENT_DIM + ROPE_DIM
        self._signals = KvSignals.of(fd_config)
        self._stale_starts = StaleStarts() if self.config.cuda_graphs else None

    def _prepare(self, forward_meta: Any) -> LatentAttentionMetadata:
        for name in ("attn_mask", "attn_mask_offsets", "swa_rotary_embs"):
            if optional(forward_meta, name) is not None:
                self._refuse(f"forward_meta.{name}")
        if optional(forward_meta, "pre_caches_length"):
            self._refuse("forward_meta.pre_caches_length")
        if current_plan(forward_meta) is not None:
            self._refuse("forward_meta.cascade_plan")
        starts = optional(forward_meta, "cu_seqlens_q")
        if self._stale_starts is not None and starts is not None:
            self._stale_starts.settle(starts)
        if self._signals is not None:
            self._signals.begin(forward_meta)
        return self._metadata_class(host_lengths(forward_meta))

    def _queries(self, q: Any, compressed_kv: Any, layer: Any) -> tuple[Any, Any]:
        """Absorbed queries [T, H, 576], and the latents [T, 512] of the same tokens."""
        name = type(self).__name__
        for what, tensor in (("q", q), ("compressed_kv", compressed_kv)):
            if tensor is None:
                raise ValueError(f"{name}: {what}: expected a tensor, got None")
        if getattr(layer, "sliding_window", 0):
            self._refuse("layer.sliding_window")
        shape = list(q.shape)
        width, whole = self.num_heads * self.head_dim, [self.num_heads, self.head_dim]
        if shape[1:] not in ([width], whole):
            raise ValueError(
                f"{name}: q: expected shape [T, {width}] or [T, {self.num_heads}, "
                f"{self.head_dim}], got {shape}"
            )
        if shape[0] != compressed_kv.shape[0]:
            raise ValueError(
                f"{name}: q: expected the {compressed_kv.shape[0]} tokens of compressed_kv, got "
                f"{shape[0]}"
            )
        latents = self._rows("compressed_kv", compressed_kv, shape[0], LATENT_DIM)
        return _views.view(q, [shape[0], *whole]), latents

    def _rows(self, what: str, tensor: Any, tokens: int, width: int) -> Any:
        """View a tensor as rows of `width` values, one for each of the step's tokens.

        Raises
        ------
        ValueError
            If it has another number of values.
        """
        shape = None if tensor is None else list(tensor.shape)
        if shape == [tokens, width]:
            return tensor
        if not shape or shape[0] != tokens or math.prod(shape) != tokens * width:
            raise ValueError(
                f"{type(self).__name__}: {what}: expected shape [{tokens}, {width}], got {shape}"
            )
        return _views.view(tensor, [tokens, width])

    def _write(
        self, latents: Any, k_pe: Any, cache: Any, slots: Any, cache_format: str, rule: str
    ) -> None:
        """Write the step's tokens. Padding tokens have no slot."""
        functional.mla_write_cache(
            latents,
            self._rows("k_pe", k_pe, latents.shape[0], ROPE_DIM),
            cache,
            slots,
            cache_format=cache_format,
            scale_rule=rule,
        )

    def _most_keys(self, tables: Any) -> int:
        """Maximum number of keys of a sequence; draft tokens may exceed a server's own limit."""
        longest = self.config.max_model_len + self.config.decode_tokens
        return min(longest, tables.shape[1] * self.config.block_size)

    def _most_new_tokens(self, tokens: int, starts: Any, forward_meta: Any) -> int:
        """Number of new tokens of a sequence. Too small a number only costs time."""
        known = self._metadata().host_lengths
        if known is not None:
            return int(known[0])
        return guess_new_tokens(tokens, starts.shape[0] - 1, *self._kind(forward_meta))

    def _kind(self, forward_meta: Any) -> tuple[int, bool]:
        """New tokens of a decoding sequence, and whether the server reports prefill sequences."""
        return self.config.decode_tokens, optional(forward_meta, "exist_prefill") is True

    def _maps(
        self, tokens: int, num_blocks: int, layer_id: int, forward_meta: Any, *, begin: bool
    ) -> TokenMaps:
        """Maps of the step's tokens, which the first layer makes for all layers.

        The layer that made them makes them again when it starts again. A server runs the same step
        once eagerly and once more to capture a CUDA graph, which must contain them.
        """
        known = self._metadata().maps
        for index, (meta, maker, maps) in enumerate(known):
            if meta is forward_meta:
                if not (begin and maker == layer_id) and maps.slots.shape[0] == tokens:
                    return maps
                del known[index]
                break
        made = token_maps(forward_meta, tokens, num_blocks, self.config.block_size)
        known.append((forward_meta, layer_id, made))
        return made


def token_maps(forward_meta: Any, tokens: int, num_blocks: int, block_size: int) -> TokenMaps:
    """Sequences, positions and slots of a step's tokens, made on the device.

    Slots differ from FastDeploy's ``forward_meta.slot_mapping``, in which padding tokens use a
    block of the last sequence.
    """
    tables, starts, cached, _ = sequences(forward_meta)
    made = functional.token_maps(
        field(forward_meta, "batch_id_per_token"),
        tables,
        starts,
        cached,
        optional(forward_meta, "position_ids"),
        num_tokens=tokens,
        block_size=block_size,
        num_blocks=num_blocks,
    )
    return TokenMaps(*made)

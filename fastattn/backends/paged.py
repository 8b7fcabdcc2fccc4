"""Base class of the backends: each step of a layer calls one operator."""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import paddle

from fastattn import env
from fastattn.backends import samples
from fastattn.backends.apart import StepTensors
from fastattn.backends.base import AttentionBackend, AttentionMetadata
from fastattn.backends.calibrated import Calibrated
from fastattn.backends.config import BLOCK_SIZE, BackendConfig, keep_out_of_graphs
from fastattn.backends.forward_meta import (
    OwnTable,
    current_plan,
    field,
    guess_new_tokens,
    host_lengths,
    optional,
    sequences,
)
from fastattn.backends.head_windows import head_windows
from fastattn.backends.kv_signals import KvSignals
from fastattn.backends.layer_cache import LayerCache, cache_type_of
from fastattn.backends.layer_facts import KnownLayers, LayerFacts
from fastattn.backends.peers import guard
from fastattn.backends.programs import Programs, program_step
from fastattn.backends.scales import HeadShard, local_heads
from fastattn.backends.stale_starts import StaleStarts
from fastattn.backends.step_masks import draft_trees, in_sot, layer_mask, mask_offsets
from fastattn.functional._attributes import ANY_LENGTH
from fastattn.functional._cache_types import (
    DYNAMIC_TYPES,
    cache_shapes,
    default_rotation,
    token_scales,
)
from fastattn.functional.step import run_step

#: Values that FastDeploy's model runner passes as `decoder_block_shape_q` outside deterministic
#: mode.
_BLOCK_SHAPES_Q = (-1, 16)


@dataclass
class PagedAttentionMetadata(AttentionMetadata):
    """Metadata that the layers of a step share.

    Attributes
    ----------
    host_lengths : (int, int) or None
        Maximum numbers of new tokens and of keys of a sequence; None if unknown on the host.
    cascade_plan : CascadePlan or None
        Plan of a cascade, if the step's sequences share a prefix.
    guessed : (Tensor, int, (int, int)) or None
        Block tables and number of tokens for which lengths were guessed, and these.
    mask : (Tensor, Tensor) or None
        Flat offsets that a layer was given, and the same offsets as [T, 2].
    windowed : list of (Tensor, int, int, int, Tensor)
        Masks of layers with a window: the offsets and their version, the window, the layer that
        made the mask, and the mask.
    program : (weakref, dict) or None
        What programs of the layers are translated from: see :class:`Programs`.
    drafts : Tensor or None
        ``forward_meta.attn_mask``, the trees of a step with drafts.
    trees : (Tensor, int, int, Tensor) or None
        The same and its version, the layer that made the operator's mask of it, and that mask.
    """

    host_lengths: tuple[int, int] | None = None
    cascade_plan: Any = None
    guessed: tuple[Any, int, tuple[int, int]] | None = None
    mask: tuple[Any, Any] | None = None
    windowed: list[tuple[Any, int, int, int, Any]] = dataclass_field(default_factory=list)
    program: tuple[Any, dict[str, Any]] | None = None
    drafts: Any = None
    trees: tuple[Any, int, int, Any] | None = None


class PagedAttentionBackend(AttentionBackend):
    """Write the new tokens into the cache, then attend to the whole cache, in one operator.

    Prefill, decoding, speculative and inactive sequences share the call of ``attention_step``.
    Nothing is dequantised in advance. Partial results are merged only if
    ``forward_meta.cascade_plan`` says that the sequences share a prefix.

    Parameters
    ----------
    fd_config : object
        A FastDeploy ``FDConfig``, or the result of :func:`fastattn.backends.make_config`.
    kv_num_heads, num_heads, head_dim : int
        Numbers of heads of this process, and their size. A size that the build left out
        (``FASTATTN_HEAD_DIMS``) is refused by the first step, not here.
    encoder_block_shape_q, decoder_block_shape_q : int
        Arguments of FastDeploy's backends. The operators choose their own tiles; but see
        `batch_invariant`.
    q_quant : {"none", "per_tensor", "per_token_head", "auto"}
        Quantisation of Q for the attention. ``"per_tensor"`` uses ``layer.q_scale``. ``"auto"`` is
        ``"per_token_head"`` for layers with an e4m3 cache, whose long sequences then run on the FP8
        tensor cores. For other layers, and for layers with sinks and a `cache_k_center`, it is
        ``"none"``. The results equal the attention's `quantize_q`, but need no extra pass over Q.
    batch_invariant : bool, optional
        Make the bits of a sequence independent of the batch, with the attention's option of that
        name. By default it is on in FastDeploy's deterministic mode. The environment variable
        ``FD_DETERMINISTIC_MODE`` indicates this mode. So does a `decoder_block_shape_q` other than
        -1 and 16, which FastDeploy passes in no other mode.
    split_invariant : bool, optional
        Also make them independent of how a sequence was cut into steps: the attention's option of
        that name. The default is that of `batch_invariant`.

    Raises
    ------
    NotImplementedError
        If the configuration requires something that is not supported, or would let a server with
        another byte order read this server's quantised caches. The message names it.
    ValueError
        If the configuration lacks an option, the numbers of heads do not match it, `q_quant` is
        unknown, or ``FASTATTN_CALIBRATION`` names a file that cannot be read.
    """

    __infer_dynamic_dims_fields__ = ("attention_metadata",)

    #: Whether the attention of every step is apart from its write.
    apart = False
    #: Whether the writer rotates Q where it rotates K.
    rotates_queries = True

    def __init__(
        self,
        fd_config: Any,
        kv_num_heads: int,
        num_heads: int,
        head_dim: int,
        encoder_block_shape_q: int = -1,
        decoder_block_shape_q: int = -1,
        *,
        q_quant: str = "none",
        batch_invariant: bool | None = None,
        split_invariant: bool | None = None,
    ) -> None:
        name = type(self).__name__
        if q_quant not in ("none", "per_tensor", "per_token_head", "auto"):
            raise ValueError(
                f"{name}: q_quant: expected none, per_tensor, per_token_head or auto, got "
                f"{q_quant!r}"
            )
        self.config = BackendConfig.of(fd_config, name, head_dim)
        keep_out_of_graphs(fd_config)
        if num_heads < 1 or kv_num_heads < 1 or num_heads % kv_num_heads:
            raise ValueError(
                f"{name}: num_heads: expected a multiple of kv_num_heads = {kv_num_heads}, got "
                f"{num_heads}"
            )
        try:
            self.config.shard_of(kv_num_heads).first_head(kv_num_heads)
        except ValueError as error:
            raise ValueError(f"{name}: kv_num_heads: {error}") from None
        self.kv_num_heads = kv_num_heads
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.encoder_block_shape_q = encoder_block_shape_q
        self.decoder_block_shape_q = decoder_block_shape_q
        self.q_quant = q_quant
        if batch_invariant is None:
            batch_invariant = env.deterministic() or decoder_block_shape_q not in _BLOCK_SHAPES_Q
        self.split_invariant = batch_invariant if split_invariant is None else split_invariant
        self.batch_invariant = batch_invariant or self.split_invariant
        self._calibrated = Calibrated.from_env()
        self._samples = samples.writer(self.config.ranks[1])
        self._known_layers = KnownLayers()
        guard(fd_config, name)
        self._signals = KvSignals.of(fd_config)
        self._programs = Programs.of(fd_config, name, q_quant, self._signals, self.config)
        self._stale_starts = StaleStarts() if self.config.cuda_graphs else None

    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Shapes of a layer's caches. A quantised V keeps the tokens of a block together.

        A block has as many bytes as with FastDeploy's backends, but a quantised V has another byte
        order. Blocks may be copied between servers of this package, and between any servers if the
        cache is not quantised. The constructor makes FastDeploy's transfer and its shared pools
        keep to that, or refuses the configuration.

        Parameters
        ----------
        max_num_blocks : int
        kv_cache_quant_type : str, optional
            FastDeploy's config string (``int8``, ``float8_e4m3fn``, ``block_wise_fp8``) or a cache
            type. None means not quantised.

        Raises
        ------
        NotImplementedError
            If the type is not supported.
        """
        quant_type = cache_type_of(kv_cache_quant_type)
        return cache_shapes(quant_type, max_num_blocks, self.kv_num_heads, self.head_dim)

    def get_kv_cache_scale_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], str] | None:
        """Shape and dtype of a layer's two scale tensors; None if its type has none in the cache.

        The dtype is float32; bfloat16 tensors of that shape are accepted too. ``block_wise_mxfp4``
        has uint8 scales, D / 32 per token. Without a type it is that of the configuration, and the
        dtype is Paddle's default dtype, by which FastDeploy's processes size the scales.
        """
        quant_type = cache_type_of(kv_cache_quant_type or self.config.cache_kind)
        if quant_type not in DYNAMIC_TYPES:
            return None
        own, dtype = token_scales(quant_type, self.head_dim)
        if kv_cache_quant_type is None and dtype != "uint8":
            dtype = paddle.get_default_dtype()
        return [max_num_blocks, self.kv_num_heads, BLOCK_SIZE, *own], dtype

    def _prepare(self, forward_meta: Any) -> PagedAttentionMetadata:
        self._refuse_step(forward_meta)
        offsets = optional(forward_meta, "attn_mask_offsets")
        if offsets is not None and len(offsets.shape) == 1 and offsets.shape[0] % 2:
            raise ValueError(
                f"{type(self).__name__}: forward_meta.attn_mask_offsets: expected shape [T, 2] "
                f"or [2 T], got {list(offsets.shape)}"
            )
        starts = optional(forward_meta, "cu_seqlens_q")
        if self._stale_starts is not None and starts is not None:
            self._stale_starts.settle(starts)
        metadata = PagedAttentionMetadata(host_lengths(forward_meta), current_plan(forward_meta))
        metadata.drafts = optional(forward_meta, "attn_mask")
        if self._signals is not None:
            self._signals.begin(forward_meta)
        if self._programs is not None:
            metadata.program = self._programs.begin(forward_meta)
        return metadata

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
        q, k, v
            Not used, because Q, K and V are fused in `qkv`.
        qkv : Tensor, shape [T, (H + 2 KV) * D], bfloat16 or float16
            Not yet rotated, unless ``forward_meta.rope_already_applied`` is set. Not changed.
            float32 is refused, on a CPU, too.
        compressed_kv, k_pe
            Arguments of MLA backends. Must be None.
        layer : object
            FastDeploy's ``Attention`` layer or an :class:`fastattn.backends.AttentionLayer`.
        forward_meta : ForwardMeta
            The step that was passed to :meth:`init_attention_metadata`.

        Returns
        -------
        Tensor, shape [T, H * D], the dtype of `qkv`
            0 for padding tokens. uint8 (e4m3 codes) for a layer with `fp8_output_scale`.

        Raises
        ------
        NotImplementedError
            If the layer requires something that is not supported. The message names it.
        ValueError
            If the step lacks a field, or the caches and scales do not match the layer.
        """
        if in_sot():
            if self._programs is None:  # with its guards, SOT runs a backend between two programs
                paddle.jit.sot.psdb.fallback(True)
            return program_step(self, qkv, layer, forward_meta)
        if compressed_kv is not None or k_pe is not None:
            self._refuse(
                f"{'k_pe' if compressed_kv is None else 'compressed_kv'}, of latent attention,"
            )
        if qkv is None:
            raise ValueError(f"{type(self).__name__}: qkv: expected a fused tensor, got None")
        metadata, step = self._metadata(), forward_meta
        if self._has_own_table(layer, forward_meta):
            forward_meta = OwnTable(forward_meta, field(forward_meta, "swa_rotary_embs"))
        tokens = _size(qkv, 0)
        if tokens == 0:
            width = self.num_heads * self.head_dim
            codes = getattr(layer, "fp8_output_scale", None) is not None
            return paddle.zeros([0, width], dtype=paddle.uint8 if codes else qkv.dtype)
        facts = self._facts_of(layer, forward_meta)
        caches = forward_meta.caches
        key, value = caches[facts.first], caches[facts.first + 1]
        scales = facts.scales(forward_meta, layer)
        seqs = sequences(forward_meta)
        rotated = optional(forward_meta, "rope_already_applied")
        table = None if rotated else field(forward_meta, "rotary_embs")
        if self._samples is not None:
            self._samples.take(qkv, table, facts.options, layer, step)
        batch_ids = optional(forward_meta, "batch_id_per_token")
        lengths = metadata.host_lengths or self._guess_lengths(tokens, seqs, forward_meta, metadata)
        mask = mask_offsets(forward_meta, metadata)
        if mask is not None:
            mask = layer_mask(mask, forward_meta, metadata, facts.window, layer.layer_id)
        windows = facts.head_windows
        trees = None
        if metadata.drafts is not None:
            trees = draft_trees(forward_meta, metadata, layer.layer_id)
        self._refuse_masks(mask, trees, windows, facts.window)
        plan = _cascade_plan(forward_meta, metadata)
        holes = trees is not None or windows is not None
        if plan is not None or self._signals is not None or holes or self.apart:
            step = StepTensors(
                *(qkv, key, value, table, seqs, lengths, batch_ids, scales, mask),
                *(trees, windows, plan),
            )
            query, q_descale = step.write(facts.options, self.rotates_queries)
            if self._signals is not None:
                self._signals.send(key, value, layer, forward_meta)
            return self._attend(step, facts.options, query, q_descale, layer)
        options, bound = facts.step if mask is None else facts.masked_step
        return run_step(
            options,
            bound,
            qkv,
            key,
            value,
            table,
            *seqs,
            *lengths,
            batch_id_per_token=batch_ids,
            cache_k_scales=scales[0],
            cache_v_scales=scales[1],
            mask_offsets=mask,
        )

    def _attend(
        self, step: StepTensors, options: dict[str, Any], query: Any, q_descale: Any, layer: Any
    ) -> Any:
        """The attention of a step that is apart from its write."""
        return step.attend(options, query, q_descale)

    def attend(self, qkv: Any, layer: Any, forward_meta: Any) -> Any:
        """Attention of one layer: :meth:`forward_mixed` without the arguments that it ignores.

        Parameters
        ----------
        qkv, layer, forward_meta
            As for :meth:`forward_mixed`.
        """
        return self.forward_mixed(None, None, None, qkv, None, None, layer, forward_meta)

    def _guess_lengths(
        self,
        tokens: int,
        seqs: tuple[Any, Any, Any, Any],
        forward_meta: Any,
        metadata: PagedAttentionMetadata,
    ) -> tuple[int, int]:
        """Upper bounds of the new tokens and of the keys of a sequence, if the host has no lengths.

        Longer sequences only cost time. A traced step also serves steps of other kinds, so any of
        its sequences may have all tokens.
        """
        traced = not paddle.in_dynamic_mode()
        known = metadata.guessed
        if known and not traced:
            tables, count, lengths = known
            if tables is seqs[0] and count == tokens:
                return lengths
        longest = tokens
        if not traced and not self.batch_invariant:  # too small a bound could change its bits
            prefills = optional(forward_meta, "exist_prefill") is True
            slots = seqs[1].shape[0] - 1
            longest = guess_new_tokens(tokens, slots, self.config.decode_tokens, prefills)
        lengths = (
            longest,
            min(self.config.max_model_len, _size(seqs[0], len(seqs[0].shape) - 1) * BLOCK_SIZE),
        )
        if not traced:
            metadata.guessed = seqs[0], tokens, lengths
        return lengths

    def _facts_of(self, layer: Any, forward_meta: Any) -> LayerFacts:
        """Arguments of the layer's operator, reused if the layer is unchanged."""
        caches = field(forward_meta, "caches")
        known = self._known_layers.get(layer) if paddle.in_dynamic_mode() else None
        if known is not None and known.hold(layer, caches):
            return known
        self._refuse_layer(layer)
        shard = self.config.shard_of(self.kv_num_heads, layer.layer_id)
        cache = LayerCache.of(forward_meta, layer, shard)
        masks = self._mask_arguments(layer)
        transform = self._key_transform(layer, cache, shard)
        # A sink needs products of Q itself, not of its codes, with a centre.
        shifts = transform["k_center"] is not None and masks["sinks"] is not None
        q_quant = self._q_quant_for(cache, shifts)
        options = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.kv_num_heads,
            "q_quant": q_quant,
            "q_scale": getattr(layer, "q_scale", None) if q_quant == "per_tensor" else None,
            "out_scale": getattr(layer, "fp8_output_scale", None),
            "batch_invariant": self.batch_invariant,
            "split_invariant": self.split_invariant,
            "cache_quant_type": cache.quant_type,
            "fp8_format": cache.fp8_format,
            **self._projection_arguments(layer),
            **masks,
            **transform,
        }
        windows = self._head_windows(layer, cache.key.place)
        if windows is not None:
            options["window_size"] = (-1, -1)
        facts = LayerFacts.of(layer, caches, cache, shard, options, windows)
        self._known_layers.put(layer, facts)
        return facts

    def _head_windows(self, layer: Any, place: Any) -> Any:
        """The operator's `head_windows` [KV, 2]; None if all heads of the layer see the same."""
        heads = self.num_heads, self.kv_num_heads, self.head_dim
        window = self._window_of(layer)
        windows = head_windows(self.config, window, heads, self.batch_invariant, self._refuse)
        return paddle.to_tensor(windows, "int32", place=place) if windows else None

    def _refuse_masks(self, mask: Any, trees: Any, windows: Any, window: int) -> None:
        """Refuse masks that no operator takes together."""
        if windows is not None and mask is not None:
            self._refuse(
                "forward_meta.attn_mask_offsets", " for a layer with windows of some heads"
            )
        if trees is not None and (window or windows is not None):
            self._refuse("forward_meta.attn_mask", " for a layer with a window")

    def _q_quant_for(self, cache: LayerCache, shifts: bool) -> str:
        if self.q_quant == "auto":
            return "per_token_head" if cache.holds_e4m3() and not shifts else "none"
        if self.q_quant != "none" and shifts:
            self._refuse(
                f"q_quant {self.q_quant!r}",
                " for a layer with sinks and a cache_k_center; supported: none, auto",
            )
        return self.q_quant

    def _key_transform(self, layer: Any, cache: LayerCache, shard: HeadShard) -> dict[str, Any]:
        """Transformation of K before it is quantised."""
        rotation = getattr(layer, "cache_k_rotation", None)
        center = getattr(layer, "cache_k_center", None)
        feedback = getattr(layer, "cache_k_feedback", None)
        given = center is not None or feedback is not None or rotation not in (None, "none")
        if self._calibrated is not None and not given:
            found = self._calibrated.of(layer, cache.quant_type, cache.key.place)
            rotation, center, feedback = found
        heads, dim = self.kv_num_heads, self.head_dim
        if center is not None:
            center = local_heads("cache_k_center", center, [heads, dim], shard)
        if feedback is not None:
            feedback = local_heads("cache_k_feedback", feedback, [heads, dim, dim], shard)
        rotation = rotation or default_rotation(cache.quant_type)
        return {"k_rotation": rotation, "k_center": center, "k_feedback": feedback}

    def _projection_arguments(self, layer: Any) -> dict[str, Any]:
        """Arguments that describe how Q, K and V come out of the fused projection."""
        arguments = {
            "qkv_bias": getattr(layer, "qkv_bias", None),
            "rms_norm_eps": getattr(layer, "rms_norm_eps", 1e-6),
            "use_neox_rotary_style": bool(getattr(layer, "use_neox_rotary_style", False)),
            "rotary_dim": self.config.rotary_dim,
        }
        # A model that normalises before the rotation has already done so when it calls the backend.
        if not getattr(layer, "qk_norm_before_rope", False):
            arguments["q_norm_weight"] = getattr(layer, "q_norm_weight", None)
            arguments["k_norm_weight"] = getattr(layer, "k_norm_weight", None)
        return arguments

    def _mask_arguments(self, layer: Any) -> dict[str, Any]:
        """Arguments that determine which keys a query sees."""
        window = self._window_of(layer)
        left = window - 1 if window > 0 else -1  # FastDeploy's window includes the query's own key
        sinks = getattr(layer, "sinks", None)
        return {"causal": self.config.causal, "window_size": (left, -1), "sinks": sinks}

    def _window_of(self, layer: Any) -> int:
        """Number of keys that a query of the layer sees, including its own; 0 means all."""
        size = self.config.window_size
        if not size:
            return int(getattr(layer, "sliding_window", 0) or 0)
        return size if self._has_window(layer) else 0

    def _has_window(self, layer: Any) -> bool:
        """Whether the layer has what the configuration says of layers with a window."""
        layers = self.config.window_layers
        if layers and not 0 <= layer.layer_id < len(layers):
            raise ValueError(
                f"{type(self).__name__}: layer.layer_id: model_config.window_attn_skip_freq has "
                f"{len(layers)} entries, got layer {layer.layer_id}"
            )
        return not layers or layers[layer.layer_id]

    def _has_own_table(self, layer: Any, forward_meta: Any) -> bool:
        """Whether the layer rotates by ``forward_meta.swa_rotary_embs``."""
        rotates = self.config.window_tables and not optional(forward_meta, "rope_already_applied")
        return rotates and self._has_window(layer)

    def _refuse_step(self, forward_meta: Any) -> None:
        drafts = optional(forward_meta, "attn_mask")
        if drafts is not None:
            if self.batch_invariant:
                self._refuse("forward_meta.attn_mask", " with batch_invariant")
            for name in ("attn_mask_offsets", "tbo_microbatch_id"):
                if optional(forward_meta, name) is not None:
                    self._refuse(f"forward_meta.attn_mask beside {name}")
            shape = list(getattr(drafts, "shape", []))
            if len(shape) != 3 or shape[1] != shape[2]:
                raise ValueError(
                    f"{type(self).__name__}: forward_meta.attn_mask: expected shape [S, N, N], "
                    f"got {shape}"
                )
        if self.batch_invariant and optional(forward_meta, "cascade_plan") is not None:
            self._refuse(
                "forward_meta.cascade_plan",
                " with batch_invariant: all sequences attend to a shared prefix as one",
            )
        if optional(forward_meta, "pre_caches_length"):
            self._refuse("forward_meta.pre_caches_length")
        if optional(forward_meta, "swa_rotary_embs") is not None and not self.config.window_tables:
            self._refuse("forward_meta.swa_rotary_embs", " without model_config.swa_rope_theta")

    def _refuse_layer(self, layer: Any) -> None:
        for name in ("linear_shift", "linear_smooth", "qkv_scale"):
            if getattr(layer, name, None) is not None:
                self._refuse(f"layer.{name}")
        out_scale = getattr(layer, "out_scale", None)
        if out_scale is not None and out_scale > 0:
            self._refuse(f"layer.out_scale = {out_scale}, a quantised output,")


def _size(tensor: Any, dimension: int) -> int:
    """Size of a dimension, or an upper bound of any size if a traced program does not know it."""
    size = tensor.shape[dimension]
    return size if isinstance(size, int) and size >= 0 else ANY_LENGTH


def _cascade_plan(forward_meta: Any, metadata: PagedAttentionMetadata) -> Any:
    """The plan of the prepared step; None for its micro-batches, which have no plan."""
    plan = metadata.cascade_plan
    return None if plan is None or optional(forward_meta, "cascade_plan") is not plan else plan

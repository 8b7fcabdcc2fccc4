"""Arguments that a layer gives to its two operators, cached between steps.

A server calls a backend for every layer of every step. To ask an ``nn.Layer`` for twenty
attributes, most of them absent, takes longer than an operator's call. The cache keeps no cache
tensors and does not keep layers alive.
"""

from __future__ import annotations

import functools
import weakref
from dataclasses import dataclass
from typing import Any

import paddle

from fastattn import _ops
from fastattn.backends.layer_cache import LayerCache
from fastattn.functional._cache_types import DYNAMIC_TYPES, STATIC_TYPES
from fastattn.functional.attention import paged_attention_attrs
from fastattn.functional.rope import rope_write_attrs

#: Options of an attention whose mask is given as offsets.
_OFFSETS_ALONE = {"causal": False, "window_size": (-1, -1)}

#: Attributes of a layer that determine the arguments of its operators.
_READ = (
    "cache_fp8_format",
    "cache_k_center",
    "cache_k_feedback",
    "cache_k_out_scale",
    "cache_k_rotation",
    "cache_k_zp",
    "cache_quant_type_str",
    "cache_v_out_scale",
    "cache_v_zp",
    "fp8_output_scale",
    "k_norm_weight",
    "layer_id",
    "linear_shift",
    "linear_smooth",
    "out_scale",
    "q_norm_weight",
    "q_scale",
    "qk_norm_before_rope",
    "qkv_bias",
    "qkv_scale",
    "rms_norm_eps",
    "sinks",
    "sliding_window",
    "use_neox_rotary_style",
)


#: Tensors of a layer that ``rope_write_cache_kv`` takes, in its order.
_WRITE_TENSORS = (
    "q_norm_weight",
    "k_norm_weight",
    "qkv_bias",
    "q_scale",
    "k_center",
    "k_feedback",
)

#: Tensors of a layer that ``paged_attention`` takes.
_ATTEND_TENSORS = ("sinks", "out_scale", "k_center", "head_windows")

#: Attributes in which ``paddle.nn.Layer`` keeps tensors.
_HOLDERS = ("_parameters", "_buffers")


@dataclass
class LayerFacts:
    """Arguments of a layer's operators, and the values from which they were made.

    Attributes
    ----------
    seen : list or None
        Values of the layer's attributes, kept alive so that their identities stay unique. None if
        the layer computes attributes, which may then change.
    num_caches, first, dynamic : int, int, bool
        Length of the list of caches, the layer's first entry, and whether the layer's scale tensors
        follow K and V.
    k_scales, v_scales : Tensor or None
        Static scales.
    shard : HeadShard
        The layer's KV heads that this process holds.
    write_tensors, write_attrs : tuple
        Arguments of the operator ``rope_write_cache_kv``: the layer's tensors and the attributes.
    q_quant : str
        How the operator returns Q.
    attend : dict
        Keyword arguments of ``paged_attention``, without the scales.
    attend_tensors, attend_attrs : tuple
        Arguments of the operator ``paged_attention`` in a plain step, without the arguments of the
        step itself.
    masked_attrs : tuple
        `attend_attrs` for a step with offsets, which are its whole mask.
    head_dim : int
    sources : tuple of Tensor or None
        The layer's scales of K and V if `k_scales` and `v_scales` were made from them. Writes to
        the sources must then reach the scales.
    detached : bool
        Whether `k_scales` and `v_scales` are detached views of `sources`.
    kinds : list
        Dtypes and shapes of the layer's scales, because ``layer.to(dtype=...)`` changes them in
        place.
    """

    seen: list[Any] | None
    num_caches: int
    first: int
    dynamic: bool
    k_scales: Any
    v_scales: Any
    shard: Any
    write_tensors: tuple[Any, ...]
    write_attrs: tuple[Any, ...]
    q_quant: str
    attend: dict[str, Any]
    attend_tensors: tuple[Any, ...]
    attend_attrs: tuple[Any, ...]
    masked_attrs: tuple[Any, ...]
    head_dim: int
    sources: tuple[Any, Any] | None
    detached: bool
    kinds: list[Any]

    @classmethod
    def of(
        cls,
        layer: Any,
        caches: Any,
        cache: LayerCache,
        shard: Any,
        heads: tuple[int, int, int],
        write: dict[str, Any],
        attend: dict[str, Any],
    ) -> LayerFacts:
        """Make the facts from the keyword arguments of a layer's operators and (H, KV, D)."""
        dynamic = cache.quant_type in DYNAMIC_TYPES
        given = tuple(
            getattr(layer, name, None) for name in ("cache_k_out_scale", "cache_v_out_scale")
        )
        pairs: list[tuple[Any, Any]] = list(zip((cache.k_scales, cache.v_scales), given))
        static = cache.quant_type in STATIC_TYPES
        made = static and not all(ours is theirs for ours, theirs in pairs)
        detached = made and all(
            ours.dtype == theirs.dtype and ours.shape == theirs.shape for ours, theirs in pairs
        )
        return cls(
            seen=_seen_of(layer) if paddle.in_dynamic_mode() else None,
            num_caches=len(caches),
            first=(4 if dynamic else 2) * layer.layer_id,
            dynamic=dynamic,
            k_scales=None if dynamic else cache.k_scales,
            v_scales=None if dynamic else cache.v_scales,
            shard=shard,
            write_tensors=tuple(write.get(name) for name in _WRITE_TENSORS),
            write_attrs=rope_write_attrs(
                num_heads=heads[0],
                num_kv_heads=heads[1],
                **{name: x for name, x in write.items() if name not in _WRITE_TENSORS},
            ),
            q_quant=write["q_quant"],
            attend=attend,
            attend_tensors=(
                *(attend["sinks"], None, attend["out_scale"], None, attend["k_center"]),
                *(None, attend.get("head_windows")),  # a step with trees is not a plain one
            ),
            attend_attrs=_attend_attrs(attend, heads[2]),
            masked_attrs=_attend_attrs({**attend, **_OFFSETS_ALONE}, heads[2]),
            head_dim=heads[2],
            sources=(given[0], given[1]) if made else None,
            detached=detached,
            kinds=_kinds_of(given) if static else [],
        )

    def hold(self, layer: Any, caches: Any) -> bool:
        """Whether the layer and the length of the list of caches are unchanged."""
        if self.seen is None or len(caches) != self.num_caches:
            return False
        for tensor in caches[self.first : self.first + (4 if self.dynamic else 2)]:
            if tensor is None:  # LayerCache raises the error
                return False
        helper = _ops.helpers()
        if helper is not None:
            return bool(helper.unchanged(layer.__dict__, _HOLDERS, _READ, self.seen))
        now = _seen_of(layer)
        return now is not None and list(map(id, now)) == list(map(id, self.seen))

    @functools.cached_property
    def step_plan(self) -> tuple[Any, ...] | None:
        """The layer's part of ``fastattn._direct.step``, or None if it cannot take the layer's
        steps.
        """
        if self.seen is None or self.q_quant != "none":
            return None
        return (
            _ops.handle("rope_write_cache_kv"),
            self.write_tensors,
            self.write_attrs,
            _ops.handle("paged_attention"),
            self.attend_tensors,
            self.attend_attrs,
            self.num_caches,
            self.first,
            _HOLDERS,
            _READ,
            self.seen,
        )

    def masked_step_plan(
        self, plan: tuple[Any, ...] | None, mask_offsets: Any
    ) -> tuple[Any, ...] | None:
        """:attr:`step_plan` for a step with offsets, which are the whole mask of the layer.

        The plan is an argument because SOT translates this method and cannot read a cached
        property.
        """
        if plan is None:
            return None
        sinks, _, *others = self.attend_tensors
        return (*plan[:4], (sinks, mask_offsets, *others), self.masked_attrs, *plan[6:])

    @property
    def window(self) -> int:
        """Number of keys that a query sees, including its own; 0 means all."""
        return int(self.attend["window_size"][0]) + 1

    def q_descale(self, written: list[Any]) -> Any:
        """Scales of the Q that the writer returned; None if it is not quantised."""
        if self.q_quant == "none":
            return None
        if self.q_quant == "per_tensor":
            return self.write_tensors[_WRITE_TENSORS.index("q_scale")]
        return written[1]

    def scales(self, forward_meta: Any, layer: Any) -> tuple[Any, Any]:
        """Scales of K and V for a call."""
        if self.dynamic:
            caches = forward_meta.caches
            return caches[self.first + 2], caches[self.first + 3]
        if not self.kinds:
            return None, None
        if self.sources is None and self.kinds == _kinds_of((self.k_scales, self.v_scales)):
            return self.k_scales, self.v_scales
        if self.sources and self.detached and self.kinds == _kinds_of(self.sources):
            return self.sources[0].detach(), self.sources[1].detach()
        cache = LayerCache.of(forward_meta, layer, self.shard)
        return cache.k_scales, cache.v_scales


def _attend_attrs(attend: dict[str, Any], head_dim: int) -> tuple[Any, ...]:
    return paged_attention_attrs(
        softmax_scale=float(head_dim**-0.5),
        **{name: x for name, x in attend.items() if name not in _ATTEND_TENSORS},
    )


def _kinds_of(scales: Any) -> list[Any]:
    return [(x.dtype, x.shape) for x in scales]


class KnownLayers:
    """Facts of a backend's layers. Each entry lives as long as its layer."""

    def __init__(self) -> None:
        self._facts: dict[int, tuple[Any, LayerFacts]] = {}

    def get(self, layer: Any) -> LayerFacts | None:
        """Facts of a layer, or None."""
        known = self._facts.get(id(layer))
        return known[1] if known is not None and known[0]() is layer else None

    def put(self, layer: Any, facts: LayerFacts) -> None:
        """Keep a layer's facts, unless the layer computes attributes."""
        if facts.seen is None:
            return
        key, known = id(layer), self._facts
        try:
            reference = weakref.ref(layer, lambda _: known.pop(key, None))
        except TypeError:  # a class with __slots__ and without __weakref__
            reference = None  # (to_static needs a statement here, and no return)
        if reference is not None:
            known[key] = (reference, facts)


def _seen_of(layer: Any) -> list[Any] | None:
    """Values of the attributes that determine the arguments of a layer's operators.

    They are read from where Python and ``paddle.nn.Layer`` store them, without running code of the
    layer's class. None if the class computes one of them or stores it elsewhere.
    """
    own = getattr(layer, "__dict__", None)
    if own is None or _computes(type(layer)):
        return None
    if any(name not in own and getattr(type(layer), name, None) is not None for name in _READ):
        return None
    seen = [own.get(name) for name in _READ]
    for kind in _HOLDERS:
        tensors = own.get(kind)
        if tensors:
            seen += [tensors.get(name) for name in _READ]
    return seen


_computing: dict[type, bool] = {}


def _computes(kind: type) -> bool:
    """Whether a class computes attributes: by a property, ``__getattr__`` or similar."""
    known = _computing.get(kind)
    if known is None:
        found = (getattr(kind, name, None) for name in _READ)
        answers: tuple[Any, ...] = (None, paddle.nn.Layer.__getattr__)
        forwards = getattr(kind, "__getattr__", None) not in answers
        asked = getattr(kind, "__getattribute__") not in (object.__getattribute__,)  # noqa: B009
        known = forwards or asked or any(hasattr(type(x), "__get__") for x in found)
        _computing[kind] = known
    return known

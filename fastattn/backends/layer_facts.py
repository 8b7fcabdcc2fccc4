"""Arguments that a layer gives to its operator, cached between steps.

A server calls a backend for every layer of every step. To ask an ``nn.Layer`` for twenty
attributes, most of them absent, takes longer than an operator's call. The cache keeps no cache
tensors and does not keep layers alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Union

import paddle

from fastattn import _ops
from fastattn.backends.layer_cache import LayerCache
from fastattn.functional._cache_types import DYNAMIC_TYPES, STATIC_TYPES
from fastattn.functional.step import StepOptions, step_options

#: Options of an attention whose mask is given as offsets.
OFFSETS_ALONE = {"causal": False, "window_size": (-1, -1)}

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


#: Attributes in which ``paddle.nn.Layer`` keeps tensors.
_HOLDERS = ("_parameters", "_buffers")


_Step = tuple[StepOptions, Union[Callable[..., Any], None]]


class LayerFacts:
    """Arguments of a layer's operator, and the values from which they were made.

    It is no dataclass, because SOT translates no methods of one.

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
    step : (StepOptions, callable or None)
        The layer's options of the operator ``attention_step``, for ``run_step``.
    masked_step : (StepOptions, callable or None)
        The same for a step with offsets, which are the whole mask of the layer.
    options : dict
        The options of `step` by name.
    head_windows : Tensor or None
        Window and first tokens of each KV head, where heads differ in what they see.
    window : int
        Number of keys that a query sees, including its own; 0 means all.
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
    step: _Step
    masked_step: _Step
    options: dict[str, Any]
    head_windows: Any
    window: int
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
        options: dict[str, Any],
        head_windows: Any = None,
    ) -> LayerFacts:
        """Make the facts from a layer's keyword arguments of ``attention_step``."""
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
        facts = cls()
        facts.seen = _seen_of(layer) if paddle.in_dynamic_mode() else None
        facts.num_caches = len(caches)
        facts.first = (4 if dynamic else 2) * layer.layer_id
        facts.dynamic = dynamic
        facts.k_scales = None if dynamic else cache.k_scales
        facts.v_scales = None if dynamic else cache.v_scales
        facts.shard = shard
        facts.step = _step_of(options)
        facts.masked_step = _step_of({**options, **OFFSETS_ALONE})
        facts.options = options
        facts.head_windows = head_windows
        facts.window = int(options["window_size"][0]) + 1
        facts.sources = (given[0], given[1]) if made else None
        facts.detached = detached
        facts.kinds = _kinds_of(given) if static else []
        return facts

    def hold(self, layer: Any, caches: Any) -> bool:
        """Whether the layer and the length of the list of caches are unchanged."""
        if self.seen is None or len(caches) != self.num_caches:
            return False
        first = self.first  # LayerCache raises the error for a cache that is None
        if caches[first] is None or caches[first + 1] is None:
            return False
        if self.dynamic and (caches[first + 2] is None or caches[first + 3] is None):
            return False
        helper = _ops.helpers()
        if helper is not None:
            return bool(helper.unchanged(layer, _HOLDERS, _READ, self.seen))
        now = _seen_of(layer)
        return now is not None and list(map(id, now)) == list(map(id, self.seen))

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


def _step_of(options: dict[str, Any]) -> _Step:
    made = step_options(**options)
    return made, made.bound() if paddle.in_dynamic_mode() else None


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

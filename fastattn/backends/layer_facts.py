"""What the two operators of a layer's step take from the layer, made once and kept.

A server calls a backend for every layer of every step, and asking an ``nn.Layer`` for twenty
attributes, most of them absent, takes longer than an operator's call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from fastattn import _ops
from fastattn.backends.layer_cache import LayerCache
from fastattn.functional._cache_types import STATIC_TYPES

#: Attributes that decide about a layer's step.
_READ = (
    "cache_fp8_format",
    "cache_k_out_scale",
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


#: Where ``paddle.nn.Layer`` keeps tensors.
_HOLDERS = ("_parameters", "_buffers")


class LayerFacts(NamedTuple):
    """Arguments of a layer's operators, and what they were made from.

    Attributes
    ----------
    layer : object
    seen : list
        Values of the layer's attributes, then what of the list of caches is the layer's. They are
        kept, so that no other object takes their identities.
    cache : LayerCache
    write, attend : dict
        Keyword arguments of ``rope_write_cache_kv`` and ``paged_attention``.
    sources : tuple of Tensor or None
        The layer's scales of K and V where those of `cache` are made of them: the latter must
        follow what is written into them.
    detached : bool
        Whether they are made by ``detach()`` alone.
    """

    layer: Any
    seen: list[Any]
    cache: LayerCache
    write: dict[str, Any]
    attend: dict[str, Any]
    sources: tuple[Any, Any] | None
    detached: bool

    @classmethod
    def of(
        cls,
        layer: Any,
        seen: list[Any],
        cache: LayerCache,
        write: dict[str, Any],
        attend: dict[str, Any],
    ) -> LayerFacts:
        """Facts from the arguments of a layer's operators, scales included."""
        given = tuple(
            getattr(layer, name, None) for name in ("cache_k_out_scale", "cache_v_out_scale")
        )
        pairs: list[tuple[Any, Any]] = list(zip((cache.k_scales, cache.v_scales), given))
        static = cache.quant_type in STATIC_TYPES
        made = static and not all(ours is theirs for ours, theirs in pairs)
        detached = made and all(
            ours.dtype == theirs.dtype and ours.shape == theirs.shape for ours, theirs in pairs
        )
        sources = (given[0], given[1]) if made else None
        return cls(layer, seen, cache, write, attend, sources, detached)

    def hold(self, caches: Any) -> bool:
        """Whether the layer and its caches are as they were when the facts were made."""
        helper = _ops.helpers()
        own = self.layer.__dict__
        if helper is None:
            now = seen_of(self.layer, caches)
            return now is not None and _same(now, self.seen)
        if not helper.unchanged(own, _HOLDERS, _READ, self.seen):
            return False
        now = _caches_of(own["layer_id"], caches)
        return _same(now, self.seen[-len(now) :])

    def with_scales(self, k_scales: Any, v_scales: Any) -> LayerFacts:
        """The same with other scales."""
        scales = {"cache_k_scales": k_scales, "cache_v_scales": v_scales}
        return self._replace(write={**self.write, **scales}, attend={**self.attend, **scales})


def seen_of(layer: Any, caches: Any) -> list[Any] | None:
    """Values that decide about a layer's step: of its attributes, then its cache tensors.

    They are read from where Python and ``paddle.nn.Layer`` keep them, which runs no code of the
    layer's class. None if the class computes one of them, or keeps them elsewhere.
    """
    own = getattr(layer, "__dict__", None)
    if own is None or _computes(type(layer)):
        return None
    seen = [own.get(name) for name in _READ]
    for kind in _HOLDERS:
        tensors = own.get(kind)
        if tensors:
            seen += [tensors.get(name) for name in _READ]
    layer_id = own.get("layer_id")
    if type(layer_id) is not int or layer_id < 0:
        return None
    return seen + _caches_of(layer_id, caches)


def _caches_of(layer_id: int, caches: Any) -> list[Any]:
    """The layer's share of the list, whichever number of tensors a layer has, and the length."""
    first, second = 2 * layer_id, 4 * layer_id
    return [*caches[first : first + 2], *caches[second : second + 4], len(caches)]


def _same(now: list[Any], seen: list[Any]) -> bool:
    """Whether two lists hold the same objects, and at the end the same number."""
    return now[-1] == seen[-1] and list(map(id, now[:-1])) == list(map(id, seen[:-1]))


_computing: dict[type, bool] = {}


def _computes(kind: type) -> bool:
    """Whether a class has a property (or another descriptor) for an attribute that is read."""
    known = _computing.get(kind)
    if known is None:
        found = (getattr(kind, name, None) for name in _READ)
        known = _computing[kind] = any(hasattr(type(x), "__get__") for x in found)
    return known

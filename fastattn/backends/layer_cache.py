"""Cache tensors and scales of one layer. No other module indexes ``forward_meta.caches``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastattn.backends.forward_meta import field
from fastattn.backends.scales import HeadShard, local_scales
from fastattn.functional._cache_types import (
    CACHE_QUANT_TYPES,
    CONFIG_TYPES,
    DYNAMIC_TYPES,
    TYPES,
    cache_type_name,
    check_cache_type,
    check_no_zero_points,
    unsupported,
    value_dim,
)


def cache_type_of(kv_cache_quant_type: str | None) -> str:
    """Cache type of a config string (``int8``, ``float8_e4m3fn``, ...) or of a type name.

    Raises
    ------
    NotImplementedError
        If it is not supported. The message lists the supported types by FastDeploy's names.
    """
    name = cache_type_name("none" if kv_cache_quant_type is None else kv_cache_quant_type)
    if name not in CACHE_QUANT_TYPES:
        theirs = {ours: name for name, ours in CONFIG_TYPES.items()}
        raise NotImplementedError(
            f"kv_cache_quant_type = {unsupported(kv_cache_quant_type)}"
            + ", ".join(theirs.get(ours, ours) for ours in CACHE_QUANT_TYPES)
        )
    return name


@dataclass(frozen=True)
class LayerCache:
    """Cache of one layer.

    Attributes
    ----------
    key, value : Tensor
    k_scales, v_scales : Tensor or None
        Dequantisation multipliers: ``[num_blocks, KV, 64]`` for dynamic types, the layer's own
        scales for static types.
    quant_type, fp8_format : str
    """

    key: Any
    value: Any
    k_scales: Any
    v_scales: Any
    quant_type: str
    fp8_format: str

    @classmethod
    def of(cls, forward_meta: Any, layer: Any, shard: HeadShard | None = None) -> LayerCache:
        """Select a layer's tensors from ``forward_meta.caches``.

        Types with one scale per token hold four tensors per layer,
        ``4 * layer_id + {k, v, k_scales, v_scales}``. Every other type holds two,
        ``2 * layer_id + {k, v}``, and static scales come from the layer (``cache_k_out_scale``,
        ``cache_v_out_scale``).

        Parameters
        ----------
        forward_meta : ForwardMeta
        layer : object
            Has ``layer_id`` and, unless its type is ``"none"``, ``cache_quant_type_str``.
        shard : HeadShard, optional
            This process's part of the model's KV heads, to cut global scales. Default: all heads.

        Raises
        ------
        NotImplementedError
            If the layer's type is not supported.
        ValueError
            If the list is too short or not a multiple of a layer's tensors, a scale is missing or
            has a wrong length, or the layer has a zero point.
        """
        quant_type = getattr(layer, "cache_quant_type_str", "none")
        quant_type = check_cache_type("LayerCache", quant_type)
        check_no_zero_points(
            "LayerCache",
            quant_type,
            cache_k_zp=getattr(layer, "cache_k_zp", None),
            cache_v_zp=getattr(layer, "cache_v_zp", None),
        )
        dynamic = quant_type in DYNAMIC_TYPES
        per_layer = 4 if dynamic else 2
        caches = field(forward_meta, "caches")
        first = per_layer * layer.layer_id
        if layer.layer_id < 0 or len(caches) < first + per_layer or len(caches) % per_layer:
            raise ValueError(
                f"forward_meta.caches: layer {layer.layer_id} of type {quant_type!r} needs "
                f"{per_layer} tensors a layer, at {first} to {first + per_layer - 1}; the list has "
                f"{len(caches)}"
            )
        key, value = caches[first], caches[first + 1]
        for index in range(first, first + per_layer):
            if caches[index] is None:
                raise ValueError(f"forward_meta.caches[{index}]: expected a tensor, got None")
        if dynamic:
            scales = [caches[first + 2], caches[first + 3]]
        elif quant_type == "none":
            scales = [None, None]
        else:
            scales = [
                cls._static_scales(layer, f"cache_{kind}_out_scale", key, shard, quant_type)
                for kind in "kv"
            ]
        fp8_format = getattr(layer, "cache_fp8_format", "e4m3")
        return cls(key, value, scales[0], scales[1], quant_type, fp8_format)

    @staticmethod
    def _static_scales(
        layer: Any, name: str, key: Any, shard: HeadShard | None, quant_type: str
    ) -> Any:
        scales = getattr(layer, name, None)
        if scales is None:
            raise ValueError(
                f"layer.{name}: cache_quant_type {quant_type!r} needs static scales, got None"
            )
        if len(key.shape) != 4:
            raise ValueError(
                "forward_meta.caches: expected a key cache of shape [num_blocks, KV, 64, D], got "
                f"{list(key.shape)}"
            )
        head_dim = int(key.shape[3])
        return local_scales(
            scales,
            name=f"layer.{name}",
            kv_heads=int(key.shape[1]),
            head_dim=head_dim if name == "cache_k_out_scale" else value_dim(head_dim),
            shard=shard or HeadShard(),
            per_channel=quant_type == "cache_int8",
        )

    def holds_e4m3(self) -> bool:
        """Whether K and V are e4m3 codes."""
        row = TYPES[self.quant_type]
        return row.code == row.value_code == self.fp8_format == "e4m3"

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments that the operators take besides the two cache tensors."""
        return {
            "cache_k_scales": self.k_scales,
            "cache_v_scales": self.v_scales,
            "cache_quant_type": self.quant_type,
            "fp8_format": self.fp8_format,
        }

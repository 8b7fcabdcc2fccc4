"""Rows of the table: a cache type and what is done to K, as plans of all layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fastattn.calibrate.calibration import Calibration, LayerCalibration
from fastattn.calibrate.choose import TRANSFORMS, Candidate, transforms_of, try_candidate
from fastattn.calibrate.samples import LayerSamples
from fastattn.functional._cache_types import CACHE_QUANT_TYPES, STATIC_TYPES, default_rotation
from fastattn.models.config import ModelConfig
from fastattn.models.served import LayerPlan

Samples = Mapping[int, Sequence[LayerSamples]]

_E4M3_QUERIES = "e4m3q"


@dataclass(frozen=True)
class Variant:
    """A row.

    Attributes
    ----------
    cache_quant_type : str
    transform : str
        One of :data:`fastattn.calibrate.choose.TRANSFORMS`.
    quantize_q : bool
        Whether queries become e4m3.
    """

    cache_quant_type: str
    transform: str = "none"
    quantize_q: bool = False

    @property
    def name(self) -> str:
        """``TYPE``, ``TYPE+center``, ``TYPE+hadamard``, ``TYPE+center+hadamard+feedback``, .."""
        parts = [self.cache_quant_type]
        parts += [self.transform] if self.transform != "none" else []
        parts += [_E4M3_QUERIES] if self.quantize_q else []
        return "+".join(parts)

    @property
    def default(self) -> bool:
        """Whether :func:`fastattn.functional.make_cache` does so without a word."""
        return self.transform == default_rotation(self.cache_quant_type) and not self.quantize_q

    @property
    def calibrated(self) -> bool:
        """Whether it takes scales, centres or a feedback from samples."""
        words = self.transform.split("+")
        return self.cache_quant_type in STATIC_TYPES or "center" in words or "feedback" in words

    def plans(self, config: ModelConfig, samples: Samples) -> list[LayerPlan]:
        """What every layer does; `samples` may be empty if nothing is taken from them."""
        if not self.calibrated:
            rotation = "hadamard" if "hadamard" in self.transform else "none"
            return [LayerPlan(self.cache_quant_type, rotation)] * config.layers
        candidate = Candidate(self.cache_quant_type, self.transform)
        return [
            as_plan(try_candidate(samples[n], candidate, "head", None))
            for n in range(config.layers)
        ]


def as_plan(found: LayerCalibration) -> LayerPlan:
    """The plan of a layer that was calibrated."""
    return LayerPlan(
        found.cache_quant_type,
        found.cache_k_rotation or "auto",
        found.cache_k_out_scale,
        found.cache_v_out_scale,
        found.cache_k_center,
        found.cache_k_feedback,
    )


def plans_of(calibration: Calibration, config: ModelConfig) -> list[LayerPlan]:
    """Plans of a calibration's file.

    Raises
    ------
    ValueError
        If it has other layers than the model.
    """
    if sorted(calibration.layers) != list(range(config.layers)):
        raise ValueError(
            f"expected layers 0 to {config.layers - 1}, got {sorted(calibration.layers)}"
        )
    return [as_plan(calibration.layers[n]) for n in range(config.layers)]


def parse(text: str) -> Variant:
    """The row that a name means; a bare type is what it does by default.

    ``TYPE+none`` is a type with nothing done to K.

    Raises
    ------
    ValueError
        If it is none.
    """
    kind, *rest = text.strip().split("+")
    if kind not in CACHE_QUANT_TYPES:
        raise ValueError(f"{kind!r} is none of {', '.join(CACHE_QUANT_TYPES)}")
    quantize_q = _E4M3_QUERIES in rest
    words = [word for word in rest if word != _E4M3_QUERIES]
    transform = "+".join(words) if words else default_rotation(kind)
    if transform not in transforms_of(kind, TRANSFORMS):
        raise ValueError(f"{text!r}: expected TYPE or TYPE+{', TYPE+'.join(TRANSFORMS)}")
    if quantize_q and not kind.endswith("fp8"):
        raise ValueError(f"{text!r}: only e4m3 types take e4m3 queries")
    return Variant(kind, transform, quantize_q)


def rows(names: str) -> list[Variant]:
    """Rows of a list: of ``default``, ``all``, or of names between commas.

    ``none`` is always the first: others are compared with it.

    Raises
    ------
    ValueError
        If a name is none.
    """
    if names == "default":
        found = [parse(kind) for kind in CACHE_QUANT_TYPES]
    elif names == "all":
        found = [
            Variant(kind, transform)
            for kind in CACHE_QUANT_TYPES
            for transform in transforms_of(kind, TRANSFORMS)
        ]
    else:
        found = [parse(name) for name in names.split(",") if name.strip()]
    base = Variant("none")
    return list(dict.fromkeys([base, *found]))

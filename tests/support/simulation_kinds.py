"""Kinds of layers that the simulated server runs, and the options drawn for one.

What a layer must give is computed for one sequence from its own tokens: rotated, normalised and
quantised by the NumPy models of :mod:`fastattn.reference`, and attended to densely in float64.
Blocks, tables and copies of blocks do not occur in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastattn import backends
from fastattn.functional._cache_types import DYNAMIC_TYPES, FEEDBACK_TYPES, TYPES
from tests.support.serving import Model
from tests.support.simulation_kind import Kind
from tests.support.simulation_latent import Latent, Sparse
from tests.support.simulation_paged import Paged
from tests.support.tensors import BF16, ONLY_COPIES_ON_GPU

#: GQA caches: type and format of FP8 codes.
PAGED = (
    ("none", "e4m3"),
    *(("cache_int8", "e4m3"), ("cache_fp8", "e4m3"), ("cache_fp8", "e5m2")),
    *((name, "e4m3") for name in DYNAMIC_TYPES),
)

#: Formats of latent caches that dense attention reads ("backend": MLAAttentionBackend's bf16), and
#: DSAAttentionBackend's caches.
LATENT = ("backend", "bf16", "fp8", "fp8_656", "fp8_584", "sparse")

KINDS = tuple("-".join(kind) for kind in PAGED) + tuple(f"latent-{name}" for name in LATENT)


def make_kind(name: str, rng: np.random.Generator, place: str) -> tuple[Kind, str]:
    """A layer of a kind of :data:`KINDS` with options that `rng` draws, and a line about it."""
    family, _, rest = name.partition("-")
    if family == "latent":
        heads = int(rng.choice([1, 2, 2, 4]))
        rule = str(rng.choice(["pow2", "amax"])) if rest in ("fp8_656", "sparse") else "pow2"
        about = f"{heads} heads, {rule}"
        if rest != "sparse":
            return Latent(rest, place, heads=heads, rule=rule), about
        topk = int(rng.choice([16, 40, 64, 512]))
        return Sparse(place, heads=heads, rule=rule, topk=topk), f"{about}, {topk} keys"
    options = _draw(family, rest, rng)
    serving = {
        # A score that lacks a constant has another tanh.
        "softcap": 0.0 if options.get("centred") else float(rng.choice([0.0, 0.0, 5.0])),
        "backend_class": backends.FlashAttentionBackend
        if rng.random() < 0.5
        else backends.AppendAttentionBackend,
    }
    serving |= _invariant_or_holes(options, bool(serving["softcap"]), place, rng)
    model = Model(family, rest, **options)
    return Paged(model, place, **serving), f"{options}, {serving}"


def _invariant_or_holes(
    options: dict[str, Any], operators: bool, place: str, rng: np.random.Generator
) -> dict[str, Any]:
    """Fixed bits, or masks with holes, which do not go together; or neither."""
    way = int(rng.integers(4))
    if way == 0:
        return {"batch_invariant": True, "split_invariant": bool(rng.random() < 0.5)}
    if way == 1:
        serving: dict[str, Any] = {}
        if options["window"]:
            parts = [0.0, 0.5, 1.0] if options["kv_heads"] == 2 else [0.0, 1.0]
            serving["part"] = float(rng.choice(parts))
            serving["first"] = int(rng.choice([0, 1, 5, 70]))
        # Backends refuse trees in a layer with a window, and invert the mask by Paddle's kernels.
        if operators or not (options["window"] or (place == "gpu" and ONLY_COPIES_ON_GPU)):
            serving["tree_size"] = int(rng.choice([0, 2, 4, 6]))
        return serving
    return {}


def _draw(quant_type: str, fp8_format: str, rng: np.random.Generator) -> dict[str, Any]:
    """Options of a :class:`Model` that its cache type takes."""

    def one_in(count: int) -> bool:
        return bool(rng.integers(count) == 0)

    kv_heads = int(rng.choice([1, 1, 2]))
    head_dim = int(rng.choice([64, 64, 64, 64, 128, 128, 96, 256]))
    options: dict[str, Any] = {
        "kv_heads": kv_heads,
        "heads": kv_heads * int(rng.choice([1, 2, 3, 4, 8] if kv_heads == 1 else [1, 2, 4])),
        "head_dim": head_dim,
        "dtype": np.dtype(np.float16) if one_in(4) else BF16,
        "neox": one_in(2),
        "rotary_dim": head_dim // 2 if one_in(4) else None,
        "norm": one_in(3),
        "bias": one_in(3),
        "sinks": one_in(3),
        "window": int(rng.integers(5, 120)) if one_in(3) else 0,
    }
    if quant_type == "none":
        return options
    if quant_type.startswith("cache"):
        options["per_channel"] = quant_type == "cache_int8" and one_in(2)
        if one_in(3):
            options["scale_dtype"] = BF16
    elif TYPES[quant_type].scheme == "token" and one_in(4):
        options["scale_dtype"] = BF16
    if fp8_format != "e5m2":  # such keys are neither rotated nor centred
        options["centred"] = one_in(4)
        options["k_rotation"] = "hadamard" if one_in(3) else None
        if quant_type in FEEDBACK_TYPES and not options.get("per_channel"):
            options["fed_back"] = one_in(2)
    if not (options.get("centred") and options["sinks"]) and one_in(4):
        options["q_quant"] = str(rng.choice(["per_tensor", "per_token_head"]))
    return options

"""Attention problems: ragged batches and caches built to show what a kernel gets wrong.

Scales differ between K and V and inside each, and are never 1. V has a mean. Physical blocks are in
random order; every slot that no sequence may read holds NaN codes with NaN scales (int8: -128), and
table entries that no sequence needs hold nonsense.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import fastattn.functional as F
from fastattn import reference
from fastattn._formats import FORMATS
from fastattn.functional._cache_types import TYPES
from fastattn.reference import numerics
from fastattn.reference.cache import code_of, dynamic_scales
from tests.support import draws
from tests.support.bounds import (
    assert_codes,
    assert_error_ratio,
    assert_lse,
    assert_within,
    rounding_step,
)
from tests.support.stored import NUMPY_TYPES, CacheTensor, store
from tests.support.tensors import (
    BF16,
    E5M2,
    int32,
    to_numpy,
    to_paddle,
    value_dim,
)

#: Options that are tensors for the operator and arrays for the reference.
_TENSOR_OPTIONS = (
    *("sinks", "mask_offsets", "out_scale", "k_descale", "v_descale", "k_center"),
    *("tree_mask", "head_windows"),
)


@dataclasses.dataclass(frozen=True)
class CacheKind:
    """A way of storing K and V."""

    quant_type: str = "none"
    granularity: str = "tensor"  # of static scales: tensor, head, channel
    fp8_format: str = "e4m3"
    scale_dtype: str = "float32"
    dtype: str = "bfloat16"  # of a cache that is not quantised

    @property
    def code(self) -> str:
        """Format of K's codes."""
        return self.code_of("k")

    def code_of(self, letter: str) -> str:
        plain = self.quant_type == "none"
        return self.fp8_format if plain else code_of(self.quant_type, self.fp8_format, letter)

    @property
    def dynamic(self) -> bool:
        return self.quant_type.startswith("block_wise")

    @property
    def grouped(self) -> bool:
        """Whether groups of channels have scales of their own, bytes."""
        return TYPES[self.quant_type].scheme == "group"

    def __str__(self) -> str:
        if self.quant_type == "none":
            return f"none-{self.dtype}"
        if self.grouped:
            return self.quant_type
        parts = [self.quant_type, "token" if self.dynamic else self.granularity]
        if self.quant_type == "cache_fp8":
            parts.append(self.fp8_format)
        return "-".join([*parts, self.scale_dtype])


PLAIN = CacheKind()
BLOCK_WISE_FP8 = CacheKind("block_wise_fp8")
BLOCK_WISE_INT8 = CacheKind("block_wise_int8")
BLOCK_WISE_INT4 = CacheKind("block_wise_int4")
BLOCK_WISE_MXFP4 = CacheKind("block_wise_mxfp4")
#: V has other codes than K.
MIXED_KINDS = [CacheKind("block_wise_k8v4"), CacheKind("block_wise_kfp8v4")]

CACHE_KINDS = [
    PLAIN,
    CacheKind(dtype="float16"),
    *(
        CacheKind(*kind, scale_dtype=scale_dtype)
        for kind in (
            *(("cache_int8", granularity) for granularity in ("tensor", "head", "channel")),
            *(("cache_fp8", g, f) for g in ("tensor", "head") for f in ("e4m3", "e5m2")),
            *((row.name,) for row in FORMATS if row.scheme == "token"),
        )
        for scale_dtype in ("float32", "bfloat16")
    ),
    *(CacheKind(row.name) for row in FORMATS if row.scheme == "group"),
]

GROUPED_KINDS = [kind for kind in CACHE_KINDS if kind.grouped]

#: One kind for each way of reading codes; enough where the kind is not what is tested.
FEW_KINDS = [
    *(PLAIN, CacheKind("cache_int8", "channel")),
    *(BLOCK_WISE_FP8, BLOCK_WISE_INT8, BLOCK_WISE_INT4),
    *MIXED_KINDS,
    *GROUPED_KINDS,
]


def _values(rng, shape, mean: float = 0.0) -> np.ndarray:
    """Normal values whose tokens differ in size."""
    return draws.kept(_draw_values, rng, tuple(shape), mean)


def _draw_values(rng, shape, mean: float) -> np.ndarray:
    size = np.exp(rng.normal(0.0, 0.4, (*shape[:-1], 1)))
    return ((rng.normal(0.0, 1.0, shape) + mean) * size).astype(np.float32)


def _draw_queries(rng, shape) -> np.ndarray:
    q = rng.normal(0.0, 1.3, shape).astype(np.float32)
    return q * np.exp(rng.normal(0.0, 0.4, (*shape[:-1], 1))).astype(np.float32)


def _queries(rng, tokens: int, heads: int, dim: int, q_type: str):
    """Q and its descale; `q_type` is a float type, ``e4m3:tensor`` or ``e4m3:token_head``."""
    q = draws.kept(_draw_queries, rng, (tokens, heads, dim))
    if q_type in NUMPY_TYPES:
        return q.astype(NUMPY_TYPES[q_type]), None
    if q_type == "e4m3:tensor":
        descale = np.array([0.0173], np.float32)
        return numerics.quantize(q, descale, "e4m3"), descale
    descale = numerics.dynamic_scale(numerics.amax(q, axis=-1), "e4m3")
    return numerics.quantize(q, descale[..., None], "e4m3"), descale


def _as_tensors(options: dict[str, Any], place: str) -> dict[str, Any]:
    return {
        name: to_paddle(value, place) if name in _TENSOR_OPTIONS and value is not None else value
        for name, value in options.items()
    }


def output_type(q: np.ndarray) -> str:
    """Name of the output type for queries of this type."""
    names = {dtype: name for name, dtype in NUMPY_TYPES.items()}
    return names.get(q.dtype, "bfloat16")


def _magnitudes(values: np.ndarray) -> np.ndarray:
    """Absolute values of FP8 codes, or of 16-bit numbers."""
    return values & 0x7F if values.dtype == np.uint8 else np.abs(values)


class Problem:
    """Common part: running, the reference, and the comparison of both."""

    q: np.ndarray
    options: dict[str, Any]

    def run(self, place: str = "cpu", **extra) -> tuple[np.ndarray, np.ndarray]:
        """(out, lse) of the operator."""
        raise NotImplementedError

    def reference(self, precision: str = "float64", **extra) -> tuple[np.ndarray, np.ndarray]:
        raise NotImplementedError

    def owned(self) -> np.ndarray:
        """Mask [T] of the tokens that belong to a sequence; results of others are not compared."""
        return np.ones(len(self.q), bool)

    def has_fp8_queries(self) -> bool:
        return self.q.dtype == np.uint8 or bool(self.options.get("quantize_q"))

    def multiplies_fp8(self) -> bool:
        """Whether Q is e4m3, and K and V are FP8: a GPU then rounds probabilities to e4m3."""
        raise NotImplementedError

    def multiplies_bf16(self) -> bool:
        """Whether K and V are bf16: a GPU then rounds probabilities to bf16, too."""
        raise NotImplementedError

    def with_magnitudes(self) -> Problem:
        """The problem with the absolute values of V."""
        raise NotImplementedError

    def scale_spread(self) -> float:
        """Largest over smallest scale of V's tokens."""
        return 1.0

    def check(
        self, place: str = "cpu", what: str = "", results: tuple | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Run and hold the result to the error-ratio rule; returns (out, lse).

        Where a GPU multiplies e4m3 by FP8, to that of e4m3 probabilities. `results`: those of a
        run that was made otherwise.
        """
        out, lse = self.run(place) if results is None else results
        owned = self.owned()
        if place != "cpu" and self.multiplies_fp8():
            assert_fp8_products(self, out, lse, what)
            return out, lse
        # The CPU kernel multiplies in fp32, a GPU kernel in 16 bits.
        precision = "float32" if place == "cpu" else "bfloat16"
        scale = self.options.get("out_scale")
        exact, exact_lse = self.reference(out_scale=None)
        naive, naive_lse = self.reference(precision, out_scale=None)
        if scale is None:
            kind = output_type(self.q)
            assert out.dtype == NUMPY_TYPES[kind], f"{what}: dtype {out.dtype}"
            assert_error_ratio(out[owned], exact[owned], naive[owned], kind, f"{what} out")
        else:
            # A bf16 probability is off by 2^-8 of it at most. The naive version's largest is exact;
            # a kernel's is where its reference is the row's maximum.
            slack = 0.0
            if place != "cpu" and self.multiplies_bf16():
                magnitudes, _ = self.with_magnitudes().reference(out_scale=None)
                slack = 2.0**-8 * np.asarray(magnitudes, np.float64)[owned]
            name = f"{what} codes"
            assert_codes(out[owned], exact[owned], naive[owned], float(scale[0]), name, slack)
        assert_lse(lse[:, owned], exact_lse[:, owned], naive_lse[:, owned], f"{what} lse")
        return out, lse


#: Codes of a kernel's probabilities: the smallest step is 2^-9, and a row's sum at least 64.
_FP8_HALF_STEP = 2.0**-10 / 64


def assert_fp8_products(problem: Problem, out, lse, what: str = "") -> None:
    """Hold a result to the error of e4m3 probabilities.

    With p' the rounded probability of a key, an output is off by at most the sum of |p' - p| |v|
    over the keys, divided by the denominator, which is at least 1 where the largest p is 1:

    - a normal code: |p' - p| <= 2^-4 p. Scores add an error of their own (the tensor core sums
      products in 14 bits), which moves p by less than 3 %. Together at most that part of the output
      for the values' magnitudes.
    - a code below 2^-6: |p' - p| <= half a step, the same for every key. With token scales p
      is multiplied by its scale over the largest of the tile's.
    """
    scale = problem.options.get("out_scale")
    exact, exact_lse = problem.reference(out_scale=None)
    twin = problem.with_magnitudes()
    relative, _ = twin.reference(out_scale=None)
    twin.q = np.zeros_like(twin.q)
    mean, keys = twin.reference(out_scale=None, sinks=None)
    total = mean * np.exp(np.asarray(keys, np.float64)).T[..., None]
    if scale is None:
        kind = str(out.dtype)
    else:
        kind, out = "e4m3", numerics.from_codes(out, "e4m3").astype(np.float64) * float(scale[0])
        largest = numerics.QMAX["e4m3"] * float(scale[0])
        exact = np.clip(exact, -largest, largest)
    owned = problem.owned()
    out, exact, relative, total = (
        np.asarray(x).astype(np.float64)[owned] for x in (out, exact, relative, total)
    )
    step = (
        rounding_step(exact, kind)
        if scale is None
        else (rounding_step(exact / float(scale[0]), kind) * float(scale[0]))
    )
    bound = (2.0**-4 + 0.03) * relative + _FP8_HALF_STEP * problem.scale_spread() * total + step
    assert_within(out, exact, bound + 1e-6, f"{what} out")
    # Rounding errors cancel over many keys, a wrong scale does not.
    finite = np.isfinite(exact) & np.isfinite(out)
    if finite.any():
        error = np.sqrt(np.mean((out - exact)[finite] ** 2))
        size = np.sqrt(np.mean(exact[finite] ** 2))
        allowed = 0.035 if scale is None else 0.055
        assert error <= allowed * size + 1e-6, f"{what}: typical error {error:.3g} of {size:.3g}"
    lse, exact_lse = np.asarray(lse)[:, owned], np.asarray(exact_lse)[:, owned]
    assert_within(lse, exact_lse, np.full(lse.shape, 0.03), f"{what} lse")


def assert_scores_in_14_bits(problem: Problem, place: str) -> None:
    """Hold a result whose scores may be of any size to what sums of FP8 products keep of them.

    The tensor core sums these in 14 bits. The rounding of a large score moves its probability, and
    two keys that are nearly the largest may change places: in a few rows only.
    """
    out, lse = problem.run(place)
    exact, exact_lse = problem.reference()
    out, exact = out.astype(np.float64), exact.astype(np.float64)
    assert np.isfinite(out).all()
    assert_within(lse, exact_lse, 0.03 + 2.0**-8 * np.abs(exact_lse), "lse")
    error = np.sqrt(np.sum((out - exact) ** 2, -1) / np.sum(exact**2, -1))
    assert np.mean(error < 0.07) > 0.9, f"{np.mean(error < 0.07):.2f} of the rows"


@dataclasses.dataclass
class PagedProblem(Problem):
    q: np.ndarray
    q_descale: np.ndarray | None
    k: CacheTensor
    v: CacheTensor
    block_tables: np.ndarray
    cu_seqlens_q: np.ndarray
    seq_lens_decoder: np.ndarray
    seq_lens_this_time: np.ndarray
    options: dict[str, Any]
    max_seqlen_q: int | None = None  # what the operator is told; None: the largest
    rounds_values: bool = (
        False  # on a GPU K and V are rounded to bf16 (docs/kernels/dequantize_kv.md)
    )

    @property
    def kind(self) -> CacheKind:
        return self.k.kind

    def multiplies_fp8(self) -> bool:
        quantised = self.kind.quant_type != "none"
        codes = {self.kind.code_of("k"), self.kind.code_of("v")}
        return self.has_fp8_queries() and quantised and codes <= {"e4m3", "e5m2"}

    def multiplies_bf16(self) -> bool:
        return self.rounds_values or self.v.elements.dtype == BF16

    def with_magnitudes(self) -> PagedProblem:
        elements = self.v.elements
        positive = elements & 7 if self.v.code == "e2m1" else _magnitudes(elements)
        return dataclasses.replace(self, v=dataclasses.replace(self.v, elements=positive))

    def scale_spread(self) -> float:
        if not self.kind.dynamic:
            return 1.0
        scales = dynamic_scales(self.v.scales, self.kind.quant_type).astype(np.float64)
        scales = scales[np.isfinite(scales)]
        return float(scales.max() / scales.min()) if scales.size else 1.0

    def slot(self, seq: int, position: int) -> tuple[int, int]:
        """(block, token in the block) of a key position."""
        return int(self.block_tables[seq, position // 64]), position % 64

    def poison(self, letter: str, seq: int, position: int, head: int | None = None) -> None:
        block, r = self.slot(seq, position)
        stored = self.k if letter == "k" else self.v
        stored.poison((block, slice(None) if head is None else head, r))

    def owned(self) -> np.ndarray:
        owned = np.zeros(len(self.q), bool)
        for first, new in zip(self.cu_seqlens_q, self.seq_lens_this_time):
            owned[first : first + new] = True
        return owned

    def cache_options(self) -> dict[str, Any]:
        return {
            "cache_quant_type": self.kind.quant_type,
            "fp8_format": self.kind.fp8_format,
        }

    def arguments(self, place: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of :func:`fastattn.functional.paged_attention`."""
        new = np.maximum(self.seq_lens_this_time, 0)
        keys = np.maximum(self.seq_lens_decoder, 0) + new
        positional = [
            to_paddle(self.q, place),
            to_paddle(self.k.packed(), place),
            to_paddle(self.v.packed(), place),
            int32(self.block_tables, place),
            int32(self.cu_seqlens_q, place),
            int32(self.seq_lens_decoder, place),
            int32(self.seq_lens_this_time, place),
            int(new.max(initial=0)) if self.max_seqlen_q is None else self.max_seqlen_q,
            int(keys.max(initial=0)),
        ]
        keywords = {**self.cache_options(), **_as_tensors(self.options, place)}
        for name, value in (
            ("cache_k_scales", self.k.scales),
            ("cache_v_scales", self.v.scales),
            ("q_descale", self.q_descale),
        ):
            keywords[name] = None if value is None else to_paddle(value, place)
        return positional, keywords

    def run(self, place: str = "cpu", **extra):
        positional, keywords = self.arguments(place)
        keywords.update(extra)
        out, lse = F.paged_attention(*positional, return_softmax_lse=True, **keywords)
        return to_numpy(out), to_numpy(lse)

    def reference(self, precision: str = "float64", **extra):
        return reference.paged_attention(
            self.q,
            self.k.packed(),
            self.v.packed(),
            self.block_tables,
            self.cu_seqlens_q,
            self.seq_lens_decoder,
            self.seq_lens_this_time,
            cache_k_scales=self.k.scales,
            cache_v_scales=self.v.scales,
            q_descale=self.q_descale,
            precision=precision,
            **{**self.cache_options(), **self.options, **extra},
        )


def _block_tables(rng, keys, prefixes, share: bool) -> tuple[np.ndarray, int]:
    """Tables [B, max_blocks] with blocks in random order, and the number of physical blocks."""
    needed = [-(-int(n) // 64) for n in keys]
    tables = np.full((len(needed), max([*needed, 1]) + 1), -1, np.int64)
    tables[:, ::2] = 2**30  # an id that no cache has
    count = 0
    for seq, blocks in enumerate(needed):
        for i in range(blocks):
            # A full block of the prefix may be another sequence's, too.
            if share and seq and i < min(prefixes[0], prefixes[seq]) // 64:
                tables[seq, i] = tables[0, i]
            else:
                tables[seq, i] = count
                count += 1
    order = rng.permutation(count + 3)
    known = (tables >= 0) & (tables < count)
    tables[known] = order[tables[known]]
    return tables.astype(np.int32), count + 3


def paged_problem(
    seqs,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    kind: CacheKind = PLAIN,
    q_type: str | None = None,
    seed: int = 0,
    spans=None,
    padding: int = 0,
    share: bool = False,
    v_mean: float = 0.7,
    **options,
) -> PagedProblem:
    """Problem of ragged sequences.

    Parameters
    ----------
    seqs : sequence of (prefix, new)
        Cached and new tokens of each sequence.
    spans : sequence of int, optional
        Tokens set aside for each sequence in ``cu_seqlens_q``, at least its new ones.
    padding : int
        Tokens behind the last sequence's.
    share : bool
        Sequences with a common number of full prefix blocks share these with the first sequence.
    options
        Passed to the operator and to the reference.
    """
    rng = np.random.default_rng(seed)
    prefixes, new = (np.array([r[i] for r in seqs], np.int32).reshape(-1) for i in (0, 1))
    tables, num_blocks = _block_tables(rng, prefixes + new, prefixes, share)
    h, kv = heads
    shape = (num_blocks, kv, 64)
    k = store(_values(rng, (*shape, dim)), kind, "k", rng)
    v = store(_values(rng, (*shape, value_dim(dim)), v_mean), kind, "v", rng)
    written = np.zeros((num_blocks, 64), bool)
    for seq, keys in enumerate(prefixes + new):
        position = np.arange(keys)
        written[tables[seq, position // 64], position % 64] = True
    hidden = np.argwhere(~written)
    for stored in (k, v):
        stored.poison((hidden[:, 0], slice(None), hidden[:, 1]))
    cu = np.concatenate([[0], np.cumsum(new if spans is None else spans)]).astype(np.int32)
    if q_type is None:
        q_type = kind.dtype if kind.quant_type == "none" else "bfloat16"
    q, q_descale = _queries(rng, int(cu[-1]) + padding, h, dim, q_type)
    return PagedProblem(q, q_descale, k, v, tables, cu, prefixes, new, options)


@dataclasses.dataclass
class FlashProblem(Problem):
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    cu_seqlens_q: np.ndarray
    cu_seqlens_k: np.ndarray
    options: dict[str, Any]
    q_descale: np.ndarray | None = None

    def multiplies_fp8(self) -> bool:
        return self.has_fp8_queries() and self.k.dtype in (np.uint8, E5M2)

    def multiplies_bf16(self) -> bool:
        return self.v.dtype == BF16

    def with_magnitudes(self) -> FlashProblem:
        return dataclasses.replace(self, v=_magnitudes(self.v))

    def arguments(self, place: str = "cpu") -> tuple[list[Any], dict[str, Any]]:
        """Positional and keyword arguments of :func:`fastattn.functional.flash_attention`."""
        positional = [
            to_paddle(self.q, place),
            to_paddle(self.k, place),
            to_paddle(self.v, place),
            int32(self.cu_seqlens_q, place),
            int32(self.cu_seqlens_k, place),
            int(np.diff(self.cu_seqlens_q).max(initial=0)),
            int(np.diff(self.cu_seqlens_k).max(initial=0)),
        ]
        keywords = _as_tensors(self.options, place)
        if self.k.dtype == E5M2:
            keywords["kv_dtype"] = "e5m2"  # the tensors hold uint8
        if self.q_descale is not None:
            keywords["q_descale"] = to_paddle(self.q_descale, place)
        return positional, keywords

    def run(self, place: str = "cpu", **extra):
        positional, keywords = self.arguments(place)
        keywords.update(extra)
        out, lse = F.flash_attention(*positional, return_softmax_lse=True, **keywords)
        return to_numpy(out), to_numpy(lse)

    def reference(self, precision: str = "float64", **extra):
        return reference.flash_attention(
            self.q,
            self.k,
            self.v,
            self.cu_seqlens_q,
            self.cu_seqlens_k,
            q_descale=self.q_descale,
            precision=precision,
            **{**self.options, **extra},
        )


def flash_problem(
    seqs,
    *,
    heads: tuple[int, int] = (4, 2),
    dim: int = 64,
    q_type: str = "bfloat16",
    kv_type: str | None = None,
    descale_shape: str = "head",
    seed: int = 0,
    v_mean: float = 0.7,
    **options,
) -> FlashProblem:
    """Problem of ragged sequences of (queries, keys) on contiguous tensors.

    `kv_type` is a float type, "e4m3", "e5m2" or "int8"; its descales have `descale_shape` "tensor"
    [1], "head" [KV] or "batch" [B, KV].
    """
    rng = np.random.default_rng(seed)
    cu_q, cu_k = (np.cumsum([0, *(r[i] for r in seqs)]).astype(np.int32) for i in (0, 1))
    h, kv = heads
    q, q_descale = _queries(rng, int(cu_q[-1]), h, dim, q_type)
    if kv_type is None:
        kv_type = "e4m3" if q_type.startswith("e4m3") else q_type
    dims = (dim, value_dim(dim))
    k, v = (_values(rng, (int(cu_k[-1]), kv, d), m) for d, m in zip(dims, (0.0, v_mean)))
    if kv_type in NUMPY_TYPES:
        k, v = k.astype(NUMPY_TYPES[kv_type]), v.astype(NUMPY_TYPES[kv_type])
        return FlashProblem(q, k, v, cu_q, cu_k, options, q_descale)
    base = np.float32({"int8": 0.031, "e4m3": 0.0113, "e5m2": 0.0147}[kv_type])
    shape = {"tensor": (1,), "head": (kv,), "batch": (len(seqs), kv)}[descale_shape]
    codes = [numerics.quantize(x, base, kv_type) for x in (k, v)]
    if kv_type == "int8":
        codes = [c.view(np.int8) for c in codes]
    elif kv_type == "e5m2":
        codes = [c.view(E5M2) for c in codes]
    descales = {
        name: (base * factor * np.exp(rng.uniform(-0.7, 0.7, shape))).astype(np.float32)
        for name, factor in (("k_descale", 1.1), ("v_descale", 1.7))
    }
    return FlashProblem(q, *codes, cu_q, cu_k, {**options, **descales}, q_descale)

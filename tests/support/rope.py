"""Steps of rope_write_cache_kv for tests, and the comparison with the NumPy model."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import rope as model
from tests.support.cache import Cache, Step, assert_same_cache, make_cache, make_step, make_values
from tests.support.compare import assert_same_bits
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, to_numpy, to_paddle

#: (cache_quant_type, fp8_format, granularity of static scales)
CACHES = (
    ("none", "e4m3", "head"),
    ("cache_int8", "e4m3", "tensor"),
    ("cache_int8", "e4m3", "channel"),
    ("cache_fp8", "e4m3", "head"),
    ("cache_fp8", "e5m2", "tensor"),
    ("block_wise_int8", "e4m3", "head"),
    ("block_wise_fp8", "e4m3", "head"),
)
QUANTS = ("none", "per_tensor", "per_token_head")


@dataclasses.dataclass
class Case:
    """Inputs of one call, as arrays; None leaves an optional one out."""

    qkv: np.ndarray
    cache: Cache
    step: Step
    rotary_embs: np.ndarray | None
    heads: int
    kv_heads: int
    tensors: dict[str, np.ndarray | None]
    options: dict[str, Any]

    @property
    def head_dim(self) -> int:
        return self.qkv.shape[1] // (self.heads + 2 * self.kv_heads)


def make_case(
    cached: list[int],
    new: list[int],
    *,
    cache: tuple[str, str, str] = CACHES[0],
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: np.dtype = BF16,
    scale_dtype=np.float32,
    q_quant: str = "none",
    neox: bool = False,
    rotary_dim: int | None = None,
    bias: bool = False,
    norm: bool = False,
    norm_first: bool = False,
    max_seq: int = 512,
    seed: int = 0,
) -> Case:
    step, num_blocks = make_step(cached, new, seed=seed)
    rng = np.random.default_rng(seed + 100)
    width = (heads + 2 * kv_heads) * head_dim
    name, fp8_format, granularity = cache
    tensors: dict[str, np.ndarray | None] = {"qkv_bias": None, "q_scale": None}
    if bias:
        tensors["qkv_bias"] = rng.normal(size=width).astype(dtype)
    if norm:
        tensors["q_norm_weight"] = rng.uniform(0.5, 2, head_dim).astype(np.float32)
        tensors["k_norm_weight"] = rng.uniform(-2, -0.5, head_dim).astype(np.float32)
    if q_quant == "per_tensor":
        tensors["q_scale"] = np.array([0.0173], np.float32)
    return Case(
        make_values((step.num_tokens, width), dtype, seed + 1),
        make_cache(
            name,
            num_blocks,
            kv_heads,
            head_dim,
            fp8_format=fp8_format,
            dtype=dtype,
            scale_dtype=scale_dtype,
            granularity=granularity,
            seed=seed + 2,
        ),
        step,
        model.make_rotary_embs(max_seq, rotary_dim or head_dim, theta=500.0, neox=neox),
        heads,
        kv_heads,
        tensors,
        {
            "rms_norm_eps": 1e-5,
            "use_neox_rotary_style": neox,
            "rotary_dim": rotary_dim,
            "qk_norm_before_rope": norm_first,
            "q_quant": q_quant,
        },
    )


def many_seqs(seqs: int, most: int, *, with_ids: bool, **options: Any) -> Case:
    """Sequences of up to `most` new tokens, of which the first third rests.

    `with_ids`: each token has its sequence's number, and every seventh is of none.
    """
    rng = np.random.default_rng(seqs)
    new = rng.integers(0, most + 1, seqs)
    new[: seqs // 3] = 0
    cached = list(rng.integers(0, 70, seqs))
    case = make_case(cached, list(new), heads=2, kv_heads=1, **options)
    if with_ids:
        ids = np.repeat(np.arange(seqs), new).astype(np.int32)
        ids[::7] = -1
        case.tensors["batch_id_per_token"] = ids
    return case


def own_angles(case: Case, slots: int, positions: int, seed: int = 0) -> np.ndarray:
    """Angles [slots, positions, R / 2] in fp64 of which no two rows are alike.

    A row is a position of three axes, as multimodal RoPE has them: every pair of channels turns by
    the position of one axis.
    """
    rng = np.random.default_rng(seed + 500)
    pairs = (case.options["rotary_dim"] or case.head_dim) // 2
    axes = rng.integers(0, 3, pairs)
    where = np.cumsum(rng.integers(0, 4, (slots, positions, 3)), axis=1) + rng.random((slots, 1, 1))
    return where[..., axes] * 500.0 ** (-np.arange(pairs) / pairs)


def tables_of(angles: np.ndarray, *, neox: bool, doubled: bool, short: bool = False) -> np.ndarray:
    """Tables [.., 2, 1, positions, 1, columns], or [.., 2, positions, columns] if `short`."""
    if doubled:
        angles = np.concatenate([angles] * 2, axis=-1) if neox else np.repeat(angles, 2, axis=-1)
    tables = np.stack([np.cos(angles), np.sin(angles)], axis=-3).astype(np.float32)
    return tables if short else tables[..., None, :, None, :]


def with_own_tables(case: Case, *, spare: int = 2) -> Case:
    """The case with a table for each sequence, and `spare` slots more.

    Neox tables have every angle twice, as FastDeploy's.
    """
    neox = case.options["use_neox_rotary_style"]
    angles = own_angles(case, len(case.step.seq_lens_decoder) + spare, 200, seed=0)
    tables = tables_of(angles, neox=neox, doubled=neox, short=False)
    return dataclasses.replace(case, rotary_embs=tables)


def expected(case: Case) -> tuple[np.ndarray, np.ndarray | None, Cache]:
    cache = case.cache.copy()
    q, descale = reference.rope_write_cache_kv(
        case.qkv,
        cache.key,
        cache.value,
        case.rotary_embs,
        *case.step.arrays,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        cache_k_scales=cache.k_scales,
        cache_v_scales=cache.v_scales,
        **cache.options,
        **case.tensors,
        **case.options,
    )
    return q, descale, cache


def run(case: Case, place: str) -> tuple[np.ndarray, np.ndarray | None, Cache]:
    cache = case.cache
    names = ("key", "value", "k_scales", "v_scales")
    arrays = {name: getattr(cache, name) for name in names}
    # to_paddle may share an array's memory, and the operator writes in place
    on = {k: None if a is None else to_paddle(a.copy(), place) for k, a in arrays.items()}
    q, descale = F.rope_write_cache_kv(
        to_paddle(case.qkv, place),
        on["key"],
        on["value"],
        None if case.rotary_embs is None else to_paddle(case.rotary_embs, place),
        *(to_paddle(a, place) for a in case.step.arrays),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        cache_k_scales=on["k_scales"],
        cache_v_scales=on["v_scales"],
        **cache.options,
        **{k: None if a is None else to_paddle(a, place) for k, a in case.tensors.items()},
        **case.options,
    )
    after = Cache(
        *(None if on[name] is None else to_numpy(on[name]) for name in names),
        cache.cache_quant_type,
        cache.fp8_format,
    )
    return to_numpy(q), None if descale is None else to_numpy(descale), after


def check(case: Case, place: str) -> tuple[np.ndarray, np.ndarray | None, Cache]:
    q, descale, cache = run(case, place)
    wanted_q, wanted_descale, wanted_cache = expected(case)
    assert_same_bits(q, wanted_q, "q")
    if wanted_descale is None:
        assert descale is None
    else:
        assert_same_bits(descale, wanted_descale, "q_descale")
    assert_same_cache(cache, wanted_cache)
    return q, descale, cache


def write_block_wise_fp8(qkv, key, value, k_scales, v_scales, table, blocks, cu, cached, new):
    """A call that Paddle can trace: it traces neither a lambda nor a nested function's tensors."""
    return F.rope_write_cache_kv(
        qkv,
        key,
        value,
        table,
        blocks,
        cu,
        cached,
        new,
        num_heads=4,
        num_kv_heads=2,
        q_quant="per_token_head",
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        cache_quant_type="block_wise_fp8",
    )


def check_all_modes(case: Case, place: str, **options: Any) -> None:
    """Hold every mode of Paddle to the model; the case is what `write_block_wise_fp8` writes."""
    cache = case.cache
    arrays = [case.qkv, cache.key, cache.value, cache.k_scales, cache.v_scales]
    arrays += [case.rotary_embs, *case.step.arrays]
    outputs, inputs = run_all_modes(write_block_wise_fp8, arrays, place, **options)
    q, descale, after = expected(case)
    assert_same_bits(outputs[0], q, "q")
    assert_same_bits(outputs[1], descale, "q_descale")
    assert_same_cache(Cache(*inputs[1:5], cache.cache_quant_type, "e4m3"), after)

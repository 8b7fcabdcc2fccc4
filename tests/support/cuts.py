"""One sequence served in steps that are cut anywhere: chunks, single tokens, drafts, in batches."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import paddle

import fastattn.functional as F
from fastattn import _plan
from tests.support.tensors import to_numpy, to_paddle

BLOCK = 64
#: (cache type, granularity of static scales)
CACHES = [
    ("none", ""),
    ("cache_int8", "head"),
    ("cache_fp8", "head"),
    ("cache_int8", "channel"),
    ("block_wise_int8", ""),
    ("block_wise_fp8", ""),
    ("block_wise_int4", ""),
    ("block_wise_mxfp4", ""),
    ("block_wise_k8v4", ""),
    ("block_wise_kfp8v4", ""),
]
#: Of this build, which may be limited to some (FASTATTN_HEAD_DIMS).
_HEAD_DIMS = sorted(set(_plan.host().head_dims()))
_DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


class Step(NamedTuple):
    """New tokens of a step: those that stay, and drafts that are rejected and written over."""

    accepted: int
    rejected: int = 0


class Served(NamedTuple):
    """What a sequence's tokens got, and what its cache holds, in the order of the tokens."""

    out: np.ndarray  # [T, H, D]
    lse: np.ndarray  # [H, T]
    stored: list[np.ndarray]  # codes and scales, a block first


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A sequence, and the layer that attends to it.

    Attributes
    ----------
    q, k, v : array, shape [T, H | KV | KV, D]
    cache : tuple of str
        One of :data:`CACHES`.
    cache_options, options : dict
        Keyword arguments of ``make_cache``, and of ``paged_attention``. Arrays become tensors.
    """

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    cache: tuple[str, str]
    cache_options: dict[str, Any]
    options: dict[str, Any]

    def serve(self, steps: list[Step], place: str = "cpu", seed: int = 0) -> Served:
        """Serve it in steps, beside other sequences, in blocks that `seed` draws.

        On a GPU with `split_invariant`.
        """
        rng = np.random.default_rng(seed)
        tokens = sum(step.accepted for step in steps)
        assert tokens == len(self.q)
        own = -(-(tokens + max(step.rejected for step in steps)) // BLOCK)
        server = _Server(self, own, rng, place)
        outs, lses, at = [], [], 0
        for step in steps:
            out, lse = server.step(at, step)
            outs.append(out[: step.accepted])
            lses.append(lse[:, : step.accepted])
            at += step.accepted
        return Served(np.concatenate(outs), np.concatenate(lses, 1), server.stored(tokens))


class _Server:
    """A cache, the sequence's blocks in it, and up to two neighbours that change in every step."""

    def __init__(self, seq: Sequence, own: int, rng: np.random.Generator, place: str) -> None:
        self.seq, self.rng, self.place = seq, rng, place
        self.beside = 4  # blocks of the neighbours
        blocks = rng.permutation(own + self.beside).astype(np.int32)
        self.table, self.others = blocks[:own], blocks[own:]
        kind, granularity = seq.cache
        kv_heads, dim = seq.k.shape[1:]
        scales = {}
        if granularity:
            for name, x in (("cache_k_scales", seq.k), ("cache_v_scales", seq.v)):
                count = kv_heads * (x.shape[2] if granularity == "channel" else 1)
                drawn = np.random.default_rng(count).uniform(0.01, 0.05, count).astype(np.float32)
                scales[name] = to_paddle(drawn, "cpu")
        made = {
            n: to_paddle(x, "cpu") if isinstance(x, np.ndarray) else x
            for n, x in seq.cache_options.items()
        }
        dtype = str(seq.k.dtype)
        cache = F.make_cache(
            own + self.beside, kv_heads, dim, kind, dtype=dtype, place="cpu", **scales, **made
        )
        # Copies only: Paddle 2.6 has no kernels for Hopper that fill a tensor.
        fields = {f.name: getattr(cache, f.name) for f in dataclasses.fields(cache)}
        moved = {
            n: to_paddle(to_numpy(x), place)
            for n, x in fields.items()
            if isinstance(x, paddle.Tensor)
        }
        self.cache = dataclasses.replace(cache, **moved)
        self.options = {n: self._given(x) for n, x in seq.options.items()}

    def _given(self, value: Any) -> Any:
        return to_paddle(value, self.place) if isinstance(value, np.ndarray) else value

    def _neighbour(self, table: np.ndarray) -> tuple[int, int, np.ndarray]:
        """Past tokens, new tokens and blocks of another sequence, which may have none."""
        new = int(self.rng.choice([0, 1, 1, 3, 20]))
        return int(self.rng.integers(0, len(table) * BLOCK - new)), new, table

    def step(self, past: int, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """Write and attend; the rows of the sequence."""
        seq, rng = self.seq, self.rng
        new = step.accepted + step.rejected
        half = self.beside // 2
        batch = [self._neighbour(self.others[:half]), self._neighbour(self.others[half:])]
        batch = batch[: rng.integers(0, 3)]
        mine = int(rng.integers(0, len(batch) + 1))
        batch.insert(mine, (past, new, self.table))
        counts = [n for _, n, _ in batch]
        first = sum(counts[:mine])
        rows = []
        for x in (seq.q, seq.k, seq.v):
            noise = rng.standard_normal((sum(counts), *x.shape[1:])).astype(x.dtype)
            noise[first : first + step.accepted] = x[past : past + step.accepted]
            rows.append(to_paddle(noise, self.place))
        tables = np.full((len(batch), max(len(t) for _, _, t in batch)), -1, np.int32)
        for row, (_, _, table) in zip(tables, batch):
            row[: len(table)] = table
        arrays = {
            "block_tables": tables,
            "cu_seqlens_q": np.concatenate([[0], np.cumsum(counts)]).astype(np.int32),
            "seq_lens_decoder": np.array([p for p, _, _ in batch], np.int32),
            "seq_lens_this_time": np.array(counts, np.int32),
        }
        seqs = {name: to_paddle(array, self.place) for name, array in arrays.items()}
        q, k, v = rows
        caches = (self.cache.key_cache, self.cache.value_cache)
        F.write_cache_kv(k, v, *caches, **seqs, **self.cache.arguments)
        longest = {"max_seqlen_q": max(counts), "max_seqlen_k": max(p + n for p, n, _ in batch)}
        given = {**self.cache.arguments, **self.options, **longest, "return_softmax_lse": True}
        given["split_invariant"] = self.place != "cpu"
        out, lse = F.paged_attention(q, *caches, **seqs, **given)
        mine_rows = slice(first, first + new)
        return to_numpy(out)[mine_rows], to_numpy(lse)[:, mine_rows]

    def stored(self, tokens: int) -> list[np.ndarray]:
        """Bytes of the sequence's whole blocks; the last one has rejected drafts in it, too."""
        whole = self.table[: tokens // BLOCK]
        tensors = [self.cache.key_cache, self.cache.value_cache]
        if self.seq.cache[0].startswith("block_wise"):
            tensors += [self.cache.cache_k_scales, self.cache.cache_v_scales]
        return [to_numpy(x)[whole] for x in tensors]


def draw_steps(rng: np.random.Generator, tokens: int) -> list[Step]:
    """Steps of one kind, or of any: single tokens, chunks, drafts, the rest at once."""
    kind = rng.choice(["tokens", "chunk", "drafts", "any"])
    chunk = int(rng.choice([1, 2, 7, 17, 64, 100, 300, 2048]))
    steps, left = [], tokens
    while left:
        if len(steps) > 40:  # enough of small ones
            steps.append(Step(left))
            break
        accepted, rejected = 1, 0
        if kind == "chunk":
            accepted = chunk
        elif kind == "drafts":
            accepted, rejected = (int(x) for x in rng.integers((1, 0), (5, 4)))
        elif kind == "any":
            accepted = int(rng.choice([1, 1, 3, 30, 65, 129, 700]))
            rejected = int(rng.choice([0, 0, 2]))
        accepted = min(accepted, left)
        steps.append(Step(accepted, rejected))
        left -= accepted
    return steps


def draw_sequence(rng: np.random.Generator, tokens: int | None = None) -> Sequence:
    """A sequence of one layer: any cache type, head counts, head dimension and options."""
    if tokens is None:
        tokens = int(rng.choice([rng.integers(1, 90), rng.integers(90, 700)]))
    cache = CACHES[rng.integers(len(CACHES))]
    dim = int(rng.choice(_HEAD_DIMS))
    kv_heads, group = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 4, 7, 8]))
    dtype = _DTYPES[str(rng.choice(["bfloat16", "float16"]))]
    value_dim = 128 if dim == 192 else dim
    shapes = [(kv_heads * group, dim), (kv_heads, dim), (kv_heads, value_dim)]
    q, k, v = (rng.standard_normal((tokens, *shape)).astype(dtype) for shape in shapes)
    cache_options: dict[str, Any] = {}
    if rng.random() < 0.3 and cache[0] != "none" and cache[1] != "channel" and dim in (64, 128):
        cache_options["k_rotation"] = "hadamard"
        if cache[0].startswith("block_wise"):
            cache_options["k_center"] = rng.standard_normal((kv_heads, dim)).astype(np.float32)
    options: dict[str, Any] = {"softmax_scale": float(rng.uniform(0.05, 0.4))}
    if rng.random() < 0.3:
        options["window_size"] = (int(rng.integers(0, 300)), 0)
    if rng.random() < 0.2 and "k_center" not in cache_options:
        options["softcap"] = float(rng.uniform(1, 30))
    if rng.random() < 0.3:
        options["sinks"] = rng.standard_normal(kv_heads * group).astype(np.float32)
    if rng.random() < 0.2:
        options["out_dtype"] = "float32"
    return Sequence(q, k, v, cache, cache_options, options)

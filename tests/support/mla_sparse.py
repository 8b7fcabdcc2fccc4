"""Problems of sparse latent attention, and how far a result may be from fp64.

Whatever no query may see is NaN in every byte: unwritten rows, the padding of pages, and rows that
only indices behind a length name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

import fastattn.functional as F
from fastattn import reference
from fastattn.reference.mla import FORMATS, ROPE_DIM
from fastattn.reference.mla_sparse import selected_keys
from tests.support.latent import SCALE, scale_of
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

#: Format, scale rule and channels of a cache.
Kind = tuple[str, str, int]
KINDS: dict[str, Kind] = {
    "bf16": ("bf16", "pow2", 576),
    "bf16_512": ("bf16", "pow2", 512),
    "fp8": ("fp8", "pow2", 576),
    "fp8_656": ("fp8_656", "pow2", 576),
    "fp8_656_amax": ("fp8_656", "amax", 576),
    "fp8_584": ("fp8_584", "pow2", 512),
    "fp8_528": ("fp8_528", "pow2", 512),
}

#: Kinds whose scales are no powers of two.
ANY_SCALE = (KINDS["fp8"], KINDS["fp8_656_amax"])

#: What is behind a length and in the way of whoever follows it.
FAR = (2**31 - 1, -(2**31), 2147480000, -1)


def check_output(got: Any, want: Any) -> None:
    """Relative RMS, cosine and each element; the same elements are NaN."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape} != {want.shape}"
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    assert not np.isinf(got).any(), "an output is infinite"
    rows = ~np.isnan(want).any(axis=-1)
    x, y = got[rows], want[rows]
    if not y.any():
        assert not x.any(), "outputs that are not 0"
        return
    error = np.sqrt(((x - y) ** 2).sum() / (y**2).sum())
    assert error <= 2.5e-3, f"relative RMS {error:.2e}"
    # A large row excuses no small one. A row has fewer elements, whose rounding averages out less.
    size = np.sqrt((y**2).sum(axis=-1))
    assert not x[size == 0].any(), "outputs of a query without a key that are not 0"
    each = np.sqrt(((x - y) ** 2).sum(axis=-1))[size > 0] / size[size > 0]
    assert each.max() <= 5e-3, f"relative RMS of a row {each.max():.2e}"
    cosine = 1 - (x * y).sum() / np.sqrt((x**2).sum() * (y**2).sum())
    assert cosine <= 5e-6, f"cosine distance {cosine:.2e}"
    apart = np.abs(x - y)
    # Weights of 8 bits, as a tensor core takes them: of many elements some are off by four of their
    # standard deviations.
    largest, wrong = np.abs(y).max(), apart > 2 / 128 * np.abs(y)
    far = wrong & (apart > 1e-3 * largest)
    assert far.mean() <= 5e-3, f"{far.sum()} of {far.size} elements, worst {apart[far].max():.2e}"
    assert not (wrong & (apart > 2**-8 * largest)).any(), f"an element is off by {apart.max():.2e}"


def lse_noise(q: np.ndarray, keys: np.ndarray, softmax_scale: float) -> np.ndarray:
    """Standard deviation of a query's LSE [H] where keys are rounded to 11 bits.

    A tensor core multiplies 16 bits. Products of codes and powers of two fit them; those with any
    other scale are rounded, each by itself, and the LSE moves by the mean of its scores' errors.
    """
    if not len(keys):
        return np.zeros(len(q))
    with np.errstate(invalid="ignore"):
        scores = q @ keys.T * softmax_scale
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        each = abs(softmax_scale) * np.sqrt(q**2 @ (keys**2).T) * 2.0**-11 / np.sqrt(3)
        return np.nan_to_num(np.sqrt(((weights * each) ** 2).sum(axis=1)))


def check_lse(got: Any, want: Any, noise: Any = 0.0) -> None:
    """Infinities and NaN in the same places; the others as the arithmetic's fp32 allows.

    `noise` is that of :func:`lse_noise`, for a GPU and scales that are no powers of two.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape} != {want.shape}"
    np.testing.assert_array_equal(np.isneginf(got), np.isneginf(want))
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    seen = np.isfinite(want)
    bound = 5e-6 + 1e-6 * np.abs(want) + 5 * np.asarray(noise)
    excess = np.abs(got - want)[seen] - bound[seen]
    assert (excess <= 0).all(), f"{excess.max():.2e} above the bound"


@dataclass
class Cache:
    """A latent cache, the slots that hold tokens, and how its bytes are to be read."""

    data: np.ndarray
    written: np.ndarray
    kind: Kind
    page_size: int
    padded: bool

    @property
    def slots(self) -> int:
        """Slots of the cache, written or not."""
        return len(self.data) * self.page_size

    def options(self) -> dict[str, Any]:
        """Arguments that describe it."""
        return {
            "cache_format": self.kind[0],
            "scale": scale_of(self.kind[0]),
            "page_size": self.page_size if self.padded else None,
        }


def make_cache(
    rng: np.random.Generator,
    kind: Kind,
    tokens: int,
    page_size: int = 64,
    *,
    pages: int | None = None,
    padding: int = 0,
    latents: np.ndarray | None = None,
) -> Cache:
    """Tokens at random slots of a cache that is NaN everywhere else.

    Parameters
    ----------
    tokens : int
        Written ones.
    pages : int, optional
        Default: so many that about a third of the slots stay unwritten.
    padding : int
        Bytes behind the tokens of each page.
    latents : array of bfloat16, shape [tokens, channels], optional
        Default: N(0, 1), with tiles and tokens of unequal size.
    """
    cache_format, rule, dim = kind
    latent = dim - ROPE_DIM
    pages = -(-3 * tokens // (2 * page_size)) + 1 if pages is None else pages
    written = rng.permutation(pages * page_size)[:tokens]
    if latents is None:
        sizes = np.exp2(rng.uniform(-2, 1, (tokens, dim // 64))).repeat(64, axis=1)
        latents = (rng.normal(size=(tokens, dim)) * sizes).astype(BF16)
    if cache_format == "bf16":
        data = np.full((pages, page_size * dim + padding // 2), np.nan, BF16)
        tokens_of = data[:, : page_size * dim].reshape(pages, page_size, dim)
        rows = tokens_of.copy()
        rows[written // page_size, written % page_size] = latents
        data[:, : page_size * dim] = rows.reshape(pages, -1)
        width = dim
    else:
        width = FORMATS[cache_format].token_bytes
        data = np.full((pages, page_size * width + padding), 0xFF, np.uint8)
        data = reference.mla_write_cache(
            latents[:, :latent],
            latents[:, latent:],
            data,
            written,
            cache_format=cache_format,
            scale_rule=rule,
            scale=scale_of(cache_format),
            page_size=page_size,
        )
    if not padding:
        data = data.reshape(pages, page_size, width)
    return Cache(data, written, kind, page_size, bool(padding))


def make_indices(
    rng: np.random.Generator, cache: Cache, rows: int, topk: int, lengths: Any = None
) -> np.ndarray:
    """Written slots with some to be skipped; behind a length, slots of NaN and far away ones."""
    indices = rng.choice(cache.written, (rows, topk)) if len(cache.written) else None
    if indices is None:
        return np.full((rows, topk), -1, np.int32)
    skipped = rng.random((rows, topk)) < 0.1
    indices[skipped] = rng.choice([-1, -7, cache.slots, 2**31 - 1, -(2**31)], skipped.sum())
    if lengths is not None:
        unwritten = np.setdiff1d(np.arange(cache.slots), cache.written)
        junk = np.concatenate([unwritten, np.repeat(FAR, 1 + len(unwritten) // 4)])
        behind = np.arange(topk) >= np.asarray(lengths)[:, None]
        indices[behind] = rng.choice(junk, behind.sum())
    return indices.astype(np.int32)


@dataclass
class Problem:
    """One call: :meth:`run` is the operator's result, :meth:`want` that of the NumPy model."""

    q: np.ndarray
    cache: Cache
    indices: np.ndarray
    lengths: np.ndarray | None = None
    extra: Cache | None = None
    extra_indices: np.ndarray | None = None
    extra_lengths: np.ndarray | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> tuple[list[np.ndarray], dict[str, Any]]:
        """Positional and keyword arguments, tensors as arrays."""
        named = {**self.cache.options(), "topk_length": self.lengths, **self.options}
        if self.extra is not None:
            named |= {f"extra_{name}": x for name, x in self.extra.options().items()}
            named |= {
                "extra_cache": self.extra.data,
                "extra_indices": self.extra_indices,
                "extra_topk_length": self.extra_lengths,
            }
        return [self.q, self.cache.data, self.indices], named

    def tensors(self, place: str) -> tuple[list[Any], dict[str, Any]]:
        """The same with tensors on a place."""
        positional, named = self.arguments()
        return [to_paddle(x, place) for x in positional], {
            name: to_paddle(x, place) if isinstance(x, np.ndarray) else x
            for name, x in named.items()
        }

    def run(self, place: str) -> tuple[np.ndarray, np.ndarray]:
        positional, named = self.tensors(place)
        out, lse = F.mla_sparse_attention(*positional, **named, return_softmax_lse=True)
        return to_numpy(out), to_numpy(lse)

    def want(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        positional, named = self.arguments()
        return reference.mla_sparse_attention(*positional, **named)

    def check(self, place: str) -> tuple[np.ndarray, np.ndarray]:
        """Run, compare, and return the operator's result."""
        (out, lse), (want, want_lse, _) = self.run(place), self.want()
        check_output(out, want)
        check_lse(lse, want_lse, self.noise(place))
        return out, lse

    def noise(self, place: str) -> Any:
        """Of the LSE [H, T]; 0 where keys fit 16 bits, and on a CPU."""
        kinds = [c.kind for c in (self.cache, self.extra) if c is not None]
        if place == "cpu" or not any(kind in ANY_SCALE for kind in kinds):
            return 0.0
        scale = self.options.get("softmax_scale", self.q.shape[-1] ** -0.5)
        rows = []
        for t, q in enumerate(self.q.astype(np.float64)):
            keys = []
            for cache, indices, lengths in (
                (self.cache, self.indices, self.lengths),
                (self.extra, self.extra_indices, self.extra_lengths),
            ):
                if cache is not None:
                    length = None if lengths is None else int(lengths[t])
                    options = cache.options()
                    keys.append(
                        selected_keys(
                            cache.data,
                            indices[t],
                            length,
                            options["cache_format"],
                            options["scale"],
                            options["page_size"],
                            q.shape[-1],
                        )
                    )
            rows.append(lse_noise(q, np.concatenate(keys), scale))
        return np.array(rows).T


def queries(rng: np.random.Generator, rows: int, heads: int, dim: int, std: float = 1.0):
    """Queries whose heads differ in size."""
    sizes = std * np.exp2(rng.uniform(-1, 1, (rows, heads, 1)))
    return (rng.normal(size=(rows, heads, dim)) * sizes).astype(BF16)


def make_problem(
    seed: int,
    kind: str,
    heads: int,
    lengths: Any = (200, 0, 37, 1, 130),
    topk: int = 200,
    *,
    std: float = 1.0,
    **cache: Any,
) -> Problem:
    """A cache, and one query for each of `lengths`."""
    rng = np.random.default_rng(seed)
    lengths = np.asarray(lengths, np.int32)
    made = make_cache(rng, KINDS[kind], cache.pop("tokens", 300), **cache)
    q = queries(rng, len(lengths), heads, KINDS[kind][2], std)
    indices = make_indices(rng, made, len(lengths), topk, lengths)
    return Problem(q, made, indices, lengths)


def add_extra(problem: Problem, seed: int, kind: str, lengths: Any, topk: int, **cache: Any):
    """The same problem with a second cache in its softmax."""
    rng = np.random.default_rng(seed)
    problem.extra = make_cache(rng, KINDS[kind], cache.pop("tokens", 150), **cache)
    problem.extra_lengths = None if lengths is None else np.asarray(lengths, np.int32)
    problem.extra_indices = make_indices(
        rng, problem.extra, len(problem.q), topk, problem.extra_lengths
    )
    return problem


__all__ = [
    "BF16",
    "KINDS",
    "SCALE",
    "Cache",
    "Problem",
    "add_extra",
    "check_lse",
    "check_output",
    "int32",
    "make_cache",
    "make_indices",
    "make_problem",
    "queries",
]

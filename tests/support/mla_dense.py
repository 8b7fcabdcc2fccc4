"""Problems of dense latent attention, with NaN in every byte that no query may see."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import paddle

import fastattn.functional as F
from fastattn import reference
from fastattn.reference import mla as model
from tests.support.latent import scale_of, width
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

#: Of a page that no block table entry names.
UNASSIGNED = (-1, -(2**31), 2147480000)


class Problem:
    """A step of sequences of `cached` and `new` tokens, in shuffled pages of one cache."""

    def __init__(
        self,
        cached,
        new,
        *,
        heads=16,
        cache_format="bf16",
        page_size=64,
        seed=0,
        gap=0,
        spare=2,
        q_std=1.0,
        latents=None,
        rule="pow2",
        page_bytes=0,
    ):
        rng = np.random.default_rng(seed)
        self.rng, self.cache_format, self.page_size = rng, cache_format, page_size
        self.cached, self.new = np.asarray(cached), np.asarray(new)
        fmt = model.FORMATS[cache_format]
        self.scale = scale_of(cache_format)
        lengths = np.maximum(self.cached, 0) + self.new
        blocks = -(-lengths // page_size)
        pages = int(blocks.sum()) + spare
        order = rng.permutation(pages)
        columns = max(int(blocks.max(initial=0)), 1) + 1
        self.tables = np.full((len(lengths), columns), 2147480000, np.int64)
        elements, dtype = width(cache_format)
        own = fmt.token_bytes * page_size
        self.as_pages = page_bytes > 0
        raw = np.full((pages, max(own, page_bytes)), 0xFF, np.uint8).view(dtype)
        cache = raw if self.as_pages else raw.reshape(-1, page_size, elements)
        slots, at = [], 0
        for b, count in enumerate(blocks):
            self.tables[b, :count] = order[at : at + count]
            at += count
            i = np.arange(lengths[b])
            slots.append(self.tables[b, i // page_size] * page_size + i % page_size)
        slots = np.concatenate(slots) if slots else np.zeros(0, np.int64)
        if latents is None:
            x = rng.normal(size=(len(slots), fmt.latent)) * np.exp2(
                rng.integers(-3, 2, (len(slots), fmt.latent // 64))
            ).repeat(64, axis=1)
        else:
            x = latents(rng, len(slots), fmt.latent)
        rope = rng.normal(size=(len(slots), 64)).astype(BF16)
        if cache_format == "fp8":
            x = np.clip(x, -5, 5)
        self.cache = reference.mla_write_cache(
            x.astype(BF16),
            rope,
            cache,
            slots,
            cache_format=cache_format,
            scale_rule=rule,
            scale=self.scale,
            page_size=page_size if self.as_pages else None,
        )
        self.starts = np.concatenate([[gap], gap + np.cumsum(self.new + gap)])
        tokens = int(self.starts[-1])
        self.q = np.full((tokens, heads, fmt.latent + 64), np.nan, BF16)
        for start, count in zip(self.starts, self.new):
            shape = (count, heads, fmt.latent + 64)
            self.q[start : start + count] = (rng.normal(size=shape) * q_std).astype(BF16)

    def options(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of both functions."""
        options: dict[str, Any] = {"cache_format": self.cache_format, "scale": self.scale}
        options["softmax_scale"] = 0.0771
        if self.as_pages:
            options["page_size"] = self.page_size
        return {**options, **changes}

    def want(self, rounded: bool = True, **changes: Any):
        """Over keys rounded to bf16, or over codes times scales as they are."""
        seqs = self.tables, self.starts, self.cached, self.new
        values = model.token_values if rounded else model.exact_values
        with mock.patch.object(model, "token_values", values):
            return reference.mla_attention(self.q, self.cache, *seqs, **self.options(**changes))

    def seq_arrays(self):
        return [x.astype(np.int32) for x in (self.tables, self.starts, self.cached, self.new)]

    def seqs(self, place: str):
        return [int32(x, place) for x in self.seq_arrays()]

    def run(self, place: str = "cpu", q=None, cache=None, **changes: Any):
        """Output and LSE as arrays."""
        options = self.options(**changes)
        for name in ("scale", "sinks", "out"):
            value = options.get(name)
            if value is not None and not isinstance(value, paddle.Tensor):
                options[name] = to_paddle(np.array(value), place)
        keys = np.maximum(self.cached, 0) + self.new
        out, lse = F.mla_attention(
            to_paddle(self.q, place) if q is None else q,
            to_paddle(self.cache, place) if cache is None else cache,
            *self.seqs(place),
            int(self.new.max(initial=0)),
            int(keys.max(initial=0)),
            return_softmax_lse=True,
            **options,
        )
        return to_numpy(out), to_numpy(lse)

    def rounds_keys(self, place: str) -> bool:
        """Whether products of codes and scales are rounded to bf16: not by Hopper's kernel of few
        rows, which `launch.cu` chooses alike."""
        if place == "cpu" or self.cache_format not in ("fp8", "fp8_656"):
            return True
        rows = int(self.new.max(initial=0)) * self.q.shape[1]
        hopper = paddle.device.cuda.get_device_properties().major == 9
        return not (hopper and len(self.cache) > 0 and 0 < rows <= 16)

    def accept(self, place: str, got, **changes: Any) -> None:
        """Check output and LSE."""
        assert_close(got, self.want(rounded=self.rounds_keys(place), **changes))

    def check(self, place: str = "cpu", **changes: Any) -> None:
        self.accept(place, self.run(place, **changes), **changes)


def assert_close(got, want) -> None:
    """Outputs [T, H, 512] and LSE [H, T] within the bounds of docs/numerics.md."""
    out, lse = (np.asarray(x).astype(np.float64) for x in got)
    exact, exact_lse = want
    assert out.shape == exact.shape and lse.shape == exact_lse.shape
    assert np.array_equal(np.isnan(lse), np.isnan(exact_lse)), "NaN at other places"
    infinite = np.isinf(lse) | np.isinf(exact_lse)
    assert np.array_equal(lse[infinite], exact_lse[infinite]), "infinities at other places"
    finite = np.isfinite(exact_lse)
    error = np.abs(lse[finite] - exact_lse[finite])
    bound = 5e-6 + 1e-6 * np.abs(exact_lse[finite])
    assert (error <= bound).all(), f"LSE off by {error.max():.2e}"
    assert_outputs_close(out, exact)


def assert_outputs_close(got, want) -> None:
    """Outputs [T, H, 512]; those of a query without a key are 0."""
    out, exact = np.asarray(got).astype(np.float64), want
    assert np.array_equal(np.isnan(out), np.isnan(exact)), "NaN at other places"
    assert not np.isinf(out).any(), "an output is infinite"
    rows = ~np.isnan(exact).any(axis=-1)
    a, b = out[rows], exact[rows]
    if not b.any():
        assert not a.any(), "outputs that are not 0"
        return
    error = np.abs(a - b)
    far = np.abs(b).max() * np.array([1e-3, 2**-8])
    wrong = error > 2 / 128 * np.abs(b)
    # Weights of 8 bits: a sum of few of them may be off by more than a sum of many.
    beyond = (wrong & (error > far[0])).sum()
    assert beyond <= max(2, 1e-3 * wrong.size), "more than one channel of 1000 is off"
    assert not (wrong & (error > far[1])).any(), f"a channel is off by {error.max():.2e}"
    size = np.linalg.norm(b, axis=-1)
    assert not a[size == 0].any(), "outputs of a query without a key that are not 0"
    rms = np.linalg.norm(a - b, axis=-1)[size > 0] / size[size > 0]
    assert (rms <= 1e-2).all(), f"a row's relative RMS is {rms.max():.2e}"
    # Values may cancel in a row or two, but not in all rows of a head or a token.
    assert (rms > 5e-3).sum() <= max(2, 0.01 * rms.size), "relative RMS of too many rows"
    whole = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert whole <= 2.5e-3, f"relative RMS {whole:.2e}"
    cosine = 1 - 2 * (a * b).sum() / ((a * a).sum() + (b * b).sum())
    assert cosine <= 5e-6, f"cosine distance {cosine:.2e}"

"""flash-attn's functions where sequences have fewer keys than queries, and what they refuse."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fastattn.compat import _flash_attn_steps
from fastattn.compat.flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from tests.support.shims import Sequence, check, gather, page_tables, poison, values, visible_keys
from tests.support.tensors import BF16, int32, skip_slices_on, to_numpy, to_paddle

H, KV, D = 4, 2, 64
MASKS = [
    {"causal": True},
    {},
    {"causal": True, "window_size": (2, -1)},
    {"window_size": (2, 1)},
    {"window_size": (-1, 0)},
]


@pytest.fixture(params=["host", "device"])
def where(request, monkeypatch):
    """Whether the host knows the lengths; on a device nobody reads them."""
    if request.param == "device":
        monkeypatch.setattr(_flash_attn_steps, "on_host", lambda tensor: None)
    return request.param


class Caches:
    """Paged caches whose slots behind a sequence's last key hold NaN."""

    def __init__(self, lengths, fresh, seed=0):
        rng = np.random.default_rng(seed)
        self.lengths = np.array(lengths, np.int32)
        self.tables, pages = page_tables(rng, self.lengths + fresh, 64)
        self.held = [values(rng, (pages, 64, KV, D), mean=0.5) for _ in "kv"]
        poison(self.held, self.tables, self.lengths)

    def write(self, new):
        """Add the new tokens [B, M, KV, D] of K and V, and return the number of keys."""
        for b, length in enumerate(self.lengths):
            for cache, fresh in zip(self.held, new):
                for i, token in enumerate(fresh[b]):
                    at = length + i
                    cache[self.tables[b, at // 64], at % 64] = token
        return self.lengths + new[0].shape[1]

    def sequences(self, q, keys, masks):
        """What q [B, N, H, D] attends to."""
        return [
            Sequence(
                q[b].astype(np.float64),
                *(gather(x, self.tables[b], n).astype(np.float64) for x in self.held),
                visible_keys(len(q[b]), n, **options(masks)),
            )
            for b, n in enumerate(keys)
        ]


def options(masks):
    return {"causal": masks.get("causal", False), "window": masks.get("window_size", (-1, -1))}


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize(("queries", "fresh"), [(1, 0), (4, 0), (4, 2), (3, 3), (1, 2)])
@pytest.mark.parametrize("more", [{}, {"s_aux": True, "out": True}], ids=str)
def test_kvcache_with_few_keys(place, where, masks, queries, fresh, more):
    skip_slices_on(place)
    caches = Caches([0, 1, 2, 3, 70, 63], fresh)
    batch = len(caches.lengths)
    rng = np.random.default_rng(1)
    q = values(rng, (batch, queries, H, D))
    new = [values(rng, (batch, fresh, KV, D)) for _ in "kv"]
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32) if more else None
    out = to_paddle(np.full(q.shape, 7, BF16), place) if more else None
    result, lse = flash_attn_with_kvcache(
        to_paddle(q, place),
        *(to_paddle(x, place) for x in caches.held),
        *(to_paddle(x, place) if fresh else None for x in new),
        cache_seqlens=int32(caches.lengths, place),
        block_table=int32(caches.tables, place),
        s_aux=None if sinks is None else to_paddle(sinks, place),
        out=out,
        return_softmax_lse=True,
        **masks,
    )
    keys = caches.write(new)
    natural = to_numpy(lse).transpose(1, 0, 2).reshape(H, batch * queries)
    rows = to_numpy(result).reshape(batch * queries, H, D)
    seqs = caches.sequences(q, keys, masks)
    check(seqs, rows, natural, place, sinks=sinks)
    blind = ~np.concatenate([s.visible.any(axis=1) for s in seqs])
    assert not rows[blind].astype(np.float32).any()
    if sinks is None:
        assert np.isneginf(natural[:, blind]).all()


@pytest.mark.parametrize("masks", MASKS, ids=str)
def test_an_int_of_all_sequences(place, masks):
    caches = Caches([2, 2], 0)
    q = values(np.random.default_rng(2), (2, 5, H, D))
    out = flash_attn_with_kvcache(
        *(to_paddle(x, place) for x in (q, *caches.held)),
        cache_seqlens=2,
        block_table=int32(caches.tables, place),
        **masks,
    )
    check(caches.sequences(q, [2, 2], masks), to_numpy(out).reshape(10, H, D), None, place)


def test_more_queries_than_the_cache_has_room_for(place):
    """A block table of one column, and queries that would be in the second block."""
    caches = Caches([60], 0)
    q = values(np.random.default_rng(3), (1, 100, H, D))
    out = flash_attn_with_kvcache(
        *(to_paddle(x, place) for x in (q, *caches.held)),
        cache_seqlens=60,
        block_table=int32(caches.tables[:, :1], place),
        causal=True,
    )
    seqs = caches.sequences(q, [60], {"causal": True})
    check(seqs, to_numpy(out).reshape(100, H, D), None, place)


@pytest.mark.parametrize("masks", MASKS, ids=str)
@pytest.mark.parametrize("used", [False, True])
def test_varlen_with_few_keys(place, where, masks, used):
    """One sequence without queries, and two tokens of padding."""
    skip_slices_on(place)
    few_keys(place, masks, used, decoder=False)
    if where == "host" and place == "cpu":  # elsewhere the caller's word is taken
        few_keys(place, masks, used, decoder=True)


def few_keys(place, masks, used, decoder):
    queries, keys = [4, 1, 0, 7, 3, 1], [2, 0, 5, 0, 80, 66]
    taken = [2, 1, 0, 5, 3, 0] if used else queries
    caches = Caches(keys, 0, seed=4)
    starts = np.concatenate([[0], np.cumsum(queries)])
    rng = np.random.default_rng(5)
    q = values(rng, (starts[-1] + 2, H, D))
    out = to_paddle(np.zeros(q.shape, BF16), place)
    result, lse = flash_attn_varlen_func(
        *(to_paddle(x, place) for x in (q, *caches.held)),
        int32(starts, place),
        None,
        7,
        80,
        block_table=int32(caches.tables, place),
        seqused_q=int32(taken, place) if used else None,
        seqused_k=int32(keys, place),
        seq_lens_decoder=int32(np.subtract(keys, taken), place) if decoder else None,
        out=out,
        return_softmax_lse=True,
        **masks,
    )
    rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, taken)])
    seqs = [
        caches.sequences([q[s : s + n]] * (b + 1), keys[: b + 1], masks)[b]
        for b, (s, n) in enumerate(zip(starts, taken))
        if n
    ]
    check(seqs, to_numpy(result)[rows], to_numpy(lse)[:, rows], place)
    assert result.data_ptr() == out.data_ptr()
    left = np.delete(to_numpy(result).astype(np.float32), rows, axis=0)
    assert not left.any()


@pytest.mark.parametrize("more", [{}, {"out": True}, {"s_aux": True}], ids=str)
def test_varlen_decode_with_few_keys(place, where, more):
    """At most one query each, also of sequences without keys."""
    skip_slices_on(place)
    queries, keys = [1, 1, 0, 1, 1], [0, 5, 3, 66, 0]
    caches = Caches(keys, 0, seed=7)
    starts = np.concatenate([[0], np.cumsum(queries)])
    q = values(np.random.default_rng(8), (4, H, D))
    sinks = np.array([0.5, -1.0, 2.0, 0.0], np.float32) if "s_aux" in more else None
    result, lse = flash_attn_varlen_func(
        *(to_paddle(x, place) for x in (q, *caches.held)),
        int32(starts, place),
        None,
        1,
        66,
        block_table=int32(caches.tables, place),
        seqused_k=int32(keys, place),
        causal=True,
        window_size=(3, -1),
        out=to_paddle(np.full(q.shape, 7, BF16), place) if "out" in more else None,
        s_aux=None if sinks is None else to_paddle(sinks, place),
        return_softmax_lse=True,
    )
    masks = {"causal": True, "window_size": (3, -1)}
    seqs = [
        caches.sequences([q[s : s + 1]] * 5, keys, masks)[b]
        for b, (s, n) in enumerate(zip(starts, queries))
        if n
    ]
    check(seqs, to_numpy(result), to_numpy(lse), place, sinks=sinks)


def kvcache(**changes):
    """A call of one new token for each of two sequences, and the caches before and after."""
    rng = np.random.default_rng(6)
    held = [values(rng, (2, 64, KV, D)) for _ in "kv"]
    caches = [to_paddle(x) for x in held]
    x = to_paddle(values(rng, (2, 1, H, D)))
    fresh = to_paddle(values(rng, (2, 1, KV, D)))
    arguments = {"q": x, "k": fresh, "v": fresh, "cache_seqlens": int32([3, 5]), "causal": True}
    arguments.update({n: v(caches) if callable(v) else v for n, v in changes.items()})
    try:
        flash_attn_with_kvcache(k_cache=caches[0], v_cache=caches[1], **arguments)
    finally:
        same = [to_numpy(a).tobytes() == b.tobytes() for a, b in zip(caches, held)]
        assert all(same) or not any(same)
        kvcache.written = not all(same)


WRONG = {
    "softcap": ({"softcap": -1.0}, ValueError, "softcap: expected a finite number of at least 0"),
    "softcap's type": ({"softcap": "1"}, TypeError, "softcap: expected float"),
    "window": ({"window_size": (-5, 0)}, ValueError, "window_size: expected -1"),
    "window's type": ({"window_size": 5}, TypeError, "window_size: expected"),
    "window of floats": ({"window_size": (1.0, 1)}, TypeError, "window_size: expected two ints"),
    "sinks": ({"s_aux": paddle.zeros([7])}, ValueError, r"sinks: expected shape \[4\]"),
    "sinks' dtype": ({"s_aux": paddle.zeros([H], "float16")}, TypeError, "sinks: expected dtype"),
    "sinks' type": ({"s_aux": [1.0] * H}, TypeError, "s_aux: expected a tensor, got list"),
    "out's dtype": ({"out": paddle.zeros([2, 1, H, D])}, TypeError, "out: expected dtype bfloat16"),
    "out's shape": (
        {"out": paddle.zeros([1, 2, H, D], "bfloat16")},
        ValueError,
        "out: expected shape",
    ),
    "out's type": ({"out": 5}, TypeError, "out: expected a tensor, got int"),
    "out in the cache": (
        {"out": lambda caches: caches[1].reshape([-1])[: 2 * H * D].reshape([2, 1, H, D])},
        ValueError,
        "out: ",
    ),
    "q's dtype": ({"q": paddle.zeros([2, 1, H, D])}, TypeError, "q: expected dtype bfloat16"),
    "q's channels": (
        {"q": paddle.zeros([2, 1, H, 128], "bfloat16")},
        ValueError,
        "expected head_dim 128",
    ),
    "heads": (
        {"q": paddle.zeros([2, 1, 3, D], "bfloat16")},
        ValueError,
        "q: expected a multiple of the 2 KV heads",
    ),
    "scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale: expected a finite"),
    "q_descale": ({"q_descale": paddle.ones([1])}, ValueError, "q_descale: expected None"),
    "k_descale": ({"k_descale": paddle.ones([1])}, ValueError, "k_descale: the cache has 16 bits"),
    "lse": ({"return_softmax_lse": "no"}, TypeError, "return_softmax_lse: expected bool"),
    "a negative length": ({"cache_seqlens": -3}, ValueError, "cache_seqlens: expected at least 0"),
    "a negative length of one": (
        {"cache_seqlens": int32([3, -1])},
        ValueError,
        "cache_seqlens: expected at least 0, got -1",
    ),
    "a full cache": (
        {"cache_seqlens": int32([64, 5])},
        ValueError,
        r"cache_seqlens: expected at most 63 \(the cache has room for 64 keys, 1 of them new\), "
        "got 64",
    ),
    "a full cache's int": ({"cache_seqlens": 64}, ValueError, "expected at most 63"),
    "int64 lengths": (
        {"cache_seqlens": paddle.to_tensor([3, 5])},
        TypeError,
        "cache_seqlens: expected dtype int32, got int64",
    ),
    "too few lengths": (
        {"cache_seqlens": int32([3])},
        ValueError,
        r"cache_seqlens: expected shape \[2\], got \[1\]",
    ),
    "lengths' type": ({"cache_seqlens": 1.5}, TypeError, "expected int or a tensor, got float"),
}


@pytest.mark.parametrize("name", WRONG)
def test_nothing_is_written_by_a_call_that_is_refused(name):
    changes, kind, text = WRONG[name]
    kvcache()  # what is known of a right call is no leave for a wrong one
    assert kvcache.written
    for _ in range(2):
        with pytest.raises(kind, match=text):
            kvcache(**changes)
        assert not kvcache.written


def test_checks_ahead_are_made_once(monkeypatch):
    """The same shapes, addresses and options: one attention over no tokens, then none."""
    _flash_attn_steps._TAKEN.clear()
    made = []

    def attend(*arguments, **options):
        made.append(arguments)

    q = to_paddle(np.zeros((2, H, D), BF16))
    for softcap in (0.0, 0.0, 1.0, 1.0, True):
        _flash_attn_steps.check_ahead(attend, (q,), {"softcap": softcap, "out": None}, 2)
    assert len(made) == 3 and to_numpy(made[0][1]).tolist() == [0, 0]


def test_lengths_beyond_the_room():
    q = to_paddle(np.zeros((1, 1, H, D), BF16))
    caches = [to_paddle(np.zeros((1, 64, KV, D), BF16)) for _ in "kv"]
    for lengths, text in ((1000, "expected at most 64"), (int32([65]), "expected at most 64"),
                          (2**40, "expected at most 64"), (-3, "at least 0, got -3")):  # fmt: skip
        with pytest.raises(ValueError, match=f"cache_seqlens: .*{text}"):
            flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths)
    many = to_paddle(np.zeros((1, 65, KV, D), BF16))
    with pytest.raises(ValueError, match="k: expected at most 64 new keys, got 65"):
        flash_attn_with_kvcache(q, *caches, many, many)

"""Convert the lengths of flash-attn's calls for ``paged_attention``; run checks before a write.

``paged_attention`` counts the keys of a sequence from its queries on, so it has at least as many
keys as queries. flash-attn aligns the ends of both. A query whose position is before the first key
sees no keys with a causal mask, and all keys without one. If a sequence may be that short, the
whole mask is passed as intervals.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from fastattn._foreign import not_a_tensor
from fastattn._ops import is_tensor
from fastattn.compat._paged import capturing, dtype_name, progression
from fastattn.functional.attention import as_window

#: A window with more keys than any sequence has means no window.
_MOST_WINDOW = 2**30


class Lengths(NamedTuple):
    """The lengths and masks of the sequences of a step.

    Attributes
    ----------
    cached, new : Tensor, shape [B]
    masks : dict
        Arguments of ``paged_attention``: `causal`, `window_size` and optionally `mask_offsets`.
    """

    cached: Tensor
    new: Tensor
    masks: dict[str, Any]


def on_host(tensor: Tensor) -> NDArray[np.int32] | None:
    """The tensor's values if the host has them."""
    if paddle.in_dynamic_mode() and tensor.place.is_cpu_place():
        return np.asarray(tensor.numpy())
    return None


def _check_of_each(op: str, name: str, lengths: Tensor, batch: int) -> None:
    if dtype_name(lengths.dtype) != "int32":
        got = dtype_name(lengths.dtype)
        raise TypeError(f"{op}: {name}: expected dtype int32, got {got}")
    if list(lengths.shape) != [batch] and paddle.in_dynamic_mode():
        raise ValueError(f"{op}: {name}: expected shape [{batch}], got {list(lengths.shape)}")


def _check_room(op: str, values: NDArray[Any], fresh: int, room: int) -> None:
    """Refuse negative lengths, and lengths for which the cache has no room."""
    if values.size == 0:
        return
    least, most = int(values.min()), int(values.max())
    if least < 0:
        raise ValueError(f"{op}: cache_seqlens: expected at least 0, got {least}")
    if most + fresh > room:
        why = f"the cache has room for {room} keys"
        why += f", {fresh} of them new" if fresh else ""
        raise ValueError(
            f"{op}: cache_seqlens: expected at most {room - fresh} ({why}), got {most}"
        )


def _intervals(of: Any, position: Any, keys: Any, masks: dict[str, Any]) -> Any:
    """Keys [begin, end) of `keys` that queries at `position` see, shape [T, 2].

    `of` is the module of both arrays, ``numpy`` or ``paddle``.
    """
    left, right = masks["window_size"]
    if masks["causal"]:
        end = position + 1
    elif 0 <= right < _MOST_WINDOW:
        end = of.minimum(position + (right + 1), keys)
    else:
        end = keys + of.zeros_like(position)
    begin = position - left if 0 <= left < _MOST_WINDOW else of.zeros_like(position)
    return of.stack([begin, end], axis=-1).clip(min=0).reshape([-1, 2])


def _masks(op: str, causal: bool, window_size: Any) -> dict[str, Any]:
    """The given masks, which are checked here because intervals would also replace invalid ones."""
    window = as_window(op, window_size)
    if min(window) < -1:
        raise ValueError(
            f"{op}: window_size: expected -1 (unlimited) or at least 0, got {min(window)}"
        )
    return {"causal": causal, "window_size": window}


def _explicit(position: Tensor, keys: Tensor, masks: dict[str, Any]) -> dict[str, Any]:
    return {"causal": False, "mask_offsets": _intervals(paddle, position, keys, masks)}


def lengths_with_kvcache(
    op: str,
    cache_seqlens: int | Tensor | None,
    sizes: tuple[int, int, int, int],
    causal: bool,
    window_size: Any,
    like: Tensor,
) -> tuple[Tensor, Lengths]:
    """Lengths for the attention, and the cached keys of each sequence before the call's new keys.

    Parameters
    ----------
    op : str
    cache_seqlens : int, Tensor or None
    sizes : (int, int, int, int)
        Number of sequences, then for each sequence: queries, new keys, and room of its cache in
        keys.
    causal, window_size
    like : Tensor
        Tells the place of the results.
    """
    batch, queries, fresh, room = sizes
    masks = _masks(op, causal, window_size)
    values: NDArray[Any] | None
    if cache_seqlens is None:
        if fresh > room:
            raise ValueError(f"{op}: k: expected at most {room} new keys, got {fresh}")
        cache_seqlens = room - fresh
    if is_tensor(cache_seqlens):
        before: Tensor = cache_seqlens  # type: ignore[assignment]
        _check_of_each(op, "cache_seqlens", before, batch)
        values = on_host(before)
    elif type(cache_seqlens) is int:
        values = np.array([cache_seqlens])
        _check_room(op, values, fresh, room)  # before the value has to fit a tensor
        before = progression(cache_seqlens, 0, batch, "int32", like)
    else:
        raise not_a_tensor(op, "cache_seqlens", cache_seqlens, "int or a tensor")
    if values is not None:
        _check_room(op, values, fresh, room)
    if type(cache_seqlens) is int:
        cached = progression(cache_seqlens + fresh - queries, 0, batch, "int32", like)
    else:
        cached = before + (fresh - queries) if fresh != queries else before
    new = progression(queries, 0, batch, "int32", like)
    enough = fresh >= queries or batch == 0
    if enough or (values is not None and int(values.min()) + fresh >= queries):
        return before, Lengths(cached, new, masks)
    if queries == 1:  # fresh is 0
        whole = paddle.stack([progression(0, 0, batch, "int32", like), before], axis=-1)
        return before, Lengths(cached, new, {**masks, "mask_offsets": whole})
    if type(cache_seqlens) is int and not capturing():
        # The host has all lengths, so no Paddle kernel runs. A graph does not keep a copy from the
        # host.
        ends = np.full((batch, 1), cache_seqlens + fresh, np.int32)
        position = ends - np.arange(queries, 0, -1)
        offsets = _intervals(np, position, ends, masks).astype(np.int32)
        mask = paddle.to_tensor(offsets, place=like.place)
        return before, Lengths(cached, new, {"causal": False, "mask_offsets": mask})
    keys = (before + fresh if fresh else before).unsqueeze(-1)
    position = keys - progression(queries, -1, queries, "int32", like)
    return before, Lengths(cached, new, _explicit(position, keys, masks))


def lengths_of_varlen(
    op: str,
    starts: Tensor,
    tokens: int,
    cu_seqlens_k: Tensor | None,
    seqused: tuple[Tensor | None, Tensor | None],
    seq_lens_decoder: Tensor | None,
    causal: bool,
    window_size: Any,
    single: bool = False,
) -> Lengths:
    """Lengths of ragged sequences. `starts` is cu_seqlens_q.

    `single` says that no sequence has more than one query, and that a sequence without keys may be
    left out.
    """
    masks = _masks(op, causal, window_size)
    used, keys = seqused
    batch = int(starts.shape[0]) - 1
    if keys is None:
        if cu_seqlens_k is None:
            raise ValueError(f"{op}: seqused_k: required with block_table (or cu_seqlens_k)")
        keys = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
    elif cu_seqlens_k is not None:
        raise ValueError(f"{op}: cu_seqlens_k: given together with seqused_k")
    given = {"seqused_q": used, "seqused_k": keys, "seq_lens_decoder": seq_lens_decoder}
    for name, lengths in given.items():
        if lengths is None:
            continue
        if not is_tensor(lengths):
            raise not_a_tensor(op, name, lengths)
        if name != "seq_lens_decoder":  # the tensor may have all slots
            _check_of_each(op, name, lengths, batch)
    if seq_lens_decoder is not None and on_host(seq_lens_decoder) is None:
        # The caller states that each sequence has at least as many keys as queries. The operator
        # takes the minimum of the new tokens and the range of cu_seqlens_q.
        return Lengths(seq_lens_decoder, keys if used is None else used, masks)
    queries = starts[1:] - starts[:-1]
    if used is not None:
        queries = paddle.minimum(queries, used)
    cached = keys - queries
    host = on_host(cached)
    if batch == 0 or tokens == 0 or (host is not None and bool((host >= 0).all())):
        cached = cached if seq_lens_decoder is None else seq_lens_decoder
        return Lengths(cached, queries if used is None else used, masks)
    if single and used is None:
        return Lengths(cached, keys, masks)  # the operator takes the minimum of keys and queries
    order = progression(0, 1, tokens, "int32", starts)
    rows = paddle.searchsorted(starts[1:], order, out_int32=True, right=True)
    rows = rows.clip(max=batch - 1)  # padding belongs to no sequence
    position = (cached - starts[:-1]).gather(rows) + order
    return Lengths(cached, queries, _explicit(position, keys.gather(rows), masks))


#: Descriptions of calls that passed the attention's checks.
_TAKEN: set[tuple[Any, ...]] = set()
_MOST_TAKEN = 4096


def _facts(value: Any, aligned: bool) -> Any:
    """What an operator's checks see of an argument; `aligned`: only the alignment of addresses."""
    if not is_tensor(value):
        return type(value), value
    address = value.data_ptr()
    return (
        address % 64 if aligned else address,
        value.dtype,
        tuple(value.shape),
        tuple(value.strides),
        value.stop_gradient,
    )


def check_ahead(
    attend: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], batch: int
) -> None:
    """Raise the errors of ``attend(*arguments, ..., **options)`` before anything is written.

    An attention over sequences without queries makes all checks and writes nothing into `out`.
    Calls that a check cannot distinguish are checked once.

    Parameters
    ----------
    attend : callable
        ``paged_attention``.
    arguments : tuple
        Its positional arguments: q, key_cache, value_cache, block_tables, cu_seqlens_q.
    options : dict
    batch : int
        Number of sequences.
    """
    free = options.get("out") is None  # a given `out` must not share memory
    # The writer checks the places of q and the caches. The address of an option tells its place.
    facts = (
        *(_facts(x, aligned=free) for x in arguments),
        *(_facts(x, aligned=False) for x in options.values()),
    )
    try:
        known = facts in _TAKEN
    except TypeError:  # an argument that cannot be hashed has a wrong type
        known = False
    if known:
        return
    q = arguments[0]
    none = progression(0, 0, batch, "int32", q)
    attend(*arguments, none, none, int(q.shape[0]), 1, **options)
    if len(_TAKEN) >= _MOST_TAKEN:
        _TAKEN.clear()
    _TAKEN.add(facts)

"""Rules for the block tables, lengths, slots and scales of each operator, for ``FASTATTN_CHECK``.

A rule reads an operator's arguments and raises ValueError for contents that the operator would
silently clamp or leave out. Documented padding is allowed: negative slots and indices, tokens of no
sequence, and table entries that no token needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastattn._check_args import (
    Arguments,
    Array,
    Malformed,
    Positions,
    Sequences,
    page_tokens,
    sequences,
)
from fastattn._check_scales import check_dynamic, check_static
from fastattn._table_checks import check_needed, check_writers

_BLOCK = 64
_HINT = "FASTATTN_CHECK=partial permits -1"


def check(
    sig: Any, inputs: tuple[Any, ...], attrs: tuple[Any, ...], *, partial: bool, clipped: bool
) -> None:
    """Refuse wrong contents. Arguments that the operator itself refuses are left to it.

    Parameters
    ----------
    sig, inputs, attrs, partial, clipped
        As for :class:`fastattn._check_args.Arguments`.
    """
    try:
        args = Arguments(sig, inputs, attrs, partial, clipped)
        check_static(args)
        rule = _RULES.get(sig.name)
        if rule is not None:
            rule(args)
    except Malformed:
        pass


def _needed(
    args: Arguments,
    tables: Array,
    begin: Positions,
    end: Positions,
    block_size: int,
    num_blocks: int | None,
    seqs: Positions | None = None,
) -> None:
    check_needed(
        f"{args.op}: block_tables",
        tables,
        begin,
        np.minimum(end, tables.shape[1] * block_size) if args.clipped else end,
        block_size=block_size,
        num_blocks=num_blocks,
        partial=args.partial,
        hint=_HINT,
        seqs=seqs,
    )


def _within(
    args: Arguments, name: str, values: Array, least: int | None, most: int, what: str
) -> None:
    """Refuse values outside [least, most]. The message gives the place of the first in `what`."""
    wrong = values > most
    if least is not None:
        wrong |= values < least
    if wrong.any():
        at = np.unravel_index(int(np.argmax(wrong)), values.shape)
        place = ", ".join(f"{word} {i}" for word, i in zip(what.split(), at))
        limits = f"at most {most}" if least is None else f"{least} to {most}"
        args.refuse(name, f"{limits} of {place}", values[at])


def _seen(args: Arguments, seqs: Sequences) -> tuple[Positions, Positions]:
    """Positions [begin, end) of the keys that a sequence's queries see, at most."""
    left = args.number("window_left")
    begin = np.maximum(seqs.cached - left, 0) if left >= 0 else np.zeros_like(seqs.cached)
    end = seqs.end.copy()
    if args.has("mask_offsets"):
        masks = args.ints("mask_offsets").reshape(-1, 2).astype(np.int64)
        for seq in np.flatnonzero(seqs.new):
            mine = masks[seqs.own(int(seq))]
            mine = mine[mine[:, 0] < mine[:, 1]]
            begin[seq] = max(begin[seq], mine[:, 0].min(initial=2**31))
            end[seq] = min(end[seq], mine[:, 1].max(initial=0))
    return begin, end


def _paged_attention(args: Arguments) -> None:
    seqs = sequences(args, args.shape("q", 3)[0], head_tables=True)
    _check_read(args, seqs, None)


def _sparse_paged_attention(args: Arguments) -> None:
    seqs = sequences(args, args.shape("q", 3)[0])
    selected, size = args.ints("selected", 3).astype(np.int64), args.number("granularity")
    queries, groups, width = selected.shape
    if size < 1 or queries != args.shape("q", 3)[0]:
        raise Malformed
    counts = np.full((queries, groups), width)
    if args.has("selected_lens"):
        counts = args.ints("selected_lens", 2)
        if counts.shape != (queries, groups):
            raise Malformed
    for seq in np.flatnonzero(seqs.new).tolist():
        own = seqs.own(seq)
        _within(args, "selected_lens", counts[own], 0, width, "query group")
        lists = np.where(np.arange(width) < counts[own][..., None], selected[own], -1)
        ordered = np.sort(lists, axis=-1)
        twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
        if twice.any():
            query, group, at = (int(i) for i in np.argwhere(twice)[0])
            text = f"distinct entries for query {own.start + query}, group {group}"
            args.refuse("selected", text, f"{ordered[query, group, at]} twice")
        limits = (seqs.cached[seq] + 1 + np.arange(seqs.new[seq]))[:, None]
        listed = lists.reshape(len(lists), -1)
        begin = np.where(listed < 0, limits, np.minimum(listed * size, limits))
        first = np.zeros_like(limits), np.maximum(limits - args.number("window"), 0)
        begin = np.concatenate([begin, *first], 1)
        end = np.minimum(begin + size, limits)
        end[:, -2] = np.minimum(args.number("sink_tokens"), limits[:, 0])
        end[:, -1] = limits[:, 0]
        begin, end = begin.reshape(-1), end.reshape(-1)
        rows = np.full(len(begin), seq)
        tables = np.broadcast_to(seqs.tables[seq], (len(begin), seqs.tables.shape[1]))
        _needed(args, tables, begin, end, _BLOCK, args.shape("key_cache", 4)[0], rows)
        seen = np.zeros(int(seqs.end[seq]) + 1, np.int64)  # +1 and -1 at begins and ends
        np.add.at(seen, begin[begin < end], 1)
        np.add.at(seen, end[begin < end], -1)
        _check_seen_scales(args, seqs.tables, seq, np.cumsum(seen)[:-1] > 0)


def _check_seen_scales(args: Arguments, tables: Array, seq: int, seen: Array) -> None:
    """Check the dynamic scales of the keys of a sequence that some query sees, span by span."""
    edges = np.diff(np.concatenate([[0], seen.astype(np.int64), [0]]))
    first, last = (np.zeros(len(tables), np.int64) for _ in range(2))
    for begin, end in zip(np.flatnonzero(edges > 0), np.flatnonzero(edges < 0)):
        first[seq], last[seq] = begin, end
        check_dynamic(args, tables, first, last, _BLOCK)


def _attention_step(args: Arguments) -> None:
    _write(args)
    seqs = sequences(args, args.shape("qkv", 2)[0], head_tables=True)
    # The step itself writes the scales of its new tokens.
    _check_read(args, seqs, seqs.cached)


def _check_read(args: Arguments, seqs: Sequences, written: Positions | None) -> None:
    """Check the blocks that the queries see, and their scales up to the position `written`."""
    begin, end = _seen(args, seqs)
    last = end if written is None else np.minimum(end, written)
    blocks, kv_heads = args.shape("key_cache", 4)[:2]
    if seqs.tables.ndim == 2 and not args.has("head_windows"):
        _needed(args, seqs.tables, begin, end, _BLOCK, blocks)
        check_dynamic(args, seqs.tables, begin, last, _BLOCK)
        return
    pooled = seqs.tables.ndim == 3 and kv_heads == 1
    if pooled:
        kv_heads = seqs.tables.shape[1]
    if seqs.tables.ndim == 3 and seqs.tables.shape[1] != kv_heads:
        raise Malformed
    windows = np.tile([-1, 0], (kv_heads, 1))
    if args.has("head_windows"):
        windows = args.ints("head_windows", 2).astype(np.int64)
        if windows.shape != (kv_heads, 2):
            raise Malformed
    for head, (before, first) in enumerate(windows.tolist()):
        tables = seqs.table_of(head)
        own = np.maximum(seqs.cached - before, 0) if before >= 0 else np.zeros_like(begin)
        for start, stop in ((begin, np.minimum(end, first)), (np.maximum(begin, own), end)):
            _needed(args, tables, start, stop, _BLOCK, blocks)
            known = np.minimum(stop, last)
            check_dynamic(args, tables, start, known, _BLOCK, 0 if pooled else head)


def _mla_attention(args: Arguments) -> None:
    seqs = sequences(args, args.shape("q", 3)[0])
    size, pages = page_tokens(args), args.shape("cache")[0]
    _needed(args, seqs.tables, np.zeros_like(seqs.end), seqs.end, size, pages)


def _write_into_pool(args: Arguments, seqs: Sequences, blocks: int) -> None:
    """Check the tables of KV heads that share a pool of blocks: heads are like sequences."""
    count = seqs.tables.shape[1]
    tables = seqs.tables.reshape(-1, seqs.tables.shape[2])
    begin, end = np.repeat(seqs.cached, count), np.repeat(seqs.end, count)
    _needed(args, tables, begin, end, _BLOCK, blocks, np.repeat(np.arange(len(seqs.cached)), count))
    where = f"{args.op}: block_tables, by sequence and KV head"
    check_writers(where, tables, begin, end, _BLOCK)


def _update_summaries(args: Arguments) -> None:
    seqs = sequences(args, 2**31 - 1)  # no tensor tells the number of tokens
    size = min(max(args.number("granularity"), 1), _BLOCK)
    begin = np.where(seqs.new > 0, seqs.cached // size * size, seqs.end)
    _needed(args, seqs.tables, begin, seqs.end, _BLOCK, args.shape("key_cache", 4)[0])
    check_dynamic(args, seqs.tables, begin, seqs.end, _BLOCK)


def _select_blocks(args: Arguments) -> None:
    seqs = sequences(args, args.shape("q", 3)[0])
    begin = np.where(seqs.new > 0, 0, seqs.end)
    _needed(args, seqs.tables, begin, seqs.end, _BLOCK, args.shape("summaries", 5)[0])


def _write(args: Arguments) -> None:
    tokens = args.shape("qkv" if args.has("qkv") else "key", 2)[0]
    seqs = sequences(args, tokens, head_tables=True)
    where = f"{args.op}: block_tables"
    blocks, kv_heads = args.shape("key_cache", 4)[:2]
    if seqs.tables.ndim == 3 and kv_heads == 1:
        _write_into_pool(args, seqs, blocks)
    else:
        for head in range(seqs.tables.shape[1] if seqs.tables.ndim == 3 else 1):
            tables = seqs.table_of(head)
            _needed(args, tables, seqs.cached, seqs.end, _BLOCK, blocks)
            check_writers(where, tables, seqs.cached, seqs.end, _BLOCK)
    if args.has("batch_id_per_token"):
        ids = args.ints("batch_id_per_token")
        for seq in np.flatnonzero(seqs.new).tolist():
            mine = ids[seqs.own(int(seq))]
            wrong = (mine != seq) & (mine >= 0) & (mine < len(seqs.new))
            if wrong.any():
                token = int(seqs.starts[seq]) + int(np.argmax(wrong))
                args.refuse("batch_id_per_token", f"{seq} or -1 at token {token}", ids[token])
    if args.has("rotary_embs"):
        shape = args.shape("rotary_embs", 3)
        rows = shape[-2 if len(shape) < 5 else -3]
        if (seqs.end > rows).any():
            late = int(np.argmax(seqs.end > rows))
            text = f"at most {rows} tokens of a sequence, the rows of rotary_embs"
            got = f"{seqs.cached[late]} and {seqs.new[late]} new ones of sequence {late}"
            args.refuse("seq_lens_decoder", text, got)


def _compact(args: Arguments) -> None:
    seqs = sequences(args, args.number("num_tokens"))
    blocks, size = args.number("num_blocks"), args.number("block_size")
    args.partial = True  # it is for tables that omit blocks
    if size > 0:
        _needed(args, seqs.tables, np.zeros_like(seqs.end), seqs.end, size, blocks)


def _gather(args: Arguments, size: int, pages: int, rows: int, lengths: Array | None) -> Array:
    """Refuse wrong tables of sequences that are gathered to rows, starting at `cu_seqlens_k`.

    Returns
    -------
    array of int64, shape [B]
        Number of tokens of each sequence.
    """
    starts = args.ints("cu_seqlens_k").astype(np.int64)
    tables = args.ints("block_tables", 2)
    count = len(starts) - 1
    if count < 0 or len(tables) < count or (lengths is not None and len(lengths) < count):
        raise Malformed
    _ascending(args, "cu_seqlens_k", starts, None if lengths is None else rows)
    room = np.diff(starts)
    if lengths is None:
        room = np.clip(rows - starts[:-1], 0, room)
    else:
        lengths = lengths[:count].astype(np.int64)
        if (lengths < 0).any():
            seq = int(np.argmax(lengths < 0))
            args.refuse("seq_lens_decoder", f"at least 0 for sequence {seq}", lengths[seq])
        room = np.minimum(room, lengths)
    _needed(args, tables[:count], np.zeros_like(room), room, size, pages)
    return room


def _ascending(args: Arguments, name: str, starts: Array, rows: int | None) -> None:
    """Refuse starts that do not ascend from 0, or that end past the last row (with `rows`)."""
    wrong = np.diff(starts, prepend=0) < 0
    if wrong.any():
        at = int(np.argmax(wrong))
        least = 0 if at == 0 else starts[at - 1]
        args.refuse(name, f"at least {least} at entry {at}", starts[at])
    if rows is not None and len(starts) and starts[-1] > rows:
        args.refuse(name, f"at most {rows} at entry {len(starts) - 1}", starts[-1])


def _append_cache(args: Arguments) -> None:
    blocks, rows = args.shape("key_cache", 4)[0], args.shape("key")[0]
    end = _gather(args, _BLOCK, blocks, rows, args.ints("seq_lens_decoder"))
    tables = args.ints("block_tables", 2)[: len(end)]
    check_dynamic(args, tables, np.zeros_like(end), end, _BLOCK)


def _mla_gather(args: Arguments) -> None:
    pages, rows = args.shape("cache")[0], args.shape("out")[0]
    _gather(args, page_tokens(args), pages, rows, args.ints("seq_lens_decoder"))


def _k_gather(args: Arguments) -> None:
    pages, size = args.shape("cache")[0], args.number("page_size")
    if size > 0:
        _gather(args, size, pages, args.number("num_tokens"), None)


def _context(args: Arguments) -> None:
    """Check a paged cache of index keys that rows of queries score."""
    lengths, tables = args.ints("context_lens").astype(np.int64), args.ints("block_tables", 2)
    batch, size = args.shape("q", 4)[0], args.number("page_size")
    if size < 1 or len(tables) < batch or not batch or len(lengths) % batch:
        raise Malformed
    lengths = lengths.reshape(batch, -1)
    _within(args, "context_lens", lengths, None, args.number("max_context_len"), "row query")
    end = lengths.max(axis=1, initial=0)
    pages = args.shape("cache")[0]
    _needed(args, tables[:batch], np.zeros_like(end), end, size, pages)


def _token_maps(args: Arguments) -> None:
    count, size = args.number("num_tokens"), args.number("block_size")
    ids = args.ints("batch_ids")[:count].astype(np.int64)
    tables = args.ints("block_tables", 2)
    starts = args.ints("cu_seqlens_q").astype(np.int64)
    cached = args.ints("seq_lens_decoder").astype(np.int64)
    seqs = len(starts) - 1
    if size < 1 or seqs < 0 or len(tables) < seqs or len(cached) < seqs:
        raise Malformed
    tokens = np.arange(len(ids))
    real = (ids >= 0) & (ids < seqs)
    ids = np.where(real, ids, 0)
    if seqs:
        real &= (tokens >= starts[ids]) & (tokens < starts[ids + 1])
    tokens, ids = tokens[real], ids[real]
    positions = cached[ids] + tokens - starts[ids]
    if args.has("position_ids"):
        positions = args.ints("position_ids")[tokens].astype(np.int64)
    blocks = args.number("num_blocks")
    end = np.maximum(positions + 1, 0)
    begin = np.maximum(positions, 0)
    _needed(args, tables[ids], begin, end, size, None if blocks < 0 else blocks, ids)


def _slots(args: Arguments, name: str, cache: str, size: int, tokens: Array | None = None) -> None:
    """Refuse slots past the end of a cache, and slots that two tokens write to.

    Parameters
    ----------
    tokens : array of bool, optional
        Which tokens are written. Default: all with a slot.
    """
    slots = args.ints(name).astype(np.int64)
    if tokens is not None:
        slots = np.where(tokens, slots, -1)
    limit = args.shape(cache)[0] * size
    if (slots >= limit).any():
        token = int(np.argmax(slots >= limit))
        args.refuse(name, f"a slot below {limit} for token {token}", slots[token])
    order = np.argsort(slots, kind="stable")
    ordered = slots[order]
    twice = (ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)
    if twice.any():
        at = int(np.argmax(twice))
        got = f"{ordered[at]} for tokens {order[at]} and {order[at + 1]}"
        args.refuse(name, "a slot of its own for every token", got)


def _positions(args: Arguments) -> None:
    """Refuse positions past the rows of sines and cosines. Negative positions are padding."""
    rows = args.shape("cos_sin_cache", 2)[0]
    _within(args, "positions", args.ints("positions"), None, rows - 1, "token")


def _mla_write(args: Arguments) -> None:
    _slots(args, "slot_mapping", "cache", page_tokens(args))


def _mla_layer(args: Arguments) -> None:
    _mla_write(args)
    _positions(args)


def _k_write(args: Arguments) -> None:
    _slots(args, "slot_mapping", "cache", args.number("page_size"))


def _partial_states(args: Arguments) -> None:
    _slots(args, "state_slots", "state_cache", args.shape("state_cache", 3)[1])


def _compress(args: Arguments) -> None:
    _positions(args)
    positions = args.ints("positions").astype(np.int64)
    ids = args.ints("batch_id_per_token").astype(np.int64)
    states, slots = args.ints("state_slots"), args.ints("kv_slots")
    tables, ratio = args.ints("block_tables", 2), args.number("compress_ratio")
    blocks, size = args.shape("state_cache", 3)[:2]
    if size < 1 or ratio < 1 or len({len(x) for x in (positions, ids, states, slots)}) > 1:
        raise Malformed
    # Only the last token of a group writes a key. It reads the states of its group and, for ratio
    # 4, also the states of the previous group.
    whole = (positions >= 0) & ((positions + 1) % ratio == 0) & (states >= 0) & (slots >= 0)
    whole &= (ids >= 0) & (ids < len(tables))
    _slots(args, "kv_slots", "kv_cache", args.number("page_size"), whole)
    end, ids = positions[whole] + 1, ids[whole]
    begin = np.maximum(end - ratio * (2 if ratio == 4 else 1), 0)
    _needed(args, tables[ids], begin, end, size, blocks, ids)


def _sparse(args: Arguments) -> None:
    for extra in ("", "extra_"):
        if not args.has(f"{extra}cache") or not args.has(f"{extra}indices"):
            continue
        indices = args.ints(f"{extra}indices", 2)
        counts = np.full(len(indices), indices.shape[1])
        if args.has(f"{extra}topk_length"):
            counts = args.ints(f"{extra}topk_length")
            if len(counts) != len(indices):
                raise Malformed
            _within(args, f"{extra}topk_length", counts, 0, indices.shape[1], "query")
        limit = args.shape(f"{extra}cache")[0] * page_tokens(
            args, f"{extra}cache", f"{extra}page_size"
        )
        wrong = indices >= limit
        wrong &= np.arange(indices.shape[1]) < counts[:, None]
        if wrong.any():
            query, column = (int(i) for i in np.argwhere(wrong)[0])
            text = f"a slot below {limit} for query {query}"
            got = f"{indices[query, column]} at entry {column}"
            args.refuse(f"{extra}indices", text, got)


def _topk_to_slots(args: Arguments) -> None:
    indices, tables = args.ints("indices", 2).astype(np.int64), args.ints("block_tables", 2)
    size, blocks = args.number("block_size"), args.number("num_blocks")
    if size < 1 or args.number("world_size") != 1:  # ranks own tokens, not blocks
        raise Malformed
    if args.has("row_ids"):
        rows = args.ints("row_ids").astype(np.int64)
        there = (rows >= 0) & (rows < len(indices))
        indices = np.where(there[:, None], indices[np.where(there, rows, 0)], -1)
    count = len(indices)
    ids = args.ints("batch_ids").astype(np.int64) if args.has("batch_ids") else np.arange(count)
    if len(ids) != count:
        raise Malformed
    real = (indices >= 0) & ((ids >= 0) & (ids < len(tables)))[:, None]
    row, column = np.nonzero(real)
    position, seq = indices[row, column], ids[row]
    limit = None if blocks < 0 else blocks
    _needed(args, tables[seq], position, position + 1, size, limit, seq)


def _window(args: Arguments) -> None:
    if not args.has("block_tables"):
        return
    tables, positions = args.ints("block_tables", 2), args.ints("positions").astype(np.int64)
    count, size, blocks = len(positions), args.number("block_size"), args.number("num_blocks")
    ids = args.ints("batch_ids").astype(np.int64) if args.has("batch_ids") else np.arange(count)
    if size < 1 or len(ids) != count:
        raise Malformed
    real = (positions >= 0) & (positions < 2**31) & (ids >= 0) & (ids < len(tables))
    end, ids = positions[real] + 1, ids[real]
    begin = np.maximum(end - args.number("window"), 0)
    _needed(args, tables[ids], begin, end, size, None if blocks < 0 else blocks, ids)


def _topk_indices(args: Arguments) -> None:
    rows, columns = args.shape("logits", 2)
    lengths = args.ints("lengths").astype(np.int64)
    _within(args, "lengths", lengths, 0, columns, "row")
    if args.has("starts"):
        starts = args.ints("starts").astype(np.int64)
        if len(starts) != rows or len(lengths) != rows:
            raise Malformed
        _within(args, "starts", starts, 0, columns, "row")
        _within(args, "lengths", starts + lengths, 0, columns, "row")


def _ranges(args: Arguments) -> None:
    """Check contiguous index keys that rows of queries score."""
    keys = args.shape("keys", 2)[0]
    for name in ("starts", "ends"):
        _within(args, name, args.ints(name), 0, keys, "query")


def _flash(args: Arguments) -> None:
    for name, tensor in (("cu_seqlens_q", "q"), ("cu_seqlens_k", "k")):
        _ascending(args, name, args.ints(name).astype(np.int64), args.shape(tensor, 3)[0])


def _combine(args: Arguments) -> None:
    for name, tensor in (("topk_lengths", "topk"), ("window_lengths", "window")):
        if args.has(name):
            _within(args, name, args.ints(name), 0, args.shape(tensor, 2)[1], "row")


_RULES: dict[str, Callable[[Arguments], None]] = {
    "append_cache_kv_c8": _append_cache,
    "attention_step": _attention_step,
    "combine_topk_window": _combine,
    "compact_block_tables": _compact,
    "flash_attention": _flash,
    "gqa_rope_write_cache": _write,
    "indexer_k_gather": _k_gather,
    "indexer_k_write_cache": _k_write,
    "indexer_kv_compress_insert": _compress,
    "indexer_q_rope_quant": _positions,
    "indexer_topk": _ranges,
    "inverse_rope_quantize_fp8": _positions,
    "mla_attention": _mla_attention,
    "mla_gather_cache": _mla_gather,
    "mla_qkv_norm_rope_write": _mla_layer,
    "mla_sparse_attention": _sparse,
    "mla_write_cache": _mla_write,
    "mqa_logits": _ranges,
    "paged_attention": _paged_attention,
    "paged_indexer_topk": _context,
    "paged_mqa_logits": _context,
    "rope_write_cache_kv": _write,
    "save_partial_states": _partial_states,
    "select_key_blocks": _select_blocks,
    "sparse_paged_attention": _sparse_paged_attention,
    "token_maps": _token_maps,
    "topk_indices": _topk_indices,
    "topk_to_slots": _topk_to_slots,
    "update_block_summaries": _update_summaries,
    "window_indices": _window,
    "write_cache_kv": _write,
}

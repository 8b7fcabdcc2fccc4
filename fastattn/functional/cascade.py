"""Cascade attention: sequences attend to a shared prefix together, and each to its own suffix."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import numpy as np
import paddle
from numpy.typing import ArrayLike, NDArray
from paddle import Tensor

from fastattn._check import partial_tables
from fastattn._foreign import not_a_tensor
from fastattn._ops import is_tensor
from fastattn.functional._attributes import as_int32
from fastattn.functional._cache_types import check_no_zero_points
from fastattn.functional._partial import (
    check_apart,
    check_results,
    empty,
    output_shape,
    value_dtype,
)
from fastattn.functional.attention import paged_attention
from fastattn.functional.merge import merge_attn_states

_OP = "cascade_attention"
_PLAN = "plan_cascade"
_BLOCK_SIZE = 64


class CascadePlan(NamedTuple):
    """Metadata of a step whose sequences each consist of a shared prefix and a suffix.

    :func:`plan_cascade` makes a plan on the host from a scheduler's lengths and block tables. A
    server whose lengths are on the device may build a plan from its own tensors. All tensors are
    int32, contiguous and on the place of `q`. A CUDA graph keeps their addresses: write the plan of
    a later step with the same `tokens` into them in place.

    Attributes
    ----------
    tokens : int
        Number P of tokens of the prefix, a multiple of 64.
    prefix_block_table : Tensor, shape [1, P / 64]
    prefix_cu_seqlens_q : Tensor, shape [2]
        0 and the number N of new tokens of all sequences. Tokens of `q` from N on are padding.
    prefix_seq_lens_decoder : Tensor, shape [1]
        ``max(P - N, 0)``. All new tokens are queries of one sequence with ``max(P, N)`` keys; keys
        that are not in `prefix_block_table` are masked.
    prefix_seq_lens_this_time : Tensor, shape [1]
        N.
    suffix_block_tables : Tensor, shape [B, max_blocks - P / 64]
        The sequences' block tables without their first P / 64 entries.
    suffix_seq_lens_decoder : Tensor, shape [B]
        The sequences' cached tokens minus P.
    """

    tokens: int
    prefix_block_table: Tensor
    prefix_cu_seqlens_q: Tensor
    prefix_seq_lens_decoder: Tensor
    prefix_seq_lens_this_time: Tensor
    suffix_block_tables: Tensor
    suffix_seq_lens_decoder: Tensor


def _integers(name: str, values: ArrayLike, shape: tuple[int, ...], text: str) -> NDArray[np.int64]:
    if is_tensor(values):
        raise TypeError(f"{_PLAN}: {name}: expected integers on the host, got a tensor")
    return as_int32(_PLAN, name, values, shape, text).astype(np.int64)


def _check_shared(
    tables: NDArray[np.int64], cached: NDArray[np.int64], active: NDArray[np.intp], tokens: int
) -> None:
    """Refuse a sequence with other prefix blocks, or with fewer cached tokens than the prefix."""
    prefix = tables[active[0], : tokens // _BLOCK_SIZE]
    if (prefix < 0).any():
        raise ValueError(
            f"{_PLAN}: block_tables: expected {len(prefix)} blocks of the prefix in "
            f"sequence {active[0]}, got {prefix.tolist()}"
        )
    for b in active:
        if cached[b] < tokens:
            raise ValueError(
                f"{_PLAN}: seq_lens_decoder: expected at least shared_prefix_tokens = {tokens} "
                f"in sequence {b}, got {cached[b]}"
            )
        if (tables[b, : len(prefix)] != prefix).any():
            raise ValueError(
                f"{_PLAN}: block_tables: expected the same first {len(prefix)} blocks in "
                f"sequences {active[0]} and {b}"
            )


def plan_cascade(
    block_tables: ArrayLike,
    seq_lens_decoder: ArrayLike,
    seq_lens_this_time: ArrayLike,
    shared_prefix_tokens: int,
    *,
    place: Any = None,
) -> CascadePlan:
    """Plan :func:`cascade_attention` for a step whose sequences share a prefix.

    The arguments are on the host, and the plan's tensors are copied to the device. Make one plan
    per step, outside of a CUDA graph. Sequences without new tokens need not share the prefix.

    Parameters
    ----------
    block_tables : array_like of int, shape [B, max_blocks]
        Physical block of each group of 64 tokens of a sequence; -1 for no block.
    seq_lens_decoder, seq_lens_this_time : array_like of int, shape [B]
        Number of cached and of new tokens of each sequence. ``cu_seqlens_q`` of the step must be
        the cumulative sums of the new tokens, with padding only after the last sequence.
    shared_prefix_tokens : int
        Length P of the shared prefix: a multiple of 64 and at most the cached tokens of each
        sequence.
    place : optional
        Place of the plan's tensors. Default: CPU.

    Returns
    -------
    plan : CascadePlan
        Metadata for :func:`cascade_attention`, the same for every layer of the step.

    Raises
    ------
    TypeError
        If an argument is a tensor or does not hold integers.
    ValueError
        If shapes do not match, a value does not fit int32, or `shared_prefix_tokens` is not a
        positive multiple of 64. Also if a sequence with new tokens has another prefix, or fewer
        cached tokens.

    Examples
    --------
    >>> from fastattn.functional import plan_cascade
    >>> plan = plan_cascade([[7, 2, -1], [7, 5, 4]], [65, 130], [1, 1], 64)
    >>> plan.prefix_block_table.tolist(), plan.suffix_block_tables.tolist()
    ([[7]], [[2, -1], [5, 4]])
    >>> plan.suffix_seq_lens_decoder.tolist()
    [1, 66]
    """
    tables = _integers("block_tables", block_tables, (-1, -1), "[B, max_blocks]")
    batch, max_blocks = tables.shape
    cached = _integers("seq_lens_decoder", seq_lens_decoder, (batch,), f"[{batch}]")
    new = _integers("seq_lens_this_time", seq_lens_this_time, (batch,), f"[{batch}]")
    try:
        tokens = operator.index(shared_prefix_tokens)
    except TypeError:
        raise TypeError(
            f"{_PLAN}: shared_prefix_tokens: expected int, got "
            f"{type(shared_prefix_tokens).__name__}"
        ) from None
    blocks = tokens // _BLOCK_SIZE
    if tokens < 1 or tokens % _BLOCK_SIZE or blocks > max_blocks:
        raise ValueError(
            f"{_PLAN}: shared_prefix_tokens: expected a positive multiple of {_BLOCK_SIZE}, at "
            f"most {max_blocks * _BLOCK_SIZE} as block_tables can hold, got {tokens}"
        )
    new = np.maximum(new, 0)
    active = np.flatnonzero(new)
    prefix = np.full(blocks, -1, np.int64)
    if active.size:
        _check_shared(tables, cached, active, tokens)
        prefix = tables[active[0], :blocks]
    # A table needs at least one column. New tokens beyond the table are in no block.
    suffix = tables[:, blocks:] if blocks < max_blocks else np.full((batch, 1), -1)
    total = int(new.sum())
    if total > np.iinfo(np.int32).max:
        raise ValueError(
            f"{_PLAN}: seq_lens_this_time: expected a sum that fits int32, got {total}"
        )
    place = paddle.CPUPlace() if place is None else place

    def tensor(values: ArrayLike) -> Tensor:
        return paddle.to_tensor(np.ascontiguousarray(values, np.int32), place=place)

    return CascadePlan(
        tokens=tokens,
        prefix_block_table=tensor(prefix[None]),
        prefix_cu_seqlens_q=tensor([0, total]),
        prefix_seq_lens_decoder=tensor([max(tokens - total, 0)]),
        prefix_seq_lens_this_time=tensor([total]),
        suffix_block_tables=tensor(suffix),
        suffix_seq_lens_decoder=tensor(np.maximum(cached - tokens, 0)),
    )


def _check(plan: Any, max_seqlen_k: Any, q: Any, q_descale: Any, window_size: Any) -> None:
    """Refuse arguments that the two attention calls would accept, or report under other names."""
    if not paddle.in_dynamic_mode():
        raise NotImplementedError(f"{_OP}: a plan belongs to one step: it runs in dygraph only")
    if not isinstance(plan, CascadePlan):
        raise TypeError(f"{_OP}: plan: expected a CascadePlan, got {type(plan).__name__}")
    if type(max_seqlen_k) is not int:
        raise TypeError(f"{_OP}: max_seqlen_k: expected int, got {type(max_seqlen_k).__name__}")
    if max_seqlen_k < 0:
        raise ValueError(f"{_OP}: max_seqlen_k: expected at least 0, got {max_seqlen_k}")
    if window_size not in ((-1, -1), [-1, -1]):
        raise NotImplementedError(
            f"{_OP}: window_size: {window_size!r} is not supported: a window begins at another key "
            "of the prefix for every query, and one that does not reach the prefix needs no "
            "cascade; use paged_attention"
        )
    if not is_tensor(q):
        raise not_a_tensor(_OP, "q", q)
    if is_tensor(q_descale) and list(q_descale.shape) not in ([1], list(q.shape[:2])):
        raise ValueError(
            f"{_OP}: q_descale: expected shape [1] or {list(q.shape[:2])} (tokens, query heads; "
            f"the prefix knows no sequences), got {list(q_descale.shape)}"
        )


def cascade_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: CascadePlan,
    cu_seqlens_q: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    q_descale: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "auto",
    cache_k_zp: Tensor | None = None,
    cache_v_zp: Tensor | None = None,
    quantize_q: bool = False,
    batch_invariant: bool = False,
    split_invariant: bool = False,
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
) -> Any:
    r"""Attention of a step whose sequences share their first cache blocks.

    The result is the same as :func:`paged_attention` over the whole sequences. The new tokens of
    all sequences attend to the P tokens of the prefix as one sequence, so its blocks are read once
    instead of once per sequence. Each sequence attends to its own suffix. The two partial results
    are merged in fp32 [1]_:

    .. math:: \mathrm{lse} = \ln (e^{\mathrm{lse}_p} + e^{\mathrm{lse}_s}), \qquad
              o = e^{\mathrm{lse}_p - \mathrm{lse}} o_p + e^{\mathrm{lse}_s - \mathrm{lse}} o_s

    Parameters
    ----------
    q : Tensor, shape [T, H, D], float32, float16, bfloat16, or uint8 / float8_e4m3fn (e4m3 codes)
        As for :func:`paged_attention`.
    key_cache, value_cache : Tensor
        As for :func:`paged_attention`.
    plan : CascadePlan
        From :func:`plan_cascade`. Values on the device are not checked: a sequence with another
        prefix still attends to the shared one.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        Cumulative sums of the new tokens of the plan.
    seq_lens_this_time : Tensor, shape [B], int32
        Number of new tokens of each sequence.
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the new tokens and of the keys of a sequence, including the prefix. They
        mask nothing.
    cache_k_scales, cache_v_scales : Tensor, float32, bfloat16 or uint8, optional
        As for :func:`paged_attention`.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    q_descale : Tensor, shape [1] or [T, H], float32 or bfloat16, optional
        Dequantisation multipliers of e4m3 queries. Default: 1.
    softmax_scale : float, optional
        Default: ``D ** -0.5``.
    causal : bool
        Mask the keys after a query's position.
    window_size : (int, int)
        Only (-1, -1), which means no window, is supported.
    softcap : float
        Bound of the logits, ``cap * tanh(s / cap)``; 0 means none.
    sinks : Tensor, shape [H], float32 or bfloat16, optional
        A logit for each head, finite or -inf. It counts in the denominator and in the LSE, but has
        no value. It is added once, with the suffix, where every query sees its own key.
    out_scale : Tensor, shape [1], float32, optional
        Return the output as e4m3 codes of ``out * (1 / out_scale)``, quantised by the merge from
        its fp32 values.
    return_softmax_lse : bool
        Also return the LSE, the logarithm of the softmax's denominator.
    out : Tensor, shape [T, H, D], optional
        Written in place and returned. Tokens of no sequence become 0.
    out_dtype : {"auto", "float32", "float16", "bfloat16"}
        As for :func:`paged_attention`.
    cache_k_zp, cache_v_zp : None
        Zero points. Every supported type is symmetric and takes none.
    quantize_q : bool
        As for :func:`paged_attention`.
    batch_invariant, split_invariant : bool
        Only False is supported, because all sequences attend to the prefix together.
    k_rotation : {"none", "hadamard"}
    k_center : Tensor, shape [KV, D], float32, optional
    k_feedback : Tensor, optional
        As for :func:`paged_attention`.

    Returns
    -------
    out : Tensor, shape [T, H, D]
        uint8 (e4m3 codes) if `out_scale` is given.
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm, -inf for tokens of no sequence. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError, ValueError
        As :func:`paged_attention`. Also if `plan` is not a CascadePlan, or `q_descale` has shape
        [B, KV].
    NotImplementedError
        As :func:`paged_attention`. Also for a window, for `batch_invariant` or
        `split_invariant`, and in a static program.

    See Also
    --------
    plan_cascade : the plan of a step.
    merge_attn_states : the merge.

    References
    ----------
    .. [1] Ye et al., "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference
       Serving", https://arxiv.org/abs/2501.01005

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import cascade_attention, plan_cascade, write_cache_kv
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> caches = [paddle.zeros([3, 1, 64, 64], "bfloat16") for _ in range(2)]
    >>> x = paddle.ones([64, 1, 64], "bfloat16")
    >>> prefix = int32([[0]]), int32([0, 64]), int32([0]), int32([64])
    >>> _ = write_cache_kv(x, 4 * x, *caches, *prefix)  # block 0: the shared prefix
    >>> tables, cached, new = [[0, 1], [0, 2]], [64, 64], [1, 1]
    >>> seqs = int32(tables), int32([0, 1, 2]), int32(cached), int32(new)
    >>> _ = write_cache_kv(x[:2], 69 * x[:2], *caches, *seqs)
    >>> plan = plan_cascade(tables, cached, new, 64)
    >>> out = cascade_attention(x[:2], *caches, plan, seqs[1], seqs[3], 1, 65)
    >>> out[:, 0, 0].cast("float32").numpy().tolist()
    [5.0, 5.0]
    """
    _check(plan, max_seqlen_k, q, q_descale, window_size)
    if batch_invariant or split_invariant:
        option = "batch_invariant" if batch_invariant else "split_invariant"
        raise NotImplementedError(
            f"{_OP}: {option}: True is not supported: all sequences attend to the prefix as "
            "one, so that a sequence's bits depend on the others; use paged_attention"
        )
    check_no_zero_points(_OP, cache_quant_type, cache_k_zp=cache_k_zp, cache_v_zp=cache_v_zp)
    dtype = value_dtype(_OP, q, out, out_scale, out_dtype)
    check_results(_OP, q, out, out_scale, dtype)
    options: dict[str, Any] = {
        "cache_k_scales": cache_k_scales,
        "cache_v_scales": cache_v_scales,
        "cache_quant_type": cache_quant_type,
        "fp8_format": fp8_format,
        "q_descale": q_descale,
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "return_softmax_lse": True,
        "quantize_q": quantize_q,
        "k_rotation": k_rotation,
        "k_center": k_center,
    }
    if out is not None and 0 not in out.shape:
        # The merge writes `out` and does not know what the attention reads. `out` may share memory
        # with the queries, which have been read by then.
        read = {**options, "key_cache": key_cache, "value_cache": value_cache, "sinks": sinks}
        read.update(cu_seqlens_q=cu_seqlens_q, seq_lens_this_time=seq_lens_this_time)
        check_apart(_OP, out, (*read.items(), *zip(plan._fields, plan)))
    suffix = (
        plan.suffix_block_tables,
        cu_seqlens_q,
        plan.suffix_seq_lens_decoder,
        seq_lens_this_time,
        max_seqlen_q,
        max(max_seqlen_k - plan.tokens, 0),
    )
    suffix_options = {**options, "causal": causal, "sinks": sinks}
    if 0 in q.shape:  # nothing to merge
        result, lse = paged_attention(
            q,
            key_cache,
            value_cache,
            *suffix,
            **suffix_options,
            out_scale=out_scale,
            out=out,
            out_dtype=out_dtype,
        )
        return (result, lse) if return_softmax_lse else result
    suffix_out, suffix_lse = paged_attention(
        q, key_cache, value_cache, *suffix, **suffix_options, out_dtype="float32"
    )
    num_tokens = int(q.shape[0])
    # All new tokens form one sequence, which may be longer than the prefix and its table.
    with partial_tables():
        prefix_out, lse = paged_attention(
            q,
            key_cache,
            value_cache,
            plan.prefix_block_table,
            plan.prefix_cu_seqlens_q,
            plan.prefix_seq_lens_decoder,
            plan.prefix_seq_lens_this_time,
            num_tokens,
            max(plan.tokens, num_tokens),
            **options,
            causal=False,  # every key of the prefix is before every query
            out_dtype="float32",
        )
    if out is None and out_scale is None:
        same = dtype == "float32"
        out = prefix_out if same else empty(output_shape(q), getattr(paddle, dtype), q.place)
    result, lse = merge_attn_states(
        prefix_out,
        lse,
        suffix_out,
        suffix_lse,
        output=out,
        output_lse=lse,
        output_scale=out_scale,
    )
    return (result, lse) if return_softmax_lse else result

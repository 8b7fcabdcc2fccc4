"""DeepGEMM's indexer logits under their own names and with their own positional arguments.

A program that calls them changes one line::

    # import deep_gemm
    from fastattn.compat import deep_gemm

The functions call :func:`fastattn.functional.mqa_logits` and
:func:`fastattn.functional.paged_mqa_logits`. Every element that a query does not see is -inf,
whatever `clean_logits` is. They take any multiple of 8 heads, 64 or 128 channels, and pages of any
number of tokens. No schedule has to be made. ``fp8_fp4_`` functions take FP8 or MXFP4 queries and
keys; the others are the older names and take only FP8.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from fastattn import _ops
from fastattn._foreign import not_a_tensor
from fastattn.functional._marker import unified
from fastattn.functional._partial import dtype_name
from fastattn.functional.mqa_logits import mqa_logits, paged_mqa_logits

__all__ = [
    "fp8_fp4_mqa_logits",
    "fp8_fp4_paged_mqa_logits",
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
]


def _check_clean_logits(op: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{op}: clean_logits: expected bool, got {type(value).__name__}")


def _check_logits_dtype(op: str, dtype: Any) -> None:
    name = dtype if type(dtype) is str else dtype_name(dtype)
    if dtype is not None and name.lower() not in ("float32", "fp32"):
        raise NotImplementedError(
            f"{op}: logits_dtype: expected float32, got {name}; write {op}(..).astype({name!r})"
        )


def _check_weights(op: str, weights: Any) -> None:
    if _ops.is_tensor(weights) and dtype_name(weights.dtype) == "bfloat16":
        raise TypeError(
            f'{op}: weights: expected dtype float32, got bfloat16; write weights.astype("float32")'
        )


def _pair(op: str, name: str, value: Any, what: str) -> tuple[Any, Any]:
    if type(value) not in (tuple, list) or len(value) != 2:
        raise TypeError(f"{op}: {name}: expected {what}, got {type(value).__name__}")
    return value[0], value[1]


def _bytes(codes: Any) -> Any:
    """MXFP4 pairs of codes as uint8; other packages use int8 tensors."""
    return codes.view("uint8") if str(getattr(codes, "dtype", "")).endswith(".int8") else codes


def _check_indices(op: str, indices: Any, q: Any) -> None:
    """Refuse indices that do anything but tell which rows of a step belong to one sequence."""
    if indices is None:
        return
    if not _ops.is_tensor(indices):
        raise not_a_tensor(op, "indices", indices)
    if not _ops.is_tensor(q) or len(q.shape) == 0:
        return  # the operator refuses it
    expected = [int(q.shape[0])]
    if list(indices.shape) != expected and -1 not in (expected[0], *indices.shape):
        raise ValueError(f"{op}: indices: expected shape {expected}, got {list(indices.shape)}")
    if len(q.shape) > 1 and q.shape[1] not in (1, -1):
        raise ValueError(f"{op}: indices: expected one query a row of q, got {int(q.shape[1])}")


@unified
def fp8_fp4_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: Any = None,
) -> Tensor:
    """Score contiguous FP8 or MXFP4 keys with the indexer's queries.

    This is :func:`fastattn.functional.mqa_logits` under DeepGEMM's name. :func:`fp8_mqa_logits`
    lists the differences from DeepGEMM.

    Parameters
    ----------
    q : tuple of (Tensor, Tensor or None)
        FP8: codes [M, H, D], float8_e4m3fn or uint8, and None. MXFP4: pairs of codes [M, H, D / 2],
        uint8 or int8, and scales [M, H], int32 (byte b is the exponent of channels 32b .. 32b +
        31).
    kv : tuple of Tensor
        FP8: keys [N, D] and float32 scales [N]. MXFP4: keys [N, D / 2] and int32 scales [N].
    weights : Tensor, shape [M, H], float32
        Weights that include the scales of FP8 queries.
    cu_seq_len_k_start, cu_seq_len_k_end : Tensor, shape [M], int32
        Range of keys that each query sees.
    clean_logits : bool
        Accepted. The logits are always clean.
    max_seqlen_k : int
        If above 0, the number of columns of a compressed result, whose column j is key
        ``start + j``.
    logits_dtype : optional
        Must be float32; cast the result instead.

    Returns
    -------
    Tensor, shape [M, N] or [M, max_seqlen_k], float32

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, `q` or `kv` is not a pair, or an argument has
        another type.
    ValueError
        If shapes do not match, or `max_seqlen_k` is negative.
    NotImplementedError
        If heads, channels or `logits_dtype` are not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat import deep_gemm
    >>> ones = paddle.full([1, 8, 64], 0x22, "uint8"), paddle.full([1, 8], 0x7F7F7F7F, "int32")
    >>> keys = paddle.full([2, 64], 0x22, "uint8"), paddle.to_tensor([0x7F7F7F7F] * 2, "int32")
    >>> start, end = paddle.to_tensor([0], "int32"), paddle.to_tensor([1], "int32")
    >>> deep_gemm.fp8_fp4_mqa_logits(ones, keys, paddle.ones([1, 8]), start, end).tolist()
    [[1024.0, -inf]]
    """
    op = "fp8_fp4_mqa_logits"
    codes, q_scales = _pair(op, "q", q, "queries and their scales or None")
    keys, k_scales = _pair(op, "kv", kv, "keys and their scales")
    _check_clean_logits(op, clean_logits)
    _check_logits_dtype(op, logits_dtype)
    _check_weights(op, weights)
    if type(max_seqlen_k) is not int:
        raise TypeError(f"{op}: max_seqlen_k: expected int, got {type(max_seqlen_k).__name__}")
    packed = q_scales is not None
    return mqa_logits(
        _bytes(codes) if packed else codes,
        _bytes(keys) if packed else keys,
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        k_scales=k_scales,
        q_scales=q_scales,
        quant="mxfp4" if packed else "fp8",
        max_seqlen_k=max_seqlen_k or None,
    )


@unified
def fp8_fp4_paged_mqa_logits(
    q: tuple[Tensor, Tensor | None],
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Any,
    max_context_len: int,
    clean_logits: bool = False,
    logits_dtype: Any = None,
    indices: Tensor | None = None,
) -> Tensor:
    """Score a paged cache of FP8 or MXFP4 index keys with the queries of a decode step.

    This is :func:`fastattn.functional.paged_mqa_logits` under DeepGEMM's name.
    :func:`fp8_paged_mqa_logits` lists the differences from DeepGEMM.

    Parameters
    ----------
    q : tuple of (Tensor, Tensor or None)
        FP8: codes [B, next_n, H, D], float8_e4m3fn or uint8, and None. MXFP4: pairs of codes
        [B, next_n, H, D / 2], uint8 or int8, and scales [B, next_n, H], int32.
    kv_cache : Tensor, shape [num_pages, page_size, 1, D + 4 or D / 2 + 4], uint8
        The third dimension may be absent. A page holds the codes of its tokens, then 4 bytes of
        scales per token.
    weights, context_lens, block_table, schedule_meta, max_context_len, clean_logits, logits_dtype
        As for :func:`fp8_paged_mqa_logits`.
    indices : Tensor, shape [B], int32, optional
        Sequence of each row, for a step whose sequences have different numbers of queries. next_n
        is then 1, and each row has its own length and its own row of `block_table`. These determine
        the result, so the values are not used.

    Returns
    -------
    Tensor, shape [B * next_n, max_context_len], float32

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, `q` is not a pair, or an argument has another
        type.
    ValueError
        If shapes do not match, pages are too small, or `indices` are given with several queries per
        row.
    NotImplementedError
        If heads, channels or `logits_dtype` are not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat import deep_gemm
    >>> q = paddle.full([1, 1, 8, 64], 0x22, "uint8"), paddle.full([1, 1, 8], 0x7F7F7F7F, "int32")
    >>> lens, table = paddle.to_tensor([2], "int32"), paddle.to_tensor([[0]], "int32")
    >>> deep_gemm.fp8_fp4_paged_mqa_logits(
    ...     q, paddle.zeros([1, 64, 1, 68], "uint8"), paddle.ones([1, 8]), lens, table, None, 3
    ... ).tolist()
    [[0.0, 0.0, -inf]]
    """
    op = "fp8_fp4_paged_mqa_logits"
    codes, q_scales = _pair(op, "q", q, "queries and their scales or None")
    _check_clean_logits(op, clean_logits)
    _check_logits_dtype(op, logits_dtype)
    _check_weights(op, weights)
    _check_indices(op, indices, codes)
    packed = q_scales is not None
    return paged_mqa_logits(
        _bytes(codes) if packed else codes,
        kv_cache,
        weights,
        _contiguous(context_lens),
        block_table,
        max_context_len,
        q_scales=q_scales,
        quant="mxfp4" if packed else "fp8",
    )


def _contiguous(lengths: Any) -> Any:
    if type(lengths) is paddle.Tensor and not lengths.is_contiguous():
        return lengths.contiguous()
    return lengths


@unified
def fp8_mqa_logits(
    q: Tensor,
    kv: tuple[Tensor, Tensor],
    weights: Tensor,
    cu_seq_len_k_start: Tensor,
    cu_seq_len_k_end: Tensor,
    clean_logits: bool = True,
    max_seqlen_k: int = 0,
    logits_dtype: Any = None,
) -> Tensor:
    """Score contiguous FP8 keys with the indexer's queries, for a prompt or a chunk of one.

    This is :func:`fastattn.functional.mqa_logits` under DeepGEMM's name. Differences from DeepGEMM:
    elements outside a row's range are -inf, even without `clean_logits` and in the compressed form,
    which may be cleaned. Ranges are clamped to the keys. Any multiple of 8 heads is allowed. The
    result is contiguous.

    Parameters
    ----------
    q : Tensor, shape [M, H, D], float8_e4m3fn or uint8
    kv : tuple of Tensor
        Keys [N, D], float8_e4m3fn or uint8, and their scales [N], float32.
    weights : Tensor, shape [M, H], float32
        Weights that include the scales of `q`.
    cu_seq_len_k_start, cu_seq_len_k_end : Tensor, shape [M], int32
        Range of keys that each query sees.
    clean_logits : bool
        Accepted. The logits are always clean.
    max_seqlen_k : int
        If above 0, the number of columns of a compressed result, whose column j is key
        ``start + j``.
    logits_dtype : optional
        Must be float32; cast the result instead.

    Returns
    -------
    Tensor, shape [M, N] or [M, max_seqlen_k], float32

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, `kv` is not a pair, or an argument has another
        type.
    ValueError
        If shapes do not match, or `max_seqlen_k` is negative.
    NotImplementedError
        If heads, channels or `logits_dtype` are not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat import deep_gemm
    >>> q = paddle.full([1, 8, 64], 56, "uint8")  # e4m3 of 1
    >>> kv = paddle.full([3, 64], 48, "uint8"), paddle.to_tensor([1.0, 2.0, 3.0])
    >>> start, end = paddle.to_tensor([1], "int32"), paddle.to_tensor([3], "int32")
    >>> deep_gemm.fp8_mqa_logits(q, kv, paddle.ones([1, 8]), start, end, True, 2).tolist()
    [[512.0, 768.0]]
    """
    op = "fp8_mqa_logits"
    keys, k_scales = _pair(op, "kv", kv, "keys and their scales")
    _check_clean_logits(op, clean_logits)
    _check_logits_dtype(op, logits_dtype)
    _check_weights(op, weights)
    if type(max_seqlen_k) is not int:
        raise TypeError(f"{op}: max_seqlen_k: expected int, got {type(max_seqlen_k).__name__}")
    return mqa_logits(
        q,
        keys,
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        k_scales=k_scales,
        max_seqlen_k=max_seqlen_k or None,
    )


@unified
def fp8_paged_mqa_logits(
    q: Tensor,
    kv_cache: Tensor,
    weights: Tensor,
    context_lens: Tensor,
    block_table: Tensor,
    schedule_meta: Any,
    max_context_len: int,
    clean_logits: bool = False,
    indices: Tensor | None = None,
    *,
    logits_dtype: Any = None,
) -> Tensor:
    """Score a paged cache of FP8 index keys with the queries of a decode step.

    This is :func:`fastattn.functional.paged_mqa_logits` under DeepGEMM's name. Differences from
    DeepGEMM: `context_lens` may have both forms and any strides. Elements past a row's own length
    are -inf, whatever `clean_logits` is. An unassigned entry of `block_table` gives -inf. Lengths
    may be 0. Pages of any number of tokens and any multiple of 8 heads are allowed. The result is
    contiguous.

    Parameters
    ----------
    q : Tensor, shape [B, next_n, H, D], float8_e4m3fn or uint8
    kv_cache : Tensor, shape [num_pages, page_size, 1, D + 4], uint8
        Or [num_pages, page_size, D + 4]. A page holds the codes of its tokens, then their float32
        scales.
    weights : Tensor, shape [B * next_n, H], float32
    context_lens : Tensor, shape [B] or [B, next_n], int32
        1-D: query j sees ``context_lens[b] - next_n + 1 + j`` keys. 2-D: number of keys of each
        query.
    block_table : Tensor, shape [>= B, max_blocks], int32
    schedule_meta : any
        Not used, because the kernels distribute their work themselves.
    max_context_len : int
        Number of columns of the result.
    clean_logits : bool
        Accepted. The logits are always clean.
    indices : Tensor, shape [B], int32, optional
        As for :func:`fp8_fp4_paged_mqa_logits`.
    logits_dtype : optional
        Must be float32; cast the result instead.

    Returns
    -------
    Tensor, shape [B * next_n, max_context_len], float32

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or an argument has another type.
    ValueError
        If shapes do not match, pages are too small, or `indices` are given with several queries per
        row.
    NotImplementedError
        If heads, channels or `logits_dtype` are not supported.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat import deep_gemm
    >>> q, cache = paddle.full([1, 1, 8, 128], 56, "uint8"), paddle.zeros([1, 64, 1, 132], "uint8")
    >>> lens, table = paddle.to_tensor([2], "int32"), paddle.to_tensor([[0]], "int32")
    >>> meta = deep_gemm.get_paged_mqa_logits_metadata(lens, 64, deep_gemm.get_num_sms())
    >>> weights = paddle.ones([1, 8])
    >>> deep_gemm.fp8_paged_mqa_logits(q, cache, weights, lens, table, meta, 3).tolist()
    [[0.0, 0.0, -inf]]
    """
    op = "fp8_paged_mqa_logits"
    _check_clean_logits(op, clean_logits)
    _check_logits_dtype(op, logits_dtype)
    _check_weights(op, weights)
    _check_indices(op, indices, q)
    lengths = _contiguous(context_lens)
    return paged_mqa_logits(q, kv_cache, weights, lengths, block_table, max_context_len)


@functools.lru_cache(maxsize=64)
def _schedule(place: str, num_sms: int) -> Tensor:
    kind, _, number = place.partition(":")
    at = paddle.CPUPlace() if kind == "cpu" else paddle.CUDAPlace(int(number or 0))
    return paddle.to_tensor(np.zeros((num_sms + 1, 2), np.int32), place=at)


@unified
def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Any = None
) -> Tensor:
    """Schedule for :func:`fp8_paged_mqa_logits`, which does not use it.

    It has DeepGEMM's shape and dtype, and is the same tensor in every call, so it costs nothing.
    Lengths are not read and may all be 0.

    Parameters
    ----------
    context_lens : Tensor, shape [B] or [B, next_n], int32
    block_kv : int
        Tokens of a page.
    num_sms : int
        Number of rows of the result, minus one.
    indices : optional
        Not used.

    Returns
    -------
    Tensor, shape [num_sms + 1, 2], int32
        Zeros. Do not write to this tensor.

    Raises
    ------
    TypeError
        If `context_lens` is not a tensor, or a number is not an int.
    ValueError
        If a number is not positive.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat import deep_gemm
    >>> lens = paddle.zeros([4], "int32")
    >>> deep_gemm.get_paged_mqa_logits_metadata(lens, 64, 132).shape
    [133, 2]
    """
    op = "get_paged_mqa_logits_metadata"
    if not _ops.is_tensor(context_lens):
        raise not_a_tensor(op, "context_lens", context_lens)
    for name, value in (("block_kv", block_kv), ("num_sms", num_sms)):
        if type(value) is not int:
            raise TypeError(f"{op}: {name}: expected int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{op}: {name}: expected at least 1, got {value}")
    if type(context_lens) is not paddle.Tensor:  # in a traced program
        return paddle.zeros([num_sms + 1, 2], "int32")
    place = context_lens.place
    name = f"gpu:{place.gpu_device_id()}" if place.is_gpu_place() else "cpu"
    return _schedule(name, num_sms)


@functools.lru_cache(maxsize=1)
def get_num_sms() -> int:
    """Number of multiprocessors of the first GPU; 1 without a GPU.

    Examples
    --------
    >>> from fastattn.compat import deep_gemm
    >>> deep_gemm.get_num_sms() >= 1
    True
    """
    if not paddle.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        return 1
    return int(paddle.device.cuda.get_device_properties(0).multi_processor_count)

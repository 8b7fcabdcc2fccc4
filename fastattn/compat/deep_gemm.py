"""DeepGEMM's logits of an indexer under their own names, with their own positional arguments.

A program that calls them changes one line::

    # import deep_gemm
    from fastattn.compat import deep_gemm

They are :func:`fastattn.functional.mqa_logits` and :func:`fastattn.functional.paged_mqa_logits`:
every cell that a query does not see is -inf, whatever `clean_logits` is. Any multiple of 8 heads,
64 or 128 channels, pages of any number of tokens, and a schedule that nobody has to make.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import paddle
from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified
from fastattn.functional._partial import dtype_name
from fastattn.functional.mqa_logits import mqa_logits, paged_mqa_logits

__all__ = [
    "fp8_mqa_logits",
    "fp8_paged_mqa_logits",
    "get_num_sms",
    "get_paged_mqa_logits_metadata",
]


def _check_bool(op: str, name: str, value: Any) -> None:
    if type(value) is not bool:
        raise TypeError(f"{op}: {name}: expected bool, got {type(value).__name__}")


def _check_logits_dtype(op: str, dtype: Any) -> None:
    name = dtype if type(dtype) is str else dtype_name(dtype)
    if dtype is not None and name.lower() not in ("float32", "fp32"):
        raise NotImplementedError(f"{op}: logits_dtype: expected float32, got {name}")


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
    """Score contiguous FP8 keys with the indexer's queries: a prompt, or a chunk of one.

    :func:`fastattn.functional.mqa_logits` under DeepGEMM's name. Differences from DeepGEMM's: cells
    outside a row's range are -inf also without `clean_logits` and in the compressed form, which may
    be cleaned; ranges are clamped to the keys; any multiple of 8 heads; the result is contiguous.

    Parameters
    ----------
    q : Tensor, shape [M, H, D], float8_e4m3fn or uint8
    kv : tuple of Tensor
        Keys [N, D], float8_e4m3fn or uint8, and their scales [N], float32.
    weights : Tensor, shape [M, H], float32
        With the scales of `q` as a factor.
    cu_seq_len_k_start, cu_seq_len_k_end : Tensor, shape [M], int32
        Keys that each query sees.
    clean_logits : bool
        Accepted; the logits are always clean.
    max_seqlen_k : int
        Above 0: columns of a compressed result, whose column j is key ``start + j``.
    logits_dtype : optional
        float32.

    Returns
    -------
    Tensor, shape [M, N] or [M, max_seqlen_k], float32

    Raises
    ------
    TypeError
        If a dtype is not one of those above, `kv` is no pair, or an argument has another type.
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
    if type(kv) not in (tuple, list) or len(kv) != 2:
        raise TypeError(f"{op}: kv: expected keys and their scales, got {type(kv).__name__}")
    _check_bool(op, "clean_logits", clean_logits)
    _check_logits_dtype(op, logits_dtype)
    if type(max_seqlen_k) is not int:
        raise TypeError(f"{op}: max_seqlen_k: expected int, got {type(max_seqlen_k).__name__}")
    return mqa_logits(
        q,
        kv[0],
        weights,
        cu_seq_len_k_start,
        cu_seq_len_k_end,
        k_scales=kv[1],
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
    logits_dtype: Any = None,
) -> Tensor:
    """Score a paged cache of FP8 index keys with the queries of a decode step.

    :func:`fastattn.functional.paged_mqa_logits` under DeepGEMM's name. Differences from DeepGEMM's:
    both forms of `context_lens`, of any strides; cells past a row's own length are -inf, whatever
    `clean_logits` is; an entry of `block_table` that names no page gives -inf; lengths of 0 are
    fine; pages of any number of tokens, any multiple of 8 heads; the result is contiguous.

    Parameters
    ----------
    q : Tensor, shape [B, next_n, H, D], float8_e4m3fn or uint8
    kv_cache : Tensor, shape [num_pages, page_size, 1, D + 4], uint8
        Or [num_pages, page_size, D + 4]. A page has its tokens' codes, then their float32 scales.
    weights : Tensor, shape [B * next_n, H], float32
    context_lens : Tensor, shape [B] or [B, next_n], int32
        1-D: query j sees ``context_lens[b] - next_n + 1 + j`` keys. 2-D: of each query.
    block_table : Tensor, shape [>= B, max_blocks], int32
    schedule_meta : any
        Not used: the kernels share out their work by themselves.
    max_context_len : int
        Columns of the result.
    clean_logits : bool
        Accepted; the logits are always clean.
    logits_dtype : optional
        float32.

    Returns
    -------
    Tensor, shape [B * next_n, max_context_len], float32

    Raises
    ------
    TypeError
        If a dtype is not one of those above, or an argument has another type.
    ValueError
        If shapes do not match, or pages are too small.
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
    _check_bool(op, "clean_logits", clean_logits)
    _check_logits_dtype(op, logits_dtype)
    if type(context_lens) is paddle.Tensor and not context_lens.is_contiguous():
        context_lens = context_lens.contiguous()
    return paged_mqa_logits(q, kv_cache, weights, context_lens, block_table, max_context_len)


@functools.lru_cache(maxsize=64)
def _schedule(place: str, num_sms: int) -> Tensor:
    kind, _, number = place.partition(":")
    at = paddle.CPUPlace() if kind == "cpu" else paddle.CUDAPlace(int(number or 0))
    return paddle.to_tensor(np.zeros((num_sms + 1, 2), np.int32), place=at)


@unified
def get_paged_mqa_logits_metadata(
    context_lens: Tensor, block_kv: int, num_sms: int, indices: Any = None
) -> Tensor:
    """A schedule for :func:`fp8_paged_mqa_logits`, which does not use it.

    It has DeepGEMM's shape and dtype, and is the same tensor at every call, so that it costs
    nothing. Lengths are not read, and may all be 0.

    Parameters
    ----------
    context_lens : Tensor, shape [B] or [B, next_n], int32
    block_kv : int
        Tokens of a page.
    num_sms : int
        Rows of the result, less one.
    indices : optional
        Not used.

    Returns
    -------
    Tensor, shape [num_sms + 1, 2], int32
        Zeros, not to be written.

    Raises
    ------
    TypeError
        If `context_lens` is no tensor, or an int is none.
    ValueError
        If an int is not positive.

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
        raise TypeError(f"{op}: context_lens: expected a tensor, got {type(context_lens).__name__}")
    for name, value in (("block_kv", block_kv), ("num_sms", num_sms)):
        if type(value) is not int:
            raise TypeError(f"{op}: {name}: expected int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{op}: {name}: expected at least 1, got {value}")
    if type(context_lens) is not paddle.Tensor:  # of a program
        return paddle.zeros([num_sms + 1, 2], "int32")
    place = context_lens.place
    name = f"gpu:{place.gpu_device_id()}" if place.is_gpu_place() else "cpu"
    return _schedule(name, num_sms)


@functools.lru_cache(maxsize=1)
def get_num_sms() -> int:
    """Multiprocessors of the first GPU; 1 where there is none.

    Examples
    --------
    >>> from fastattn.compat import deep_gemm
    >>> deep_gemm.get_num_sms() >= 1
    True
    """
    if not paddle.is_compiled_with_cuda() or paddle.device.cuda.device_count() == 0:
        return 1
    return int(paddle.device.cuda.get_device_properties(0).multi_processor_count)

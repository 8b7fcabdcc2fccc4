"""Sparse attention over caches of multi-head latent attention (MLA)."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import scale_of
from fastattn.functional._marker import unified


def _indices_of_extra(op: str, q: Any, indices: Any) -> Any:
    """Indices of a second cache; None for [T, 0], because the operator takes no empty tensor."""
    if indices is None:
        raise TypeError(f"{op}: extra_indices: expected a tensor with extra_cache, got None")
    if not _ops.is_tensor(indices) or 0 not in indices.shape or not _ops.is_tensor(q):
        return indices
    return None if list(indices.shape) == [*q.shape[:1], 0] else indices


def call(
    keys: tuple[Any, ...],
    extra: tuple[Any, ...],
    more: tuple[Any, ...],
    formats: tuple[str, str | None],
    page_sizes: tuple[int | None, int | None],
    softmax_scale: float | None,
    flags: tuple[bool, bool, bool],
    out_dtype: str = "bfloat16",
) -> tuple[Tensor, Any, Any]:
    """Call the operator.

    Parameters
    ----------
    keys : tuple of q, cache, indices, topk_length and scale
    extra : the same for a second cache
    more : tuple of sinks and out
    formats, page_sizes : for both caches
    flags : whether to return the LSE, whether to return the largest logits, and whether both have
        FlashMLA's form: shape [T, H], and an LSE of +inf for a query without a key

    Returns
    -------
    out, softmax_lse, max_logits : Tensor
        Results that were not requested have undefined contents.
    """
    op = "mla_sparse_attention"
    cache_format, extra_format = formats
    page_size, extra_page_size = page_sizes
    if extra[0] is not None:
        extra = (extra[0], _indices_of_extra(op, keys[0], extra[1]), *extra[2:])
    attrs = (
        cache_format,
        cache_format if extra_format is None else extra_format,
        0 if page_size is None else page_size,
        0 if extra_page_size is None else extra_page_size,
        scale_of(op, softmax_scale),
        *flags,
        out_dtype,
    )
    result, lse, max_logits, *_ = _ops.call(op, (*keys, *extra, *more), attrs)
    return result, lse, max_logits


@unified
def mla_sparse_attention(
    q: Tensor,
    cache: Tensor,
    indices: Tensor,
    *,
    cache_format: str,
    topk_length: Tensor | None = None,
    extra_cache: Tensor | None = None,
    extra_indices: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    extra_cache_format: str | None = None,
    scale: Tensor | None = None,
    extra_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    softmax_scale: float | None = None,
    page_size: int | None = None,
    extra_page_size: int | None = None,
    return_softmax_lse: bool = False,
    return_max_logits: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "bfloat16",
) -> Any:
    r"""Attention of each query over the tokens of latent caches that its indices name, for all
    heads.

    .. math:: s_{thj} = \lambda q_{th} \cdot k_j, \qquad
              o_{th} = \frac{\sum_j e^{s_{thj}} v_j}{e^{\mathrm{sink}_h} + \sum_j e^{s_{thj}}}

    over the tokens j at the slots ``indices[t, :topk_length[t]]`` of `cache` and, in the same
    softmax, ``extra_indices[t, :extra_topk_length[t]]`` of `extra_cache`. A key :math:`k_j` has all
    channels of a token, dequantised with its own scale. Its value :math:`v_j` is the first 512.
    Prefill, decode and draft tokens are treated alike: the indices of a query determine what it
    sees.

    Slot s is row ``s % page_size`` of page ``s // page_size``. A slot outside the cache, such as
    -1, is skipped and never read. A slot that occurs twice counts twice. A query without a key has
    an output of 0, even with a sink, and an LSE of -inf. A NaN in a query head, or in a token that
    the query sees, makes the output of this head NaN, and of no other.

    Parameters
    ----------
    q : Tensor, shape [T, H, 576] or [T, H, 512], bfloat16
        1 to 128 heads. Channels as in the caches: latent channels, then rotated ones. Any token and
        head stride.
    cache : Tensor, bfloat16 ("bf16") or uint8
        As for :func:`mla_write_cache`. Rows of a "bf16" cache have the channels of `q`. Rows of an
        "fp8" or "fp8_656" cache have 576, rows of an "fp8_584" or "fp8_528" cache have 512.
        Contiguous keys of a prefill, [N, 576], are passed as pages: ``keys.unsqueeze(0)``.
    indices : Tensor, shape [T, topk], int32
        Slots of `cache`, in any order. Any row stride.
    cache_format : {"bf16", "fp8", "fp8_656", "fp8_584", "fp8_528"}
        As for :func:`mla_gather_cache`.
    topk_length : Tensor, shape [T], int32, optional
        Number of indices of each query that count, from the first on; clamped to [0, topk].
        Default: all.
    extra_cache : Tensor, optional
        A second cache, such as the compressed tokens next to the window's tokens (V4). Its page
        size may differ.
    extra_indices : Tensor, shape [T, extra_topk], int32, optional
        Slots of `extra_cache`. With the shape [T, 0] the second cache is left out.
    extra_topk_length : Tensor, shape [T], int32, optional
    extra_cache_format : str, optional
        Default: `cache_format`. Both caches must have the same channels. Calls with two formats,
        calls with "fp8_528", and GPUs other than Hopper use a kernel without tensor cores.
    scale, extra_scale : Tensor, shape [1], float32, optional
        Dequantisation multiplier of an "fp8" cache.
    sinks : Tensor, shape [H], float32, optional
        A logit for each head. It counts in the denominator, but has no value.
    softmax_scale : float, optional
        :math:`\lambda`. Default: ``q.shape[-1] ** -0.5``. Models pass the scale of a head before
        absorption, such as ``192 ** -0.5``.
    page_size, extra_page_size : int, optional
        Tokens of a page; needed for a cache of two dimensions.
    return_softmax_lse, return_max_logits : bool
        Also return the LSE or the largest logits. With the latter a GPU does not split the keys of
        a query, so steps with few queries are slower.
    out : Tensor, shape [T, H, 512], optional
        Its dtype is `out_dtype`. Written in place and returned.
    out_dtype : {"bfloat16", "float32"}
        "float32" does not round the output, for a later merge with results over other keys. Hopper
        GPUs then split the keys of every query, through an fp32 workspace. With `return_max_logits`
        as well they use a kernel without tensor cores.

    Returns
    -------
    out : Tensor, shape [T, H, 512]
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm of the denominator without the sink, as :func:`merge_attn_states` takes
        it. Only with `return_softmax_lse`.
    max_logits : Tensor, shape [H, T], float32
        Largest :math:`s_{thj}` of each query head; -inf without a key. NaN if the LSE is NaN,
        because a score is NaN or +inf. Only with `return_max_logits`.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype, or "fp8" has no scale.
    ValueError
        If shapes, places or strides do not match, the channels do not match the format, or `out`
        shares memory with an input. Also if queries, rows or pages do not start at multiples of 16
        bytes on a GPU.
    NotImplementedError
        If a format or the number of heads is not supported.

    See Also
    --------
    mla_write_cache : fills the cache.
    topk_to_slots, window_indices : make indices.
    fastattn.reference.mla_sparse_attention : the same in NumPy, in fp64.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mla_sparse_attention
    >>> keys = paddle.to_tensor([[1.0] * 576, [3.0] * 576]).astype("bfloat16")
    >>> out, lse = mla_sparse_attention(
    ...     paddle.zeros([2, 1, 576], "bfloat16"), keys.unsqueeze(0),
    ...     paddle.to_tensor([[0, 1], [-1, 7]], "int32"),
    ...     cache_format="bf16", return_softmax_lse=True,
    ... )
    >>> out[:, 0, 0].astype("float32").numpy().tolist(), lse[:, 1].tolist()
    ([2.0, 0.0], [-inf])
    """
    result, lse, max_logits = call(
        (q, cache, indices, topk_length, scale),
        (extra_cache, extra_indices, extra_topk_length, extra_scale),
        (sinks, out),
        (cache_format, extra_cache_format),
        (page_size, extra_page_size),
        softmax_scale,
        (return_softmax_lse, return_max_logits, False),
        out_dtype,
    )
    if not (return_softmax_lse or return_max_logits):
        return result
    return (result, *(lse,) * return_softmax_lse, *(max_logits,) * return_max_logits)

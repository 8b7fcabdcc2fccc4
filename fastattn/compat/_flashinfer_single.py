"""FlashInfer's attention of one request over contiguous keys."""

from __future__ import annotations

from typing import Any

from paddle import Tensor

from fastattn.compat._flashinfer_wrapper import LN2, check_layout, check_position
from fastattn.compat._paged import progression, refuse, refuse_given, require_tensors
from fastattn.functional import flash_attention

_MASK = (
    "not supported for one request; write fastattn.functional.flash_attention with mask_offsets, "
    "or BatchPrefillWithPagedKVCacheWrapper.plan(custom_mask=..)"
)


def _single(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str,
    scales: dict[str, float | None],
    window_left: int,
    return_lse: bool,
    options: dict[str, Any],
) -> Any:
    """Attention of queries [T, H, D], the last of which sees the last key."""
    check_layout(op, kv_layout)
    for name, tensor in (("k", k), ("v", v)):
        if len(tensor.shape) != 3:
            text = "[kv_len, KV, D]" if kv_layout == "NHD" else "[KV, kv_len, D]"
            raise ValueError(f"{op}: {name}: expected shape {text}, got {list(tensor.shape)}")
    for name, value in scales.items():
        if value is not None and not isinstance(value, (int, float)):
            refuse(op, name, "a tensor; write a float")
    q_scale, k_scale, v_scale = (1.0 if x is None else float(x) for x in scales.values())
    if v_scale != 1:
        refuse(op, [*scales][2], f"not supported; write the result * {v_scale}")
    if kv_layout == "HND":
        k, v = k.transpose([1, 0, 2]).contiguous(), v.transpose([1, 0, 2]).contiguous()
    tokens, keys = int(q.shape[0]), int(k.shape[0])
    sm_scale, softcap = options.pop("sm_scale"), options.pop("logits_soft_cap")
    scale = q.shape[2] ** -0.5 if sm_scale is None else float(sm_scale)
    result = flash_attention(
        q,
        k,
        v,
        progression(0, tokens, 2, "int32", q),
        progression(0, keys, 2, "int32", q),
        tokens,
        keys,
        softmax_scale=scale * q_scale * k_scale,
        window_size=(window_left, -1),
        softcap=0.0 if softcap is None else max(float(softcap), 0.0),
        return_softmax_lse=return_lse,
        **options,
    )
    if not return_lse:
        return result
    return result[0], result[1].transpose([1, 0]) * (1 / LN2)


def single_decode_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: float | None = None,
    k_scale: float | None = None,
    v_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of one query over the contiguous keys of one request.

    Parameters
    ----------
    q : Tensor, shape [H, D], bfloat16 or float16 (float32 on a CPU)
    k, v : Tensor, shape [kv_len, KV, D] ("NHD") or [KV, kv_len, D] ("HND", which is copied)
    kv_layout : {"NHD", "HND"}
    pos_encoding_mode : "NONE"
    q_scale, k_scale : float, optional
        Factors of the logits, floats.
    v_scale : None or 1
    window_left : int
        Number of keys before the last one that stay visible; -1 means unlimited.
    logits_soft_cap : float, optional
    sm_scale : float, optional
        Default: ``D ** -0.5``.
    return_lse : bool
        Return (out, lse). lse has the shape [H] and base 2.
    use_tensor_cores, rope_scale, rope_theta
        Not used.

    Returns
    -------
    Tensor, shape [H, D]

    Raises
    ------
    NotImplementedError
        For rotation in the attention, and another `v_scale` than 1.
    TypeError, ValueError
        As :func:`fastattn.functional.flash_attention`.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import single_decode_with_kv_cache
    >>> k = paddle.ones([5, 1, 64])
    >>> out, lse = single_decode_with_kv_cache(paddle.zeros([4, 64]), k, 3 * k, return_lse=True)
    >>> out[:, 0].tolist(), round(2 ** lse[0].item(), 3)
    ([3.0, 3.0, 3.0, 3.0], 5.0)
    """
    op = "single_decode_with_kv_cache"
    require_tensors(op, q=q, k=k, v=v)
    check_position(op, pos_encoding_mode)
    if len(q.shape) != 2:
        raise ValueError(f"{op}: q: expected shape [H, D], got {list(q.shape)}")
    scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
    options = {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap, "causal": False}
    result = _single(op, q.unsqueeze(0), k, v, kv_layout, scales, window_left, return_lse, options)
    return tuple(x[0] for x in result) if return_lse else result[0]


def single_prefill_with_kv_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale_q: float | None = None,
    scale_k: float | None = None,
    scale_v: float | None = None,
    o_dtype: Any = None,
    custom_mask: Tensor | None = None,
    packed_custom_mask: Tensor | None = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
) -> Any:
    """Attention of the queries of one request over its contiguous keys.

    Parameters
    ----------
    q : Tensor, shape [qo_len, H, D], bfloat16 or float16 (float32 on a CPU)
        They belong to the last keys.
    k, v, kv_layout, pos_encoding_mode, window_left, logits_soft_cap, sm_scale
        As for :func:`single_decode_with_kv_cache`.
    scale_q, scale_k : float, optional
        Factors of the logits.
    scale_v : None or 1
    causal : bool
        The last query sees the last key.
    custom_mask, packed_custom_mask, o_dtype : None
    return_lse : bool
        Return (out, lse). lse has the shape [qo_len, H] and base 2.
    use_fp16_qk_reduction, rope_scale, rope_theta, backend
        Not used.

    Returns
    -------
    Tensor, shape [qo_len, H, D]

    Raises
    ------
    NotImplementedError
        For an argument that must be None, rotation in the attention, and another `scale_v` than 1.
    TypeError, ValueError
        As :func:`fastattn.functional.flash_attention`.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import single_prefill_with_kv_cache
    >>> k = paddle.ones([5, 1, 64])
    >>> q = paddle.zeros([2, 4, 64])
    >>> _, lse = single_prefill_with_kv_cache(q, k, k, causal=True, return_lse=True)
    >>> [round(2**x) for x in lse[:, 0].tolist()]  # keys that each query sees
    [4, 5]
    """
    op = "single_prefill_with_kv_cache"
    require_tensors(op, q=q, k=k, v=v)
    check_position(op, pos_encoding_mode)
    instead = {"custom_mask": _MASK, "packed_custom_mask": _MASK}
    instead["o_dtype"] = "not supported; write the result's astype"
    masks = {"custom_mask": custom_mask, "packed_custom_mask": packed_custom_mask}
    refuse_given(op, instead, **masks, o_dtype=o_dtype)
    if len(q.shape) != 3:
        raise ValueError(f"{op}: q: expected shape [qo_len, H, D], got {list(q.shape)}")
    scales = {"scale_q": scale_q, "scale_k": scale_k, "scale_v": scale_v}
    options = {"sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap, "causal": bool(causal)}
    return _single(op, q, k, v, kv_layout, scales, window_left, return_lse, options)

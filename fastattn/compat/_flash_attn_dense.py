"""flash-attn's function for sequences of one length; those for packed tensors are refused."""

from __future__ import annotations

from typing import Any, NoReturn

from paddle import Tensor

from fastattn._views import view
from fastattn.compat._flash_attn_checks import INSTEAD, check_common, check_number, window_of
from fastattn.compat._paged import progression, refuse, refuse_given, require_tensors
from fastattn.functional import flash_attention
from fastattn.functional._marker import unified


def _rows(op: str, **tensors: Tensor) -> list[Tensor]:
    """Each tensor [B, S, heads, D] as the ragged [B * S, heads, D]."""
    found = []
    for name, tensor in tensors.items():
        shape = list(tensor.shape)
        if len(shape) != 4:
            raise ValueError(f"{op}: {name}: expected shape [B, S, heads, D], got {shape}")
        rows = shape[0] * shape[1]
        whole = tensor if tensor.is_contiguous() else tensor.contiguous()
        found.append(view(whole, [rows, *shape[2:]]))
    return found


@unified
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] | None = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Any:
    """Attention of sequences of one length, in dygraph.

    Positional arguments are in the order of flash-attn 2. This is
    :func:`fastattn.functional.flash_attention` with lengths that are the same for all sequences.

    Parameters
    ----------
    q : Tensor, shape [B, S, H, D], bfloat16 or float16 (float32 on a CPU)
    k, v : Tensor, shape [B, S_k, KV, D]
        A tensor that is not contiguous, such as a part of a packed one, is copied.
    dropout_p : float
        Must be 0.
    softmax_scale : float, optional
        Default: ``D ** -0.5``.
    causal : bool
        The last query sees the last key.
    window_size : (int, int), optional
        Number of keys before and after a query's position that stay visible; -1 means unlimited.
    softcap : float
        Bound of the logits; 0 means none.
    alibi_slopes : None
    deterministic : bool
        Not used, because the result is always deterministic.
    return_attn_probs : bool
        Return (out, softmax_lse, None), as flash-attn 2 does without dropout.

    Returns
    -------
    out : Tensor, shape [B, S, H, D]
    softmax_lse : Tensor, shape [B, H, S], float32
        Natural logarithm; -inf for a query that sees no key (flash-attn 2: +inf).

    Raises
    ------
    NotImplementedError
        For dropout and `alibi_slopes`.
    TypeError, ValueError
        As :func:`fastattn.functional.flash_attention`; also for arguments in the positions of
        another package.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flash_attn import flash_attn_func
    >>> x = paddle.ones([2, 3, 1, 64])
    >>> flash_attn_func(x, x, 2 * x, causal=True)[1, :, 0, 0].tolist()
    [2.0, 2.0, 2.0]
    """
    op = "flash_attn_func"
    require_tensors(op, q=q, k=k, v=v)
    check_number(op, "dropout_p", dropout_p, 0, INSTEAD["dropout_p"])
    check_common(op, causal, softmax_scale)
    refuse_given(op, INSTEAD, alibi_slopes=alibi_slopes)
    rows, key_rows, value_rows = _rows(op, q=q, k=k, v=v)
    batch, queries, heads, _ = (int(n) for n in q.shape)
    keys = int(k.shape[1])
    for name, tensor in (("k", k), ("v", v)):
        if list(tensor.shape[:2]) != [batch, keys]:
            raise ValueError(
                f"{op}: {name}: expected {batch} sequences of {keys} keys, got {list(tensor.shape)}"
            )
    result = flash_attention(
        rows,
        key_rows,
        value_rows,
        progression(0, queries, batch + 1, "int32", q),
        progression(0, keys, batch + 1, "int32", q),
        queries,
        keys,
        softmax_scale=softmax_scale,
        causal=bool(causal),
        window_size=window_of(window_size),
        softcap=softcap,
        return_softmax_lse=return_attn_probs,
    )
    out = result[0] if return_attn_probs else result
    out = view(out, [batch, queries, heads, int(out.shape[-1])])
    if not return_attn_probs:
        return out
    return out, view(result[1], [heads, batch, queries]).transpose([1, 0, 2]), None


def _packed(op: str, name: str, line: str) -> NoReturn:
    refuse(op, name, f"packed tensors are not taken apart here; write {line}")


def flash_attn_qkvpacked_func(qkv: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse a packed `qkv`, and name the call to write. `args` and `kwargs` are as there."""
    line = "flash_attn_func(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], ..)"
    _packed("flash_attn_qkvpacked_func", "qkv", line)


def flash_attn_kvpacked_func(q: Any, kv: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse a packed `kv`, and name the call to write. `q`, `args`, `kwargs` are as there."""
    _packed("flash_attn_kvpacked_func", "kv", "flash_attn_func(q, kv[:, :, 0], kv[:, :, 1], ..)")


def flash_attn_varlen_qkvpacked_func(
    qkv: Any, cu_seqlens: Any, max_seqlen: Any, *args: Any, **kwargs: Any
) -> NoReturn:
    """Refuse a packed `qkv`, and name the call to write: `cu_seqlens` and `max_seqlen` twice.

    `args` and `kwargs` are as there.
    """
    line = "flash_attn_varlen_func(qkv[:, 0], qkv[:, 1], qkv[:, 2], cu_seqlens, cu_seqlens, "
    _packed("flash_attn_varlen_qkvpacked_func", "qkv", f"{line}max_seqlen, max_seqlen, ..)")


def flash_attn_varlen_kvpacked_func(q: Any, kv: Any, *args: Any, **kwargs: Any) -> NoReturn:
    """Refuse a packed `kv`, and name the call to write. `q`, `args`, `kwargs` are as there."""
    line = "flash_attn_varlen_func(q, kv[:, 0], kv[:, 1], ..)"
    _packed("flash_attn_varlen_kvpacked_func", "kv", line)

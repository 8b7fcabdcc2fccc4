"""FlashInfer's functions outside its wrappers: they write pages and merge partial results."""

from __future__ import annotations

from typing import Any

import paddle
from paddle import Tensor

from fastattn.compat._flashinfer_wrapper import LN2, caches_as_blocks, check_layout
from fastattn.compat._paged import (
    BLOCK_SIZE,
    dtype_name,
    progression,
    refuse,
    refuse_given,
    require_tensors,
)
from fastattn.functional import merge_attn_states, merge_many_attn_states, write_cache_kv


def append_paged_kv_cache(
    append_key: Tensor,
    append_value: Tensor,
    batch_indices: Tensor,
    positions: Tensor,
    paged_kv_cache: Any,
    kv_indices: Tensor,
    kv_indptr: Tensor,
    kv_last_page_len: Tensor,
    kv_layout: str = "NHD",
) -> None:
    """Write K and V of new tokens into a 16-bit paged cache, in place.

    Parameters
    ----------
    append_key, append_value : Tensor, shape [T, KV, D], bfloat16 or float16
    batch_indices, positions : Tensor, shape [T], int32
        Sequence of each token, and its position in the sequence. A token of sequence -1 is skipped.
    paged_kv_cache : Tensor or (Tensor, Tensor)
        See the table of the module.
    kv_indices, kv_indptr : Tensor, int32
        The page table, with room for the new tokens.
    kv_last_page_len : Tensor
        Not used.
    kv_layout : {"NHD", "HND"}

    Raises
    ------
    NotImplementedError
        For 8-bit caches (use :func:`fastattn.functional.write_cache_kv`), pools with pages of more
        than 64 tokens, and other unsupported caches.
    TypeError, ValueError
        If dtypes or shapes do not match.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import append_paged_kv_cache
    >>> pool, x = paddle.zeros([2, 2, 64, 1, 64], "float16"), paddle.ones([2, 1, 64], "float16")
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> append_paged_kv_cache(
    ...     x, 2 * x, int32([0, 0]), int32([63, 64]), pool, int32([1, 0]), int32([0, 2]), int32([1])
    ... )
    >>> pool[1, 0, 63, 0, 0].item(), pool[0, 1, :2, 0, 0].tolist()
    (1.0, [2.0, 0.0])
    """
    op = "append_paged_kv_cache"
    check_layout(op, kv_layout)
    require_tensors(
        op, append_key=append_key, batch_indices=batch_indices, positions=positions,
        kv_indices=kv_indices, kv_indptr=kv_indptr,
    )  # fmt: skip
    blocks = caches_as_blocks(op, paged_kv_cache, kv_layout)
    if blocks.quant_type != "none":
        refuse(op, "paged_kv_cache", "8 bits; write_cache_kv quantises")
    if blocks.stride != blocks.per_page:
        refuse(op, "paged_kv_cache", "one pool with pages of more than 64 tokens; pass (k, v)")
    tokens = int(append_key.shape[0])
    page_size = blocks.per_page * BLOCK_SIZE
    # Each token is a sequence of its own whose table is its one block. The position of a token
    # without a sequence must not be looked up.
    positions = positions * (batch_indices >= 0).astype(positions.dtype)
    in_table = kv_indptr.gather(batch_indices.clip(min=0)) + positions // page_size
    block = kv_indices.gather(in_table) * blocks.stride + positions % page_size // BLOCK_SIZE
    unwritten = (batch_indices < 0).astype("int32")
    write_cache_kv(
        append_key,
        append_value,
        blocks.key,
        blocks.value,
        (block - (block + 1) * unwritten).unsqueeze(-1),
        progression(0, 1, tokens + 1, "int32", append_key),
        positions % BLOCK_SIZE,
        1 - unwritten,
    )


def get_seq_lens(kv_indptr: Tensor, kv_last_page_len: Tensor, page_size: int) -> Tensor:
    """Number of keys of each sequence of a page table.

    Parameters
    ----------
    kv_indptr : Tensor, shape [B + 1], int32
    kv_last_page_len : Tensor, shape [B], int32
    page_size : int

    Returns
    -------
    Tensor, shape [B], int32
        Equal to `kv_last_page_len` for a sequence without pages.

    Raises
    ------
    TypeError
        If an argument is not a tensor.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import get_seq_lens
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> get_seq_lens(int32([0, 2, 3]), int32([7, 64]), 64).tolist()
    [71, 64]
    """
    require_tensors("get_seq_lens", kv_indptr=kv_indptr, kv_last_page_len=kv_last_page_len)
    pages = kv_indptr[1:] - kv_indptr[:-1]
    return (pages - 1).clip(min=0) * page_size + kv_last_page_len


def get_batch_indices_positions(
    append_indptr: Tensor,
    seq_lens: Tensor,
    nnz: int,
    batch_indices: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sequence and position of each new token, as :func:`append_paged_kv_cache` takes them.

    Parameters
    ----------
    append_indptr : Tensor, shape [B + 1], int32
        Index of the first new token of each sequence.
    seq_lens : Tensor, shape [B], int32
        Number of keys of each sequence, including the new ones.
    nnz : int
        Number of entries of the result. Entries from ``append_indptr[-1]`` on belong to no
        sequence.
    batch_indices, positions : Tensor, shape [nnz], int32, optional
        Written in place and returned.

    Returns
    -------
    batch_indices : Tensor, shape [nnz], int32
        -1 for a token of no sequence.
    positions : Tensor, shape [nnz], int32
        0 for a token of no sequence (FlashInfer keeps the previous contents).

    Raises
    ------
    TypeError
        If an argument is not a tensor, a result's dtype is not int32, or `nnz` is not an int.
    ValueError
        If `seq_lens`, `batch_indices` or `positions` has another shape, or `nnz` is negative.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import get_batch_indices_positions
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> [x.tolist() for x in get_batch_indices_positions(int32([0, 1, 3]), int32([5, 9]), 4)]
    [[0, 1, 1, -1], [4, 7, 8, 0]]
    """
    op = "get_batch_indices_positions"
    require_tensors(op, append_indptr=append_indptr, seq_lens=seq_lens)
    if not isinstance(nnz, int):
        raise TypeError(f"{op}: nnz: expected int, got {type(nnz).__name__}")
    if nnz < 0:
        raise ValueError(f"{op}: nnz: expected 0 or more, got {nnz}")
    # A gather beyond the end of the tensor would destroy the context of a GPU.
    starts, lengths = list(append_indptr.shape), list(seq_lens.shape)
    if len(lengths) != 1 or starts != [lengths[0] + 1]:
        raise ValueError(
            f"{op}: seq_lens: expected shape [B] beside append_indptr [B + 1], got {lengths} "
            f"beside {starts}"
        )
    given = {"batch_indices": batch_indices, "positions": positions}
    for name, tensor in given.items():
        if tensor is not None:
            require_tensors(op, **{name: tensor})
            _check_dtype(op, name, tensor, "int32")
            if list(tensor.shape) != [nnz]:
                raise ValueError(f"{op}: {name}: expected shape [{nnz}], got {list(tensor.shape)}")
    tokens = progression(0, 1, nnz, "int32", append_indptr)
    if nnz == 0 or seq_lens.shape[0] == 0:
        found = [tokens * 0 - 1, tokens * 0]
    else:
        ends = append_indptr[1:].astype("int32")
        sequences = paddle.searchsorted(ends, tokens, out_int32=True, right=True)
        inside = (sequences < int(ends.shape[0])).astype("int32")
        rows = sequences * inside
        last = seq_lens.astype("int32").gather(rows) - ends.gather(rows)
        found = [rows - (1 - inside), (last + tokens) * inside]
    for index, tensor in enumerate(given.values()):
        if tensor is not None:
            tensor.copy_(found[index], True)
            found[index] = tensor
    return found[0], found[1]


def merge_state(v_a: Tensor, s_a: Tensor, v_b: Tensor, s_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial attentions of the same queries.

    Parameters
    ----------
    v_a, v_b : Tensor, shape [T, H, D], float32, float16 or bfloat16
    s_a, s_b : Tensor, shape [T, H]
        LSE in base 2.

    Returns
    -------
    v : Tensor, shape [T, H, D]
    s : Tensor, shape [T, H], float32

    Raises
    ------
    TypeError, ValueError
        As :func:`fastattn.functional.merge_attn_states`.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import merge_state
    >>> v, s = merge_state(*[paddle.ones([1, 1, 64]), paddle.zeros([1, 1])] * 2)
    >>> v[0, 0, 0].item(), round(s.item(), 4)
    (1.0, 1.0)
    """
    op = "merge_state"
    require_tensors(op, v_a=v_a, s_a=s_a, v_b=v_b, s_b=s_b)
    merged, lse = merge_attn_states(v_a, _natural(s_a), v_b, _natural(s_b))
    return merged, lse.transpose([1, 0]) * (1 / LN2)


def merge_state_in_place(
    v: Tensor, s: Tensor, v_other: Tensor, s_other: Tensor, mask: Tensor | None = None
) -> None:
    """Merge a partial attention into another one.

    Parameters
    ----------
    v, s : Tensor
        As `v_a` and `s_a` of :func:`merge_state`; `s` is float32. Written in place.
    v_other, s_other : Tensor
    mask : None

    Raises
    ------
    NotImplementedError
        For a mask.
    TypeError, ValueError
        As :func:`merge_state`.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import merge_state_in_place
    >>> v, s = paddle.ones([1, 1, 64]), paddle.zeros([1, 1])
    >>> merge_state_in_place(v, s, 3 * v, s.clone())
    >>> v[0, 0, 0].item(), round(s.item(), 4)
    (2.0, 1.0)
    """
    op = "merge_state_in_place"
    refuse_given(op, mask=mask)
    require_tensors(op, v=v, s=s, v_other=v_other, s_other=s_other)
    _check_dtype(op, "s", s, "float32")  # checked before `v` is written
    _, lse = merge_attn_states(v, _natural(s), v_other, _natural(s_other), output=v)
    s.copy_(lse.transpose([1, 0]) * (1 / LN2), True)


def merge_states(v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Merge any number of partial attentions of the same queries.

    Parameters
    ----------
    v : Tensor, shape [T, N, H, D], float32, float16 or bfloat16
    s : Tensor, shape [T, N, H]
        LSE in base 2.

    Returns
    -------
    v : Tensor, shape [T, H, D]
    s : Tensor, shape [T, H], float32

    Raises
    ------
    TypeError, ValueError
        As :func:`fastattn.functional.merge_many_attn_states`.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import merge_states
    >>> v, s = merge_states(paddle.ones([1, 4, 1, 64]), paddle.zeros([1, 4, 1]))
    >>> v[0, 0, 0].item(), round(s.item(), 4)
    (1.0, 2.0)
    """
    op = "merge_states"
    require_tensors(op, v=v, s=s)
    for name, tensor, rank in (("v", v, 4), ("s", s, 3)):
        if len(tensor.shape) != rank:
            raise ValueError(f"{op}: {name}: expected {rank} dimensions, got {list(tensor.shape)}")
    lses = (s.astype("float32") * LN2).transpose([1, 2, 0])
    merged, lse = merge_many_attn_states(v.transpose([1, 0, 2, 3]), lses)
    return merged, lse.transpose([1, 0]) * (1 / LN2)


def _check_dtype(op: str, name: str, tensor: Tensor, expected: str) -> None:
    if dtype_name(tensor.dtype) != expected:
        got = dtype_name(tensor.dtype)
        raise TypeError(f"{op}: {name}: expected dtype {expected}, got {got}")


def _natural(lse: Tensor) -> Tensor:
    """Convert an LSE [T, H] in base 2 to [H, T] in base e."""
    return (lse.astype("float32") * LN2).transpose([1, 0])

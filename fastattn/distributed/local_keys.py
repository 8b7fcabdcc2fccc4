"""The keys of each sequence that a rank holds, as attention over its cache sees them."""

from __future__ import annotations

import dataclasses
import numbers
from typing import Any

from paddle import Tensor

from fastattn._ops import is_tensor
from fastattn.functional import compact_block_tables
from fastattn.functional.attention import as_window


@dataclasses.dataclass(frozen=True)
class LocalKeys:
    """A rank's part of the keys of a step. :func:`dcp_local_keys` makes it.

    Attributes
    ----------
    block_tables : Tensor, shape [B, max_blocks], int32
        The rank's blocks that hold keys of a sequence, in order, then -1.
    seq_lens_decoder : Tensor, shape [B], int32
        The rank's keys of each sequence minus the new tokens, but at least 0.
    masks : Tensor, shape [T, 2], int32, or None
        Local keys that each query sees; None means all.
    shape : tuple of int
        Shape of the rank's whole table.
    num_tokens, num_blocks, block_size, causal, window_size
        The arguments of :func:`dcp_local_keys`.
    masked : bool
        Whether `mask_offsets` were given.
    """

    block_tables: Tensor
    seq_lens_decoder: Tensor
    masks: Tensor | None
    shape: tuple[int, ...]
    num_tokens: int
    num_blocks: int
    block_size: int
    causal: bool
    window_size: tuple[int, int]
    masked: bool


def dcp_local_keys(
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    *,
    num_tokens: int,
    num_blocks: int,
    block_size: int = 64,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    mask_offsets: Tensor | None = None,
) -> LocalKeys:
    """Find the keys of a step that this rank holds, for the calls of all layers.

    A call of :func:`paged_attention_dcp` or :func:`mla_attention_dcp` computes this itself if it is
    not given. It is the same for all layers with the same mask and number of blocks, so a server
    computes it once per step. The function exchanges nothing and does not wait on the host.

    Parameters
    ----------
    block_tables : Tensor, shape [B, max_blocks], int32
        This rank's table. An entry outside [0, num_blocks) is a block of another rank.
    cu_seqlens_q : Tensor, shape [B + 1], int32
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Lengths of the whole sequences.
    max_seqlen_q : int
        Largest number of new tokens of a sequence, or more. With 1 there are no masks: a sequence
        with more new tokens would see wrong keys.
    num_tokens : int
        T, the number of queries of the step, including padding.
    num_blocks : int
        Blocks of this rank's cache.
    block_size : int
        Tokens of a block, or of a page of a latent cache.
    causal, window_size, mask_offsets
        The arguments of the attention calls.

    Returns
    -------
    LocalKeys

    Raises
    ------
    TypeError, ValueError
        As :func:`fastattn.functional.compact_block_tables`.

    See Also
    --------
    fastattn.functional.compact_block_tables : the operator.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.distributed import dcp_local_block_tables, dcp_local_keys
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> table = int32(dcp_local_block_tables([[4, 1, 7]], rank=0, world_size=2))
    >>> seqs = table, int32([0, 1]), int32([150]), int32([1])
    >>> local = dcp_local_keys(*seqs, max_seqlen_q=1, num_tokens=1, num_blocks=9)
    >>> local.block_tables.tolist(), local.seq_lens_decoder.tolist()
    ([[4, 7, -1]], [86])
    """
    # The only new token of a sequence is its last token: it sees all of the rank's keys.
    if not isinstance(max_seqlen_q, numbers.Integral) or isinstance(max_seqlen_q, bool):
        kind = type(max_seqlen_q).__name__
        raise TypeError(f"dcp_local_keys: max_seqlen_q: expected int, got {kind}")
    if max_seqlen_q < 0:
        raise ValueError(f"dcp_local_keys: max_seqlen_q: expected at least 0, got {max_seqlen_q}")
    window_size = as_window("dcp_local_keys", window_size)
    want_masks = max_seqlen_q > 1 or window_size != (-1, -1) or mask_offsets is not None
    tables, lengths, masks = compact_block_tables(
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        num_tokens=num_tokens,
        num_blocks=num_blocks,
        block_size=block_size,
        causal=causal,
        window_size=window_size,
        mask_offsets=mask_offsets,
        want_masks=want_masks,
    )
    return LocalKeys(
        tables,
        lengths,
        masks,
        tuple(block_tables.shape),
        num_tokens,
        num_blocks,
        block_size,
        causal,
        window_size,
        mask_offsets is not None,
    )


def check_local_keys(op: str, local: Any, max_seqlen_q: int, expected: dict[str, Any]) -> LocalKeys:
    """Refuse `local` if it was made for other arguments, as far as the host can tell.

    Raises
    ------
    TypeError, ValueError
    """
    if not isinstance(local, LocalKeys):
        raise TypeError(f"{op}: local_keys: expected LocalKeys, got {type(local).__name__}")
    for name, value in expected.items():
        if getattr(local, name) != value:
            raise ValueError(
                f"{op}: local_keys: expected keys for {name} {value}, got {getattr(local, name)}"
            )
    if max_seqlen_q > 1 and local.masks is None:
        raise ValueError(f"{op}: local_keys: expected keys for max_seqlen_q > 1")
    return local


def local_call(
    op: str,
    local: LocalKeys | None,
    arguments: tuple[Any, ...],
    *,
    block_size: int,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    mask_offsets: Tensor | None = None,
) -> tuple[tuple[Any, ...], Tensor | None]:
    """Arguments and masks of a rank's attention over its own keys.

    Parameters
    ----------
    arguments : the last arguments of both attention operators
        Block tables, the three length arrays, max_seqlen_q and max_seqlen_k; queries and caches
        come before them.
    """
    *tensors, tables, cu_seqlens_q, cached, new, max_q, max_k = arguments
    q, cache = tensors[:2]
    facts = {
        "num_tokens": q.shape[0],
        "num_blocks": cache.shape[0],
        "block_size": block_size,
        "causal": causal,
    }
    if local is None:
        local = dcp_local_keys(
            *(tables, cu_seqlens_q, cached, new, max_q),
            **facts,
            window_size=window_size,
            mask_offsets=mask_offsets,
        )
    else:
        facts["window_size"] = as_window(op, window_size)
        facts["masked"] = mask_offsets is not None
        if is_tensor(tables):
            facts["shape"] = tuple(tables.shape)
        local = check_local_keys(op, local, max_q, facts)
    lengths = (cu_seqlens_q, local.seq_lens_decoder, new, max_q, max_k)
    return (*tensors, local.block_tables, *lengths), local.masks

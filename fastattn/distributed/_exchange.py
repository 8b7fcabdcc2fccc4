"""What a group of ranks does with partial results: gather and merge them, on every rank alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from fastattn import env
from fastattn._ops import is_tensor
from fastattn.functional import merge_attn_states
from fastattn.functional._partial import dtype_name, empty


def ranks_of(op: str, group: Any) -> int:
    """Number of ranks of a group, None for all of them, of which this process must be one."""
    if group is None:
        world_size = int(dist.get_world_size())
        if world_size > 1 and not dist.is_initialized():
            raise RuntimeError(
                f"{op}: this is one of {world_size} processes: call "
                "paddle.distributed.init_parallel_env() first"
            )
        return world_size
    if not isinstance(getattr(group, "nranks", None), int):
        raise TypeError(
            f"{op}: group: expected a group of paddle.distributed, got {type(group).__name__}"
        )
    # group.rank is -1 in a group of one rank, too.
    if dist.get_rank() not in group.ranks:
        raise ValueError(f"{op}: group: this process is not in it, ranks {list(group.ranks)}")
    return int(group.nranks)


def check_place_of_result(op: str, out: Tensor | None, inputs: Iterable[Any]) -> None:
    """Refuse an `out` that another operator than the caller's would write wrongly, or over inputs.

    Raises
    ------
    ValueError
        If `out` is not contiguous, or shares memory with an input.
    """
    if out is None or 0 in out.shape or not paddle.in_dynamic_mode():
        return
    if not out.is_contiguous():
        raise ValueError(f"{op}: out: expected a contiguous tensor")
    first, last = _span(out)
    for tensor in inputs:
        if not is_tensor(tensor) or 0 in tensor.shape:
            continue
        begin, end = _span(tensor)
        if begin < last and first < end:
            raise ValueError(f"{op}: out: shares memory with an input")


def store(result: Any, out: Tensor) -> Any:
    """`result`, of a single rank, in `out`, as a merge of several ranks would leave it there.

    Operators leave what tokens of no sequence have in an `out` of the caller; a merge knows no
    sequences and makes 0 of it, and so does a new result.
    """
    fresh, *lse = result if isinstance(result, (list, tuple)) else (result,)
    out.copy_(fresh, False)
    return (out, *lse) if lse else out


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses of a tensor's first byte and behind its last one."""
    reach = [(size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides)]
    begin = tensor.data_ptr() + tensor.element_size() * sum(x for x in reach if x < 0)
    items = sum(abs(x) for x in reach) + 1
    return begin, begin + tensor.element_size() * items


def _gather(partial: Tensor, world_size: int, group: Any) -> list[Tensor]:
    """`partial` of every rank, in the order of the ranks: views of one buffer."""
    if env.log_level() > 1:
        from fastattn import _log

        _log.LOGGER.debug("all_gather among %d ranks: %s", world_size, _log.describe(partial))
    size, *rest = partial.shape
    buffer = empty([world_size * size, *rest], partial.dtype, partial.place)
    # On a GPU the collective runs on the stream of the kernels around it, so that the host does not
    # wait and a CUDA graph can capture it.
    dist.stream.all_gather(
        buffer, partial, group=group, sync_op=True, use_calc_stream=partial.place.is_gpu_place()
    )
    return [buffer[rank * size : (rank + 1) * size] for rank in range(world_size)]


def partial_dtype(exchange_dtype: str, dtype: str) -> str:
    """Type of partial results for one of the whole of type `dtype`."""
    return "float32" if exchange_dtype == "float32" else dtype


def gather_states(
    partial: Tensor, partial_lse: Tensor, world_size: int, group: Any
) -> list[tuple[Tensor, Tensor]]:
    """Partial results of every rank with their LSEs, in the order of the ranks."""
    lses = _gather(partial_lse, world_size, group)
    return list(zip(_gather(partial, world_size, group), lses))


def merge_all(
    states: list[tuple[Tensor, Tensor]],
    sinks: Tensor | None,
    dtype: str,
    out: Tensor | None,
    out_scale: Tensor | None,
    *,
    in_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The whole's result and LSE; `in_lse` tells whether the LSE counts sinks."""
    if sinks is None:
        return _merge(states, dtype, out, out_scale)
    return _merge_with_sinks(states, sinks, dtype, out, out_scale, in_lse=in_lse)


def _merge(
    states: list[tuple[Tensor, Tensor]],
    dtype: str,
    out: Tensor | None,
    out_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Merge all states in order, into the first; the last merge stores the result."""
    result, lse = states[0]
    for partial, partial_lse in states[1:-1]:
        merge_attn_states(result, lse, partial, partial_lse, output=result, output_lse=lse)
    if out is None and out_scale is None:
        same = dtype_name(result.dtype) == dtype
        out = result if same else empty(result.shape, getattr(paddle, dtype), result.place)
    partial, partial_lse = states[-1]
    result, _ = merge_attn_states(
        result, lse, partial, partial_lse, output=out, output_lse=lse, output_scale=out_scale
    )
    return result, lse


def _merge_with_sinks(
    states: list[tuple[Tensor, Tensor]],
    sinks: Tensor,
    dtype: str,
    out: Tensor | None,
    out_scale: Tensor | None,
    *,
    in_lse: bool,
) -> tuple[Tensor, Tensor]:
    """As :func:`_merge`; the sinks are one more state, with an output of 0.

    No rank can add them to its own partial result: they would be lost where it holds no key.
    `in_lse` tells whether the returned LSE counts them.
    """
    result, lse = states[0]
    tokens, heads, _ = result.shape
    for partial, partial_lse in states[1:]:
        merge_attn_states(result, lse, partial, partial_lse, output=result, output_lse=lse)
    keys_lse = lse.clone()
    sink_lse = sinks.astype("float32").unsqueeze(1).expand([heads, tokens])
    states = [(result, lse), (paddle.zeros_like(result), sink_lse)]
    result, lse = _merge(states, dtype, out, out_scale)
    if not in_lse:
        return result, keys_lse
    # Where a query sees no key, the LSE is -inf in spite of the sinks, as on one rank.
    return result, paddle.where(keys_lse == -math.inf, keys_lse, lse)


def check_call(op: str, exchange_dtype: str) -> None:
    """Refuse what no exchange can do, before anything runs."""
    if not paddle.in_dynamic_mode():
        raise NotImplementedError(f"{op}: its collectives run in dygraph only")
    if exchange_dtype not in ("float32", "output"):
        raise ValueError(
            f"{op}: exchange_dtype: expected float32 or output, got {exchange_dtype!r}"
        )

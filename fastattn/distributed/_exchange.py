"""Exchange of partial results in a group of ranks: every rank gathers and merges them alike."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import paddle
import paddle.distributed as dist
from paddle import Tensor

from fastattn import env
from fastattn._views import strided_view, view
from fastattn.functional import merge_many_attn_states
from fastattn.functional._partial import check_apart, dtype_name, empty

_LOGS_CALLS = env.log_level() > 1


def ranks_of(op: str, group: Any) -> int:
    """Number of ranks of a group that this process belongs to; None means all ranks."""
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
    # In a group of one rank, group.rank is -1 too.
    if dist.get_rank() not in group.ranks:
        raise ValueError(f"{op}: group: this process is not in it, ranks {list(group.ranks)}")
    return int(group.nranks)


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def named(
    function: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Arguments of a call with their names."""
    yield from zip(_parameters(function), arguments)
    yield from options.items()


def check_place_of_result(op: str, out: Tensor | None, inputs: Iterable[tuple[str, Any]]) -> None:
    """Refuse an `out` that the merge would write wrongly, or that shares memory with an input.

    Raises
    ------
    ValueError
        If `out` is not contiguous, or shares memory with an input.
    """
    if out is None or 0 in out.shape or not paddle.in_dynamic_mode():
        return
    if not out.is_contiguous():
        raise ValueError(f"{op}: out: expected a contiguous tensor")
    check_apart(op, out, inputs)


def store(result: Any, out: Tensor) -> Any:
    """Store the result of a single rank in `out` as a merge of several ranks would.

    An operator leaves the tokens of no sequence in a given `out` as they are. A merge knows no
    sequences and writes 0 for them, and a new result has 0 there too.
    """
    fresh, *lse = result if isinstance(result, (list, tuple)) else (result,)
    out.copy_(fresh, False)
    return (out, *lse) if lse else out


def partial_dtype(exchange_dtype: str, dtype: str) -> str:
    """Dtype of the partial results of a call whose merged result has `dtype`."""
    return "float32" if exchange_dtype == "float32" else dtype


class Exchange:
    """The exchange of partial results of one call: a buffer for this rank's own, and the gather of
    all.

    Outputs and LSEs in fp32 travel in one buffer, because the time of a collective in a decode step
    is its latency, whatever its size. 16-bit outputs and their LSEs travel apart.

    Parameters
    ----------
    shape : [T, H, D], of a partial output
    dtype : str, of partial outputs
    """

    def __init__(self, shape: list[int], dtype: str, place: Any, ranks: int, group: Any) -> None:
        tokens, heads, dim = shape
        self._shape, self._ranks, self._group = shape, ranks, group
        self._outputs = tokens * heads * dim
        self._lses = tokens * heads
        # The next rank's outputs begin at a multiple of 16 bytes.
        packed = dtype == "float32"
        self._slot = self._outputs + (-(-self._lses // 4) * 4 if packed else 0)
        self._place = place
        self._own = empty([self._slot], getattr(paddle, dtype), place)
        #: Buffer for this rank's partial output, shape [T, H, D].
        self.out = strided_view(self._own, shape, [heads * dim, dim, 1])

    def gather(self, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [N, T, H, D] and LSEs [N, H, T] of all N ranks, in their order.

        `lse` belongs to the partial output that :attr:`out` holds.
        """
        tokens, heads, dim = self._shape
        shapes = [self._ranks, tokens, heads, dim], [self._ranks, heads, tokens]
        strides = [self._slot, heads * dim, dim, 1], [self._slot, tokens, 1]
        if self._slot == self._outputs:
            lses = view(self._all_gather(view(lse, [self._lses])), shapes[1])
            return view(self._all_gather(self._own), shapes[0]), lses
        own = strided_view(self._own, shapes[1][1:], strides[1][1:], self._outputs)
        paddle._C_ops.assign_out_(lse, own)  # paddle.assign without argument checks
        slots = self._all_gather(self._own)
        lses = strided_view(slots, shapes[1], strides[1], self._outputs)
        return strided_view(slots, shapes[0], strides[0]), lses

    def _all_gather(self, own: Tensor) -> Tensor:
        """Gather `own` of all ranks, in the order of the ranks."""
        if _LOGS_CALLS:
            from fastattn import _log

            _log.LOGGER.debug("all_gather among %d ranks: %s", self._ranks, _log.describe(own))
        buffer = empty([self._ranks * own.shape[0]], own.dtype, self._place)
        # On a GPU the collective runs on the stream of the surrounding kernels. So the host does
        # not wait, and a CUDA graph can capture it.
        dist.stream.all_gather(
            buffer,
            own,
            group=self._group,
            sync_op=True,
            use_calc_stream=self._place.is_gpu_place(),
        )
        return buffer


def merge_ranks(
    states: tuple[Tensor, Tensor],
    sinks: Tensor | None,
    dtype: str,
    out: Tensor | None,
    out_scale: Tensor | None,
    *,
    in_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Merged output and LSE; `in_lse` tells whether the LSE counts sinks.

    No rank can add the sinks to its own partial result: a rank without keys would lose them.
    """
    outputs, lses = states
    if out is None and out_scale is None and dtype_name(outputs.dtype) != dtype:
        out = empty(outputs.shape[1:], getattr(paddle, dtype), outputs.place)
    return merge_many_attn_states(
        outputs, lses, sinks=sinks, output_scale=out_scale, output=out, sinks_in_lse=in_lse
    )


def check_call(op: str, exchange_dtype: str) -> None:
    """Refuse a call that no exchange can serve, before anything runs."""
    if not paddle.in_dynamic_mode():
        raise NotImplementedError(f"{op}: its collectives run in dygraph only")
    if exchange_dtype not in ("float32", "output"):
        raise ValueError(
            f"{op}: exchange_dtype: expected float32 or output, got {exchange_dtype!r}"
        )

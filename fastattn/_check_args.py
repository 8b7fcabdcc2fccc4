"""Contents of an operator's arguments on the host, for ``FASTATTN_CHECK``."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import numpy as np
import paddle
from numpy.typing import NDArray

Array = NDArray[Any]
Positions = NDArray[np.int64]


class Malformed(Exception):
    """The operator itself refuses the arguments, so there is nothing to check."""


class Arguments:
    """Arguments of a call, by name.

    Parameters
    ----------
    sig : OpSignature
    inputs, attrs : tuple
        As for :func:`fastattn._ops.call`.
    partial : bool
        Whether block tables may omit blocks that sequences need, with -1.
    clipped : bool
        Whether block tables may end before the sequences do.
    """

    def __init__(
        self,
        sig: Any,
        inputs: tuple[Any, ...],
        attrs: tuple[Any, ...],
        partial: bool,
        clipped: bool,
    ) -> None:
        if len(inputs) != len(sig.inputs) or len(attrs) != len(sig.attrs):
            raise Malformed
        self.op: str = sig.name
        self.partial = partial
        self.clipped = clipped
        self._inputs = dict(zip(sig.inputs, inputs))
        self._attrs = dict(zip(sig.attr_names, attrs))

    def refuse(self, name: str, expected: str, got: Any) -> NoReturn:
        raise ValueError(f"{self.op}: {name}: expected {expected}, got {got}")

    def has(self, name: str) -> bool:
        """Whether the operator has an input of that name, and it was given."""
        return self._inputs.get(name) is not None

    def tensor(self, name: str) -> Any:
        """A dygraph tensor."""
        value = self._inputs.get(name)
        if not isinstance(value, paddle.base.core.eager.Tensor):
            raise Malformed
        return value

    def number(self, name: str) -> int:
        """An attribute of type int."""
        value = self._attrs.get(name)
        if not isinstance(value, (int, np.integer)):
            raise Malformed
        return int(value)

    def shape(self, name: str, least: int = 1) -> list[int]:
        """Shape of a tensor with at least `least` dimensions."""
        shape = [int(n) for n in self.tensor(name).shape]
        if len(shape) < least:
            raise Malformed
        return shape

    def ints(self, name: str, dims: int | None = None) -> Array:
        """Values of an integer tensor; flat if `dims` is None."""
        tensor = self.tensor(name)
        if tensor.dtype not in (paddle.int32, paddle.int64):
            raise Malformed
        if dims is not None and len(tensor.shape) != dims:
            raise Malformed
        values: Array = tensor.numpy()
        return values.reshape(-1) if dims is None else values

    def floats(self, name: str) -> Array | None:
        """Values of a float tensor as fp32; None for another dtype."""
        tensor = self.tensor(name)
        if tensor.dtype == paddle.bfloat16:
            tensor = tensor.astype("float32")
        elif tensor.dtype not in (paddle.float32, paddle.float16):
            return None
        return np.asarray(tensor.numpy(), np.float32)


class Sequences(NamedTuple):
    """The sequences of a step as the operators see them."""

    tables: Array  # [B, max_blocks] or, where heads may have their own, [B, KV, max_blocks]
    starts: Positions  # [B]
    cached: Positions
    new: Positions
    end: Positions  # cached + new tokens; 0 for a sequence without new tokens

    def table_of(self, kv_head: int) -> Array:
        """Tables [B, max_blocks] of a KV head."""
        return self.tables[:, kv_head] if self.tables.ndim == 3 else self.tables

    def own(self, seq: int) -> slice:
        """Tokens of a sequence."""
        return slice(int(self.starts[seq]), int(self.starts[seq] + self.new[seq]))


def sequences(args: Arguments, tokens: int, *, head_tables: bool = False) -> Sequences:
    """The sequences of a step of `tokens` tokens, after a check of starts and lengths.

    `head_tables` permits a block table for each KV head.
    """
    own = head_tables and len(args.shape("block_tables")) == 3
    tables = args.ints("block_tables", 3 if own else 2)
    starts = args.ints("cu_seqlens_q").astype(np.int64)
    cached = args.ints("seq_lens_decoder").astype(np.int64)
    new = args.ints("seq_lens_this_time").astype(np.int64)
    count = len(starts) - 1
    if count < 0 or len(new) < count or len(cached) < count or len(tables) < count:
        raise Malformed
    tables, cached, new = tables[:count], cached[:count], new[:count]
    if (new < 0).any():
        seq = int(np.argmax(new < 0))
        args.refuse("seq_lens_this_time", f"at least 0 for sequence {seq}", new[seq])
    active = np.flatnonzero(new)
    for seq in active[cached[active] < 0][:1]:
        args.refuse("seq_lens_decoder", f"at least 0 for sequence {seq}", cached[seq])
    room = starts[1:] - starts[:-1]
    for seq in active[new[active] > room[active]][:1]:
        args.refuse(
            "cu_seqlens_q",
            f"{new[seq]} tokens from entry {seq} to the next, seq_lens_this_time of sequence {seq}",
            f"{starts[seq]} and {starts[seq + 1]}",
        )
    before = 0
    for seq in active.tolist():
        if not before <= starts[seq] <= tokens - new[seq]:
            text = f"a start in [{before}, {tokens - new[seq]}] for sequence {seq}"
            args.refuse("cu_seqlens_q", text, starts[seq])
        before = int(starts[seq] + new[seq])
    end = np.where(new > 0, cached + new, 0)
    return Sequences(tables, starts[:-1], cached, new, end)


def page_tokens(args: Arguments, cache: str = "cache", attr: str = "page_size") -> int:
    """Tokens per page of a latent cache, from its shape or an attribute."""
    shape = args.shape(cache, 2)
    size = args.number(attr) if len(shape) == 2 else 0
    if len(shape) > 2:
        size = shape[1] if len(shape) == 3 or shape[2] == 1 else shape[2]
    if size < 1:
        raise Malformed
    return size

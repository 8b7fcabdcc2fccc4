"""Metadata of a step: a stand-in for FastDeploy's ``ForwardMeta``, and functions that read one."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import paddle
from numpy.typing import NDArray

from fastattn._ops import is_tensor
from fastattn._table_checks import check_needed, check_writers
from fastattn.backends.known import FIELDS, PLAN_RECORD, SHARED_STEP
from fastattn.functional import plan_cascade
from fastattn.functional._attributes import as_int32, check_int
from fastattn.reference.layout import BLOCK_SIZE


class ForwardMode(IntEnum):
    """Kind of a step, with FastDeploy's names."""

    EXTEND = 1
    DECODE = 2
    MIXED = 3
    NATIVE = 4

    def is_prefill(self) -> bool:
        """Whether all sequences are prefill sequences."""
        return self == ForwardMode.EXTEND

    def is_decode(self) -> bool:
        """Whether all sequences are decoding."""
        return self == ForwardMode.DECODE

    def is_mixed(self) -> bool:
        """Whether sequences of all kinds may occur."""
        return self == ForwardMode.MIXED

    def is_native(self) -> bool:
        """Whether the framework's own operators must be used."""
        return self == ForwardMode.NATIVE


def optional(forward_meta: Any, name: str) -> Any:
    """Value of a field; None if it is absent."""
    if name not in FIELDS:
        raise AttributeError(f"forward_meta has no field {name!r}")
    return getattr(forward_meta, name, None)


def field(forward_meta: Any, name: str) -> Any:
    """Value of a field that a step must have.

    Raises
    ------
    ValueError
        If it is None. FastDeploy's object also returns None for a field that was never set.
    """
    value = optional(forward_meta, name)
    if value is None:
        raise ValueError(f"forward_meta.{name}: expected a value, got None")
    return value


def sequences(forward_meta: Any) -> tuple[Any, Any, Any, Any]:
    """Block tables, starts, cached and new lengths of a step's sequences, in operators' order.

    Block tables and cached lengths may cover all slots of the server, of which the first ones run;
    the operators ignore the others.

    Raises
    ------
    ValueError
        If one of them is None.
    """
    tables = getattr(forward_meta, "block_tables", None)
    starts = getattr(forward_meta, "cu_seqlens_q", None)
    cached = getattr(forward_meta, "seq_lens_decoder", None)
    new = getattr(forward_meta, "seq_lens_this_time", None)
    if tables is None or starts is None or cached is None or new is None:
        for name in ("block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time"):
            field(forward_meta, name)  # names the missing field
    return tables, starts, cached, new


def host_lengths(forward_meta: Any) -> tuple[int, int] | None:
    """(max_seqlen_q, max_seqlen_k) from the host's tensor of lengths, if it belongs to this step.

    In a CUDA graph they are unknown, because it may be replayed for longer sequences than at
    capture.
    """
    lengths = optional(forward_meta, "max_len_tensor_cpu")
    if lengths is None or optional(forward_meta, "step_use_cudagraph"):
        return None
    if lengths.place.is_gpu_place():
        raise ValueError("forward_meta.max_len_tensor_cpu: expected a tensor on the host")
    if len(lengths.shape) != 1 or lengths.shape[0] < 4:
        raise ValueError(
            f"forward_meta.max_len_tensor_cpu: expected shape [9], got {list(lengths.shape)}"
        )
    values = lengths.numpy()
    return (int(values[0]), int(values[3])) if values[0] > 0 else None


#: Number of new tokens from which on a sequence is long: ``kLongSeq`` of custom_ops/plan.
_LONG_SEQ = 64


def guess_new_tokens(tokens: int, seqs: int, decode_tokens: int, prefills: bool) -> int:
    """Estimate the new tokens of a step's longest sequence from what the host knows.

    A wrong estimate only costs time. A step without prefill has no more tokens than its sequences
    decode. That the server says so is not enough, because FastDeploy's draft models are never told
    of prefill. In other steps it is mostly one chunk beside sequences that decode a token each.

    Parameters
    ----------
    tokens : int
        Number of tokens of the step, including padding.
    seqs : int
        Number of sequences with lengths, with or without tokens.
    decode_tokens : int
        Maximum number of new tokens of a decoding sequence.
    prefills : bool
        Whether the server says that sequences are in prefill.
    """
    if not prefills and tokens <= seqs * decode_tokens:
        return min(tokens, decode_tokens)
    chunk = tokens - (seqs - 1)
    return chunk if decode_tokens == 1 and chunk >= _LONG_SEQ else tokens


#: Fields that a cascade plan depends on.
_PLANNED = (
    "block_tables",
    "cu_seqlens_q",
    "max_len_tensor_cpu",
    "seq_lens_decoder",
    "seq_lens_this_time",
)


class _Seen(NamedTuple):
    """Snapshot of a tensor that tells whether the tensor was written later."""

    tensor: Any
    version: int
    values: Any  # on the host only, because some writes of Paddle do not change the version

    @classmethod
    def of(cls, tensor: Any) -> _Seen:
        if not is_tensor(tensor) or not hasattr(tensor, "inplace_version"):
            return cls(tensor, 0, None)
        values = tensor.numpy().copy() if tensor.place.is_cpu_place() else None
        return cls(tensor, tensor.inplace_version, values)

    def differs(self, now: Any) -> bool:
        if now is not self.tensor:
            return True
        if self.version != getattr(now, "inplace_version", 0):
            return True
        return self.values is not None and not np.array_equal(self.values, now.numpy())


def _record_plan(forward_meta: Any, plan: Any) -> None:
    """Record the state of the fields that a plan was made for."""
    fields = {name: _Seen.of(optional(forward_meta, name)) for name in _PLANNED}
    own = [_Seen.of(x) for x in plan if is_tensor(x)]
    setattr(forward_meta, PLAN_RECORD, (plan, own, fields))


def current_plan(forward_meta: Any) -> Any:
    """The step's ``cascade_plan``, or None.

    A plan has its own lengths and blocks, so it is valid for one step only. The first call for a
    plan (or :meth:`ForwardMeta.for_step`) records the step's fields: the tensors, their numbers of
    writes and, on the host, their values (``max_len_tensor_cpu`` is always there). Steps of a CUDA
    graph are not checked, because they are written into the captured tensors together with their
    plan.

    Raises
    ------
    ValueError
        If lengths or block tables have changed since then, but the plan and its tensors have not.
    """
    plan = optional(forward_meta, "cascade_plan")
    if plan is None or optional(forward_meta, "step_use_cudagraph"):
        return plan
    if not isinstance(plan, tuple) or not paddle.in_dynamic_mode():
        return plan  # cascade_attention reports the error
    known, own, fields = getattr(forward_meta, PLAN_RECORD, None) or (None, [], {})
    if known is plan and not any(seen.differs(seen.tensor) for seen in own):
        for name, seen in fields.items():
            if seen.differs(optional(forward_meta, name)):
                raise ValueError(
                    f"forward_meta.cascade_plan: forward_meta.{name} has changed since the plan "
                    "was made; make one for every step"
                )
    else:
        _record_plan(forward_meta, plan)
    return plan


class OwnTable:
    """A step as a layer sees it that rotates by a table of its own."""

    def __init__(self, step: Any, table: Any) -> None:
        self._step, self.rotary_embs = step, table

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


class ForwardMeta:
    """Metadata of a step, for tests and for serving without FastDeploy.

    As in FastDeploy, every attribute exists and is None unless it was set. Backends therefore read
    it through :func:`field` and :func:`optional`.

    Parameters
    ----------
    **fields
        Attributes by name. :meth:`for_step` makes them from lengths.
    """

    def __init__(self, **fields: Any) -> None:
        self.forward_mode: Any = ForwardMode.MIXED
        self.rope_already_applied = False
        self.step_use_cudagraph = False
        self.is_dummy_or_profile_run = False
        self.pre_caches_length = 0
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the protocols of copy and pickle ask for such names
            raise AttributeError(name)
        setattr(self, name, None)
        return None

    def __getstate__(self) -> dict[str, Any]:
        """Attributes without the records of backends, which belong to this object."""
        return {k: v for k, v in self.__dict__.items() if k not in (PLAN_RECORD, SHARED_STEP)}

    @classmethod
    def for_step(
        cls,
        *,
        cached: Sequence[int],
        new: Sequence[int],
        block_tables: Any,
        caches: Sequence[Any],
        rotary_embs: Any = None,
        prefill: Sequence[bool] | None = None,
        num_tokens: int | None = None,
        shared_prefix_tokens: int = 0,
        place: Any = None,
        num_blocks: int | None = None,
        max_model_len: int | None = None,
        partial_tables: bool = False,
        **fields: Any,
    ) -> ForwardMeta:
        """Build the metadata of a step from a scheduler's lengths and block tables.

        Parameters
        ----------
        cached, new : sequence of int
            Number of cached and of new tokens of each sequence. ``new[b] = 0`` means an inactive
            sequence.
        block_tables : array of int, shape [B, max_blocks]
            Physical block of each group of 64 tokens of a sequence (of each page, for a latent
            cache); -1 for no block. Any integer dtype; the tensors are int32. Two sequences may
            share a block that both only read. Nothing has to be called to free a block: once no
            table of a later step names it, another sequence may write it.
        caches : sequence of Tensor
            ``2 * layer + {0: k, 1: v}``, or ``4 * layer + {k, v, k_scales, v_scales}`` for the
            dynamic types. Without a backend any list does: only its place and its number of blocks
            are read.
        rotary_embs : Tensor, optional
            See :func:`fastattn.functional.rope_write_cache_kv`.
        prefill : sequence of bool, optional
            Whether each sequence is in prefill. Default: sequences with more than one new token
            are, or with `attn_mask` those without cached ones.
        num_tokens : int, optional
            Number of tokens of ``qkv``, if more than ``sum(new)``; the rest is padding.
        shared_prefix_tokens : int
            Length, a multiple of 64, of a prefix whose blocks all sequences with new tokens share.
            The backends then read it once for all sequences. By default (0) they read it once for
            each.
        place : optional
            Place of the tensors. Default: the place of the first cache.
        num_blocks : int, optional
            Number of blocks of every cache. Default: the blocks of the smallest cache in `caches`.
        max_model_len : int, optional
            Maximum number of tokens of a sequence, cached and new ones together. By default only
            the rows of `rotary_embs` limit it.
        partial_tables : bool
            Whether -1 may replace a block that a sequence needs. This is a block of another rank,
            if the cache is spread over ranks, or a block before the window that no query sees.
        **fields
            Further attributes.

        Raises
        ------
        TypeError
            If a number is not an integer.
        ValueError
            If shapes do not match, a number does not fit int32 or is negative, `num_tokens` is less
            than ``sum(new)``, or sequences do not share the prefix. Also if a sequence with new
            tokens has a table that is too short, needs a block that is not in the pool, writes to a
            block that another entry of the step writes to, or has more tokens than `max_model_len`
            or the rows of `rotary_embs`.
        """
        op = "ForwardMeta.for_step"
        place = _place_of(caches) if place is None else place
        lens = as_int32(op, "new", new, (-1,), "[B]")
        batch = len(lens)
        cached_lens = as_int32(op, "cached", cached, (batch,), f"[{batch}]")
        tables = _block_tables(op, block_tables, batch)
        for name, lengths in (("cached", cached_lens), ("new", lens)):
            if (lengths < 0).any():
                raise ValueError(f"{op}: {name}: expected at least 0, got {lengths.min()}")
        # A tree of drafts has several tokens, too.
        usual = cached_lens == 0 if fields.get("attn_mask") is not None else lens > 1
        flags = usual if prefill is None else np.asarray(prefill, bool)
        if flags.shape != (batch,):
            raise ValueError(f"{op}: prefill: expected shape [{batch}], got {list(flags.shape)}")
        encoder = np.where(flags, lens, 0).astype(np.int32)
        starts = as_int32(op, "new", np.cumsum([0, *lens.tolist()]), (-1,), "[B + 1]")
        total = int(starts[-1])
        if num_tokens is not None:
            total = int(as_int32(op, "num_tokens", num_tokens, (), "[]"))
        if total < starts[-1]:
            raise ValueError(
                f"{op}: num_tokens: expected at least {starts[-1]}, the sum of new, got {total}"
            )
        rotary = None if fields.get("rope_already_applied") else rotary_embs
        most = _most_tokens(op, rotary, max_model_len)
        pool = _pool_of(op, caches, num_blocks)
        _check_sequences(op, tables, cached_lens, lens, most, pool, partial_tables)
        batch_ids = np.full(total, -1, np.int32)
        batch_ids[: starts[-1]] = np.repeat(np.arange(len(lens), dtype=np.int32), lens)

        def tensor(array: Any) -> Any:
            return paddle.to_tensor(np.ascontiguousarray(array, np.int32), place=place)

        plan = None
        if shared_prefix_tokens:
            plan = plan_cascade(tables, cached_lens, lens, shared_prefix_tokens, place=place)
        meta = cls(
            **{
                "seq_lens_encoder": tensor(encoder),
                "seq_lens_decoder": tensor(cached_lens),
                "seq_lens_this_time": tensor(lens),
                "cu_seqlens_q": tensor(starts),
                "batch_id_per_token": tensor(batch_ids),
                "block_tables": tensor(tables),
                "max_len_tensor_cpu": max_len_tensor(cached_lens, lens, encoder),
                "caches": list(caches),
                "cascade_plan": plan,
                "rotary_embs": rotary_embs,
                **fields,
            }
        )
        if plan is not None and meta.cascade_plan is plan:
            _record_plan(meta, plan)
        return meta


def _place_of(caches: Sequence[Any]) -> Any:
    """Place of a step's first cache; the CPU without one."""
    first = next((cache for cache in caches if is_tensor(cache)), None)
    return paddle.CPUPlace() if first is None else first.place


def _block_tables(op: str, block_tables: Any, batch: int) -> NDArray[np.int32]:
    """Convert a scheduler's block tables, an array or lists, to an array [batch, max_blocks]."""
    if isinstance(block_tables, (list, tuple)):
        lengths = [np.size(row) for row in block_tables]
        other = next((i for i, n in enumerate(lengths) if n != lengths[0]), None)
        if other is not None:
            raise ValueError(
                f"{op}: block_tables: expected rows of one length, the short ones filled with -1, "
                f"got {lengths[0]} entries of sequence 0 and {lengths[other]} of sequence {other}"
            )
        if not block_tables and not batch:  # an empty step
            block_tables = np.zeros((0, 0), np.int32)
    return as_int32(op, "block_tables", block_tables, (batch, -1), f"[{batch}, max_blocks]")


def _most_tokens(op: str, rotary_embs: Any, max_model_len: int | None) -> tuple[int, str] | None:
    """Maximum number of tokens of a sequence and the source of that limit; None without a limit."""
    limits = []
    if max_model_len is not None:
        limits.append((check_int(op, "max_model_len", max_model_len, 0), "max_model_len"))
    shape = list(rotary_embs.shape) if is_tensor(rotary_embs) else []
    if 3 <= len(shape) <= 6:  # [2, rows, columns] or [2, 1, rows, 1, columns], or one per sequence
        rows = int(shape[-2 if len(shape) < 5 else -3])
        limits += [(rows, "the rows of rotary_embs")] if rows >= 0 else []
    return min(limits, default=None)


def _pool_of(op: str, caches: Sequence[Any], num_blocks: int | None) -> tuple[int | None, int]:
    """Number of blocks of a step's caches (None if unknown), and tokens of a block."""
    shapes = [list(cache.shape) for cache in caches if is_tensor(cache)]
    first = shapes[0] if shapes else []
    size = BLOCK_SIZE
    if 3 <= len(first) <= 4:  # a latent cache has its own shape: [pages, tokens, (1,) bytes]
        size = int(first[1 if len(first) == 3 or first[2] == 1 else 2])
    if num_blocks is not None:
        return check_int(op, "num_blocks", num_blocks, 0), max(size, 1)
    counts = [int(shape[0]) for shape in shapes if len(shape) > 1 and shape[0] >= 0]
    return min(counts, default=None), max(size, 1)


def _check_sequences(
    op: str,
    tables: NDArray[np.int32],
    cached: NDArray[np.int32],
    new: NDArray[np.int32],
    most: tuple[int, str] | None,
    pool: tuple[int | None, int],
    partial: bool,
) -> None:
    """Refuse sequences that are too long, and tables that would lose or mix up their tokens."""
    begin = cached.astype(np.int64)
    end = np.where(new > 0, begin + new, 0)
    if most is not None and end.max(initial=0) > most[0]:
        seq = int(np.argmax(end > most[0]))
        raise ValueError(
            f"{op}: cached: expected at most {most[0]} tokens of a sequence, {most[1]}, got "
            f"{cached[seq]} and {new[seq]} new ones of sequence {seq}"
        )
    num_blocks, size = pool
    check_needed(
        f"{op}: block_tables",
        tables,
        np.zeros_like(begin),
        end,
        block_size=size,
        num_blocks=num_blocks,
        partial=partial,
        hint="partial_tables=True permits -1",
    )
    check_writers(f"{op}: block_tables", tables, begin, end, size)


def max_len_tensor(cached: Any, new: Any, encoder: Any) -> Any:
    """FastDeploy's ``max_len_tensor_cpu``: int32 [9] on the host, of which entries 0 to 5 are used.

    The entries are maxima over the sequences: new tokens, new tokens of prefill sequences, cached
    tokens, cached + new, cached + new of decoding sequences, keys.
    """
    lengths = np.zeros(9, np.int32)
    active = new > 0
    if active.any():
        keys = (cached + new)[active]
        decode = (cached + new)[active & (encoder == 0)]
        lengths[:6] = [
            new.max(),
            encoder.max(),
            cached[active].max(),
            keys.max(),
            decode.max(initial=0),
            keys.max(),
        ]
    return paddle.to_tensor(lengths, place=paddle.CPUPlace())

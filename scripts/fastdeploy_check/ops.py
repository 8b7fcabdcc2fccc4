"""Stand-ins for the compiled operators of FastDeploy that a runner's step calls.

They are identified by name, and by their tensors instead of their number of arguments, which
changes between versions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle


def _int32(values: Any) -> Any:
    return paddle.to_tensor(np.ascontiguousarray(values, np.int32))


def _lengths(args: tuple[Any, ...]) -> np.ndarray:
    """``seq_lens_this_time``: the first int32 tensor with one entry per sequence."""
    for value in args[1:]:
        tensor = isinstance(value, paddle.Tensor) and value.dtype == paddle.int32 and value.ndim
        if tensor and value.size == value.shape[0]:
            return value.numpy().reshape(-1)
    raise TypeError("get_padding_offset: no lengths among its arguments")


def _offsets(lens: np.ndarray, input_ids: Any) -> list[Any]:
    starts = np.concatenate([[0], np.cumsum(lens)])
    ids = input_ids.numpy()
    tokens = np.concatenate([ids[i, :n] for i, n in enumerate(lens)] or [[]]).astype(np.int64)
    owners = np.repeat(np.arange(len(lens)), lens)
    return [paddle.to_tensor(tokens), _int32(owners), _int32(starts), _int32(starts)]


def get_padding_offset(input_ids: Any, *args: Any) -> list[Any]:
    """Tokens without padding, their sequences, and the sequences' starts."""
    return _offsets(_lengths((None, *args)), input_ids)


def speculate_pre_process(
    num: Any, input_ids: Any, lens: Any, drafts: Any = None, encoder: Any = None, *_: Any
) -> list[Any]:
    """The same for steps with drafts, with additional data for the outputs."""
    lens = lens.numpy().reshape(-1)
    if encoder is not None:  # decoding sequences have their tokens among the drafts
        decoding = np.flatnonzero(encoder.numpy().reshape(-1)[: len(lens)] == 0)
        ids, given = input_ids.numpy().copy(), drafts.numpy()
        ids[decoding, : given.shape[1]] = given[decoding]
        input_ids = paddle.to_tensor(ids)
    found = _offsets(lens, input_ids)
    return [*found, found[2], found[1], _int32([found[1].shape[0]])]


def update_attn_mask_offsets(
    ids: Any, lens: Any, encoder: Any, decoder: Any, starts: Any, full: Any, *_: Any
) -> Any:
    """Ends of the masks: from the request in prefill, and after the token itself in decode."""
    ends = np.zeros(ids.shape[0], np.int32)
    encoder, decoder = (x.numpy().reshape(-1) for x in (encoder, decoder))
    for slot, n in enumerate(lens.numpy().reshape(-1)):
        first = int(starts.numpy()[slot])
        own = full.numpy()[slot, :n] + 1 if encoder[slot] else decoder[slot] + 1 + np.arange(n)
        ends[first : first + n] = own
    return _int32(np.stack([np.zeros_like(ends), ends], 1).reshape(-1))


def fill_positions(encoder: Any, decoder: Any, lens: Any, positions: Any, *masks: Any) -> None:
    """Position of each token in its sequence and, until 2.5, whether it is in prefill."""
    starts, prefills, counts = (x.numpy().reshape(-1) for x in (decoder, encoder, lens))
    places = np.concatenate([a + np.arange(n) for a, n in zip(starts, counts)])
    positions.set_value(paddle.to_tensor(places.astype(positions.numpy().dtype)))
    for mask in masks:
        flags = np.repeat(prefills[: len(counts)] > 0, counts).reshape(mask.shape)
        mask.set_value(paddle.to_tensor(flags).astype(mask.dtype))


def fill_positions_and_slots(
    encoder: Any, decoder: Any, lens: Any, owners: Any, tables: Any, positions: Any, slots: Any,
    block_size: int,
) -> None:  # fmt: skip
    """The same for 2.6, and the slot of each token in the cache."""
    fill_positions(encoder, decoder, lens, positions)
    places = positions.numpy()
    blocks = tables.numpy()[owners.numpy()[: len(places)], places // block_size]
    slots.set_value(paddle.to_tensor(blocks.astype(np.int64) * block_size + places % block_size))


def rotate_in_place(query: Any, key: Any, positions: Any, table: Any, dim: int, neox: bool) -> None:
    """Rotation of neighbouring channels by a table of cosines and sines, in float32."""
    if neox:
        raise NotImplementedError("fused_rotary_position_encoding: neox style")
    cos, sin = np.split(table.astype("float32").numpy()[positions.numpy()][:, None], 2, -1)
    for x in (query, key):
        values = x.astype("float32").numpy().reshape(len(cos), -1, dim)
        even, odd = values[..., 0::2], values[..., 1::2]
        pairs = np.stack([even * cos - odd * sin, odd * cos + even * sin], -1)
        x.set_value(paddle.to_tensor(pairs.reshape(x.shape)).astype(x.dtype))


def numpy_to_tensor(source: Any, target: Any) -> Any:
    """Copy the values of a checkpoint's array into a parameter."""
    values = paddle.to_tensor(np.ascontiguousarray(source)).reshape(target.shape)
    target.copy_(values.astype(target.dtype), False)
    return target


def nothing(*_: Any, **__: Any) -> None:
    """An operator whose effects this check does not examine."""


#: Stand-ins by operator.
OPS: dict[str, Callable[..., Any]] = {
    "get_padding_offset": get_padding_offset,
    "speculate_pre_process": speculate_pre_process,
    "get_position_ids": fill_positions,
    "get_position_ids_and_mask_encoder_batch": fill_positions,
    "get_position_ids_and_slot_mapping": fill_positions_and_slots,
    "fused_rotary_position_encoding": rotate_in_place,
    "custom_numpy_to_tensor": numpy_to_tensor,
    "set_data_ipc": nothing,
    "recover_decode_task": nothing,
    "update_attn_mask_offsets": update_attn_mask_offsets,
    # Memory of the cache manager, which is another process.
    "share_external_data": lambda data, name, shape: paddle.zeros(shape, data.dtype),
}

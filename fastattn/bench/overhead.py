"""Host time of the Python layer: an operator's function above the raw operator call beneath it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import paddle

from fastattn import _ops, functional
from fastattn.bench.common import Row, interleaved, register

#: Microseconds that the Python layer may add to a call.
BUDGET_US = 10.0


def _raw_call(function: Callable[[], Any]) -> Callable[[], Any]:
    """The raw operator call, bare of the Python layer, that `function` makes."""
    made: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = []
    original = _ops.call

    def record(op: str, inputs: tuple[Any, ...], attrs: tuple[Any, ...] = ()) -> list[Any]:
        made.append((op, inputs, attrs))
        return original(op, inputs, attrs)

    _ops.call = record
    try:
        function()
    finally:
        _ops.call = original
    ((op, inputs, attrs),) = made
    run, operators = _ops._load_direct()
    if run is None:
        registered = paddle.base.core.eager._run_custom_op
        return lambda: registered(_ops.PREFIX + op, *inputs, *attrs)
    handle = operators[op].handle
    return lambda: run(handle, inputs, attrs, None)


def _calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Calls at the smallest sensible shapes: the kernel's time hides nothing then."""

    def int32(values: Any) -> paddle.Tensor:
        return paddle.to_tensor(np.asarray(values, np.int32))

    q = paddle.zeros([1, 1, 64], "bfloat16")
    key_cache, value_cache = (paddle.zeros([1, 1, 64, 64], "uint8") for _ in range(2))
    rows = (int32([[0]]), int32([0, 1]), int32([0]), int32([1]))
    quantised: dict[str, Any] = {
        "cache_k_scales": paddle.ones([1, 1, 64]),
        "cache_v_scales": paddle.ones([1, 1, 64]),
        "cache_quant_type": "block_wise_fp8",
    }
    yield (
        "paged_attention",
        lambda: functional.paged_attention(q, key_cache, value_cache, *rows, 1, 1, **quantised),
    )
    yield (
        "flash_attention",
        lambda: functional.flash_attention(q, q, q, rows[1], rows[1], 1, 1, causal=True),
    )
    yield (
        "write_cache_kv",
        lambda: functional.write_cache_kv(q, q, key_cache, value_cache, *rows, **quantised),
    )
    yield "quantize_fp8", lambda: functional.quantize_fp8(q, granularity="token")
    lse = paddle.zeros([1, 1])
    yield "merge_attn_states", lambda: functional.merge_attn_states(q, lse, q, lse)


@register("overhead")
def overhead(quick: bool) -> Iterator[Row]:
    """Microseconds that the Python layer adds; the peer is the budget."""
    known = _ops.load()
    for name, function in _calls():
        if _ops.PREFIX + name not in known:
            continue  # a library built for one family of operators
        layered, raw = interleaved(
            [function, _raw_call(function)], 10 if quick else 30, 50 if quick else 200
        )
        # The least disturbed round of each: a sum of small host times has no other noise-free part.
        yield Row(
            "overhead",
            f"Python layer of {name}",
            min(layered) - min(raw),
            peer="budget",
            peer_us=BUDGET_US,
        )

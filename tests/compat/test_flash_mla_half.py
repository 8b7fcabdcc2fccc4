"""float16, which FlashMLA's dense decode takes and this one refuses by the argument's name."""

from __future__ import annotations

import paddle
import pytest

from fastattn.compat import flash_mla
from tests.support.tensors import int32


def call(q_dtype, cache_dtype):
    return flash_mla.flash_mla_with_kvcache(
        paddle.ones([1, 1, 16, 576], q_dtype),
        paddle.ones([2, 64, 1, 576], cache_dtype),
        int32([[0, 1]]),
        int32([70]),
        512,
        None,
    )


@pytest.mark.parametrize("q_dtype", ["float16", "bfloat16"])
def test_a_cache_is_not_copied(q_dtype):
    text = "k_cache: expected dtype bfloat16, got float16; keep the cache in bfloat16 or FP8"
    with pytest.raises(TypeError, match=f"flash_mla_with_kvcache: {text}"):
        call(q_dtype, "float16")


def test_queries_are_to_be_converted():
    text = r'q: expected dtype bfloat16, got float16; give q.astype\("bfloat16"\)'
    with pytest.raises(TypeError, match=f"flash_mla_with_kvcache: {text}"):
        call("float16", "bfloat16")
    out, _ = call("bfloat16", "bfloat16")
    assert out.dtype == paddle.bfloat16 and bool((out == 1).all())

"""Optional inputs of steps without tokens: an empty tensor is one that was given."""

from __future__ import annotations

import functools
import itertools
import tempfile
from pathlib import Path

import numpy as np
import paddle
import pytest
from paddle.static import InputSpec

import fastattn.functional as F
from fastattn import _ops
from fastattn.distributed import dcp_local_keys
from tests.support.operators import calls, run
from tests.support.tensors import int32, to_numpy


@functools.cache
def zeros(*shape: int, dtype: str = "int32") -> paddle.Tensor:
    return paddle.zeros(shape, dtype)


NO_TOKENS = {
    "topk_indices": lambda: F.topk_indices(
        zeros(0, 10, dtype="float32"), zeros(0), 4, starts=zeros(0)
    ),
    "topk_to_slots": lambda: F.topk_to_slots(zeros(3, 4), zeros(1, 1), row_ids=zeros(0)),
    "token_maps": lambda: F.token_maps(
        zeros(0), zeros(1, 1), zeros(2), zeros(1), zeros(0), num_tokens=0
    ),
    "compact_block_tables": lambda: F.compact_block_tables(
        zeros(1, 1),
        zeros(2),
        zeros(1),
        zeros(1),
        num_tokens=0,
        num_blocks=1,
        mask_offsets=zeros(0, 2),
    ),
    "dcp_local_keys": lambda: dcp_local_keys(
        zeros(1, 1),
        zeros(2),
        zeros(1),
        zeros(1),
        0,
        num_tokens=0,
        num_blocks=1,
        mask_offsets=zeros(0, 2),
    ),
    "indexer_q_quant": lambda: F.indexer_q_quant(
        zeros(0, 8, 128, dtype="bfloat16"), zeros(0, 8, dtype="float32"), token_of_query=zeros(0)
    ),
    "indexer_k_gather": lambda: F.indexer_k_gather(
        zeros(1, 64, 132, dtype="uint8"),
        zeros(1, 1),
        zeros(2),
        0,
        out=zeros(0, 128, dtype="uint8"),
        out_scales=zeros(0, dtype="float32"),
    ),
    "window_indices": lambda: F.window_indices(zeros(0), zeros(0), block_tables=zeros(0, 1)),
}


@pytest.mark.parametrize("op", NO_TOKENS)
def test_a_step_without_tokens_takes_inputs_without_entries(op):
    results = NO_TOKENS[op]()
    first = results[0] if isinstance(results, (tuple, list)) else results
    assert first is not None


def test_queries_of_no_token():
    """Of 3 tokens no query is wanted; without the list all would be."""
    codes, _ = F.indexer_q_quant(
        paddle.ones([3, 8, 128], "bfloat16"), paddle.ones([3, 8]), token_of_query=zeros(0)
    )
    assert codes.shape == [0, 8, 128]


@pytest.mark.skipif(_ops.helpers() is None, reason="through Paddle's registry they are refused")
def test_starts_of_no_sequence():
    """No sequence begins anywhere, so no token is in one: not at position 0."""
    indices, lengths = F.window_indices(int32([3, 9]), int32([0, 1]), window=4, starts=zeros(0))
    assert (to_numpy(indices) == -1).all() and not to_numpy(lengths).any()


#: Empty tensors that fit: queries and rows that are chosen, and sequences that there are none of.
FIT = {
    ("indexer_q_quant", "token_of_query"),
    ("radix_topk_ragged_transform", "batch_id_per_token"),
    ("topk_to_slots", "row_ids"),
    ("window_indices", "starts"),
}


@pytest.mark.parametrize("op", sorted(calls()))
def test_an_empty_optional_tensor_is_no_absent_one(op):
    """Whatever its shape, it is refused where the step has tokens, or it fits."""
    sig, valid = _ops.signature(op), calls()[op]
    sizes = (0, 2, 4)
    shapes = [s for n in (1, 2) for s in itertools.product(sizes, repeat=n) if 0 in s]
    shapes += [(0, 4, 64), (2, 0, 64), (3, 2, 0), (0, 2, 64, 64), (2, 1, 0, 1, 64)]
    for name, optional in zip(sig.inputs, sig.optional):
        if not optional or (op, name) in FIT:
            continue
        for shape, dtype in itertools.product(shapes, ("int32", "float32", "bfloat16", "uint8")):
            call = valid.changed(**{name: zeros(*shape, dtype=dtype)})
            with pytest.raises((ValueError, TypeError), match=f"{op}: "):
                run(op, call.inputs, call.attrs)


@pytest.mark.skipif(
    paddle.__version__.startswith("2."), reason="Paddle 2.6 traces into another kind of program"
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_program_for_any_number_of_rows():
    """Paddle would hand empty starts over as absent ones, which are all 0."""

    def top(logits, lengths, starts):
        return F.topk_indices(logits, lengths, 4, starts=starts)

    specs = [
        InputSpec([-1, 10], "float32", name="logits"),
        InputSpec([-1], "int32", name="lengths"),
        InputSpec([-1], "int32", name="starts"),
    ]
    program = paddle.jit.to_static(top, input_spec=specs, full_graph=True)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "program")
        paddle.jit.save(program, path)
        loaded = paddle.jit.load(path)
    logits = np.arange(30, dtype=np.float32).reshape(3, 10)
    given = [paddle.to_tensor(logits), int32([5, 6, 3]), int32([1, 0, 7])]
    for f in (program, loaded):
        assert to_numpy(f(*given)).tolist() == [[1, 2, 3, 4], [2, 3, 4, 5], [0, 1, 2, -1]]
        assert f(zeros(0, 10, dtype="float32"), zeros(0), zeros(0)).shape == [0, 4]
        with pytest.raises(ValueError, match="topk_indices: starts: expected a tensor with elem"):
            f(given[0], given[1], zeros(0))

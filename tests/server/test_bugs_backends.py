"""Faults of other backends, by the numbers of docs/faults.md."""

from __future__ import annotations

import numpy as np
import pytest

from fastattn import backends
from fastattn.backends import (
    AppendAttentionBackend,
    FlashAttentionBackend,
    FlashMaskAttentionBackend,
    HeadShard,
)
from fastattn.backends.forward_meta import field, optional
from fastattn.backends.scales import local_scales
from tests.support.compare import assert_same_bits
from tests.support.serving import Model, Server
from tests.support.tensors import int32, to_numpy, to_paddle

BACKENDS = (FlashAttentionBackend, FlashMaskAttentionBackend, AppendAttentionBackend)
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda b: b.__name__)


@each_backend
def test_bug13_every_token_of_a_decode_seq_is_produced(place, backend):
    """A decode sequence of 5 tokens beside a prefill sequence, though the host was told of 1."""
    server = Server(backend, Model("block_wise_fp8", head_dim=128), [30, 80], place)
    server.step([20, 0])
    server.step([5, 70], prefill=[False, True])
    told = int32([1, 0, 25, 26, 26, 26, 0, 0, 0])
    server.step([5, 0], prefill=[False, False], max_len_tensor_cpu=told)


@pytest.mark.parametrize("rank", range(4))
def test_bug15_a_rank_uses_the_scales_of_its_own_heads(place, rank):
    """8 heads over 4 ranks, FP8 scales for all 8: rank 1 must use scales 3 and 4."""
    scales = np.arange(1, 9, dtype=np.float32) / 64
    model = Model("cache_fp8")
    model.k_scales = model.v_scales = scales[2 * rank : 2 * rank + 2]
    parallel = {"tensor_parallel_size": 4, "tensor_parallel_rank": rank}
    server = Server(FlashAttentionBackend, model, [70], place)
    config = backends.make_config(max_model_len=512, num_key_value_heads=8, **parallel)
    server.backend = FlashAttentionBackend(config, 2, 4, 64)
    server.layers[0].cache_k_out_scale = server.layers[0].cache_v_out_scale = server.on(scales)
    server.step([66])
    server.step([1])


@pytest.mark.parametrize(
    ("count", "per_channel", "expected"),
    [
        (1, False, slice(0, 1)),
        (2, False, slice(0, 2)),
        (8, False, slice(2, 4)),
        (8, True, slice(2, 4)),
        (128, True, slice(0, 128)),
        (512, True, slice(128, 256)),
    ],
)
def test_bug15_local_and_global_scales(count, per_channel, expected):
    scales = np.arange(1, count + 1, dtype=np.float32)
    local = local_scales(
        to_paddle(scales),
        name="s",
        kv_heads=2,
        head_dim=64,
        shard=HeadShard(8, 4, 1),
        per_channel=per_channel,
    )
    assert_same_bits(to_numpy(local), scales[expected])


def test_bug15_more_ranks_than_heads():
    scales = np.array([1.0, 2.0], np.float32)
    for rank, head in enumerate([0, 0, 1, 1]):
        local = local_scales(
            to_paddle(np.concatenate([scales])),
            name="s",
            kv_heads=1,
            head_dim=64,
            shard=HeadShard(2, 4, rank),
            per_channel=False,
        )
        assert to_numpy(local).tolist() == [scales[head]]


@pytest.mark.parametrize("count", [3, 4, 16, 64, 128])
def test_bug15_a_wrong_number_of_scales_is_an_error(count):
    with pytest.raises(ValueError, match=f"scales: expected 1 or 2 or 8 scales.*got {count}"):
        local_scales(
            to_paddle(np.ones(count, np.float32)),
            name="scales",
            kv_heads=2,
            head_dim=64,
            shard=HeadShard(8, 4, 1),
            per_channel=False,
        )


@pytest.mark.parametrize("shard", [HeadShard(8, 3, 0), HeadShard(8, 4, 4), HeadShard(16, 4, 0)])
def test_bug15_ranks_that_do_not_divide_the_heads(shard):
    with pytest.raises(ValueError, match="cannot hold 2 of"):
        shard.first_head(2)


@each_backend
@pytest.mark.parametrize("cache", ["none", "block_wise_fp8", "cache_int8"])
def test_bug17_neox_layers_normalise_and_skip_padding(place, backend, cache):
    server = Server(backend, Model(cache, neox=True, norm=True), [40, 9], place)
    server.step([33, 5], padding=6)
    before = [to_numpy(c).copy() for c in server.caches]
    server.run([0, 0], padding=4)  # a step of padding tokens only
    for old, tensor in zip(before, server.caches):
        assert_same_bits(to_numpy(tensor), old)
    # Padding inside a sequence, as a replayed graph has it.
    ids = server.on(np.full(3, -1, np.int32))
    server.checks = False  # attention reads slots that nobody wrote
    server.run([2, 1], batch_id_per_token=ids)
    server.checks = True
    for old, tensor in zip(before, server.caches):
        assert_same_bits(to_numpy(tensor), old)
    server.step([1, 1], padding=2)


@each_backend
@pytest.mark.parametrize(
    "name",
    ["block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time", "rotary_embs"],
)
def test_bug23_a_misspelt_field_is_not_taken_for_none(backend, name):
    server = Server(backend, Model(), [5])
    meta = server.make_meta([5])
    wrong = name[:-1]
    setattr(meta, wrong, vars(meta).pop(name))  # set under a name that nobody reads
    with pytest.raises(NotImplementedError, match=rf"forward_meta\.{wrong} is not supported"):
        server.backend.init_attention_metadata(meta)
    delattr(meta, wrong)
    server.backend.init_attention_metadata(meta)
    qkv = to_paddle(server.inputs(0, [5]))
    with pytest.raises(ValueError, match=rf"forward_meta\.{name}: expected a value, got None"):
        server.backend.forward(None, None, None, qkv, None, None, server.layers[0], meta)


def test_bug23_backends_cannot_read_an_unknown_field():
    meta = backends.ForwardMeta()
    assert meta.seq_len_encoder is None
    for read in (field, optional):
        with pytest.raises(AttributeError, match="seq_len_encoder"):
            read(meta, "seq_len_encoder")

"""FastDeploy's operators called as its Python calls them: by position, on caches in its bytes."""

from __future__ import annotations

import doctest
import inspect

import numpy as np
import paddle
import pytest

from fastattn import backends, compat
from fastattn.compat import fastdeploy as ops
from fastattn.reference.layout import pack, unpack
from tests.support.compare import assert_same_bits
from tests.support.fastdeploy_step import SEQS, TYPES, Step
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, EMPTY_OUTPUTS, int32, to_numpy, to_paddle


@pytest.mark.parametrize("cache_quant_type", TYPES)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float16)], ids=str)
def test_a_mixed_step(place, cache_quant_type, dim, dtype):
    step = Step(SEQS, cache_quant_type=cache_quant_type, dim=dim, dtype=dtype, blocks=12, padding=3)
    step.run_and_check(place)


@pytest.mark.parametrize("cache_quant_type", TYPES)
@pytest.mark.parametrize(
    ("neox", "partial"), [(False, False), (True, False), (True, True), (False, True)]
)
def test_rotary_styles_and_norms(place, cache_quant_type, neox, partial):
    step = Step(SEQS, cache_quant_type=cache_quant_type, neox=neox, partial=partial, norm=True,
                heads=6, kv=3, blocks=12)  # fmt: skip
    step.run_and_check(place)


@pytest.mark.parametrize("scale_dtype", [np.float32, BF16, np.float16], ids=["f32", "bf16", "f16"])
def test_static_scales_of_every_kind(place, scale_dtype):
    if place == "gpu" and scale_dtype == np.float16 and paddle.__version__.startswith("2."):
        pytest.skip("this Paddle converts no types on recent GPUs")
    for per_channel in (False, True):
        step = Step(SEQS, cache_quant_type="cache_int8", per_channel=per_channel, blocks=12,
                    scale_dtype=scale_dtype)  # fmt: skip
        step.run_and_check(place)


def test_bug01_unequal_v_scales_of_a_cached_prefix(place):
    """V of token r is r + 1 before the second chunk; each token keeps its own scale."""
    step = Step([(1, 64, 1)], kv=1, heads=1)
    block = step.tables[0, 0]
    codes = unpack(step.caches[1], "v", "fastdeploy", int8=False).copy()
    codes[block, 0] = 0x7E  # 448
    step.caches[1] = pack(codes, "v", "fastdeploy", int8=False)
    step.scales[1][block, 0] = ((np.arange(64) + 1) / 448).astype(BF16)
    _, _, v, _ = ops.gqa_rope_write_cache(*step.arguments(place))
    values = to_numpy(v)[:64, 0].astype(np.float64)
    assert (np.abs(values / (np.arange(64) + 1)[:, None] - 1) < 0.01).all()


#: Steps whose chunks begin and end inside of blocks and of groups of 16 tokens, more tokens than a
#: table entry's block, single tokens beside prompts, and nothing but decoding sequences.
LAYOUTS = {
    "chunks": [(17, 15, 17), (1, 63, 1), (130, 64, 130), (16, 48, 16), (64, 0, 64), (33, 31, 33)],
    "beside": [(70, 0, 70), *[(0, 90, 1)] * 20, (5, 3, 5), *[(0, 7, 2)] * 15, (1, 0, 1)],
    "decode": [(0, 10 * i, 1) for i in range(20)],
}


@pytest.mark.few_on_cpu("heads", "dim")
@pytest.mark.parametrize("cache_quant_type", TYPES)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("heads", [(1, 1), (6, 3), (20, 5)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_chunks_and_heads_of_every_number(place, layout, heads, dim, cache_quant_type):
    for norm in (False, True):
        step = Step(LAYOUTS[layout], cache_quant_type=cache_quant_type, dim=dim, heads=heads[0],
                    kv=heads[1], norm=norm, blocks=80, padding=5)  # fmt: skip
        step.run_and_check(place)


@pytest.mark.parametrize("cache_quant_type", TYPES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_inside_of_prompts(place, layout, norm, cache_quant_type):
    step = Step(LAYOUTS[layout], cache_quant_type=cache_quant_type, norm=norm, blocks=80, padding=9)
    step.batch_ids[::7] = -1
    step.batch_ids[16:19] = -1
    arguments = step.arguments(place)
    outputs = ops.gqa_rope_write_cache(*arguments)
    wanted, caches, scales = step.expected()
    named = dict(zip(("q", "k", "v", "qkv_out"), zip(outputs, wanted)))
    for name in ("q", "qkv_out"):
        assert_same_bits(to_numpy(named[name][0]), named[name][1], name)
    for a, b in zip(step.tensors["caches"], caches):
        assert_same_bits(to_numpy(a), b)
    written = wanted[1].astype(np.float32).any((1, 2))  # the others keep what was there
    for name in "kv":
        a, b = named[name]
        assert_same_bits(to_numpy(a)[written], b[written], name)
    if cache_quant_type == "block_wise_fp8":
        for a, b in zip(step.tensors["scales"], scales):
            assert_same_bits(to_numpy(a), b)


@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16], ids=["f32", "bf16", "f16"])
@pytest.mark.parametrize("only", [0, 1])
def test_norm_weights_of_every_type(place, only, dtype):
    step = Step(LAYOUTS["chunks"], norm=True, blocks=80)
    step.norms = [x.astype(dtype) for x in step.norms]
    step.run_and_check(place)
    step.norms[only] = None
    step.run_and_check(place)


@pytest.mark.parametrize("cache_quant_type", ["cache_int8", "block_wise_fp8"])
def test_bug11_a_chunk_in_the_middle_of_a_stale_block(place, cache_quant_type):
    """Codes of a rejected draft or an earlier owner are replaced, not combined."""
    step = Step([(3, 5, 3)], cache_quant_type=cache_quant_type)
    for i in range(2):
        step.caches[i][step.tables[0, 0]] = 0x7E
    step.run_and_check(place)


def test_bug06_tokens_of_zeros_stay_finite(place):
    step = Step([(4, 0, 4)])
    step.qkv[1] = 0
    step.qkv[2] *= np.array(1e-6, BF16)
    step.run_and_check(place)
    for scales in step.tensors["scales"]:
        assert np.isfinite(to_numpy(scales).astype(np.float32)).all()


def test_wild_lengths_and_blocks_stay_inside(place):
    """Block ids outside the cache, offsets outside k and v: left out, the rest is right."""
    step = Step(SEQS, blocks=12)
    step.tables[0, 1] = 99
    step.tables[1, 0] = -7
    arguments = step.arguments(place)
    ops.gqa_rope_write_cache(*arguments)
    _, caches, scales = step.expected()
    for a, b in zip(step.tensors["caches"] + step.tensors["scales"], caches + scales):
        assert_same_bits(to_numpy(a), b)
    small = step.arguments(place, kv_token_num=10)
    out = ops.gqa_rope_write_cache(*small)
    assert out[1].shape == [10, 2, 128]
    step.cu_k = step.cu_k - 1000
    ops.gqa_rope_write_cache(*step.arguments(place, kv_token_num=10))


def test_without_batch_ids_or_with_cuda_graph_padding(place):
    step = Step([(0, 9, 1), (6, 0, 6)], padding=4)
    step.run_and_check(place)
    step.run_and_check(place, batch_id_per_token=None)
    step.batch_ids[0] = -1  # padding inside a sequence
    step.arguments(place)
    q = ops.gqa_rope_write_cache(*step.arguments(place))[0]
    assert not to_numpy(q)[0].any()


def test_the_older_order_of_arguments(place):
    """Without use_neox_rotary_style: (rms_norm_eps, cache_quant_type, rope_3d)."""
    Step(SEQS, blocks=12).run_and_check(place, older=True)
    Step(SEQS, blocks=12, rope_3d=True).run_and_check(place, older=True)


def test_names_and_defaults_are_fastdeploys():
    """The order in which FastDeploy's wrapper declares and passes them."""
    parameters = inspect.signature(ops.gqa_rope_write_cache).parameters
    assert " ".join(parameters) == (
        "qkv key_cache value_cache cu_seqlens_q cu_seqlens_k rotary_embs seq_lens_this_time "
        "seq_lens_encoder seq_lens_decoder batch_id_per_token block_tables kv_batch_ids "
        "kv_tile_ids_per_batch kv_num_blocks cache_batch_ids cache_tile_ids_per_batch "
        "cache_num_blocks q_norm_weight k_norm_weight cache_k_quant_scales cache_v_quant_scales "
        "cache_k_dequant_scales cache_v_dequant_scales cache_k_zp cache_v_zp kv_signal_data "
        "kv_token_num max_seq_len rms_norm_eps use_neox_rotary_style cache_quant_type rope_3d"
    )
    defaults = [p.default for p in parameters.values()][17:]
    assert defaults == [None] * 9 + [1, 0, 1e-6, False, "none", False]
    assert " ".join(inspect.signature(ops.merge_prefill_decode_output).parameters) == (
        "encoder_res decoder_res seq_lens_encoder seq_lens_decoder seq_lens_this_time cu_seq_q "
        "head_num head_dim max_token"
    )


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"qkv": None}, TypeError, "qkv: expected a tensor, got None"),
        ({"key_cache": None}, TypeError, "key_cache: expected a tensor, got None"),
        ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k: expected a tensor, got None"),
        ({"seq_lens_encoder": int32([1])}, ValueError, r"seq_lens_encoder: expected shape \[6\]"),
        ({"cu_seqlens_k": int32([0, 1])}, ValueError, r"cu_seqlens_k: expected shape \[7\]"),
        ({"seq_lens_this_time": to_paddle(np.zeros(6))}, TypeError, "expected dtype int32"),
        ({"cache_k_zp": int32([1])}, ValueError, "cache_k_zp: .*takes no zero point"),
        ({"kv_signal_data": int32([1])}, NotImplementedError, "kv_signal_data: PD"),
        ({"rope_3d": True}, ValueError, "rotary_embs: expected a table for each sequence"),
        ({"cache_quant_type": "cache_int4_zp"}, NotImplementedError, "'cache_int4_zp' is not"),
        ({"cache_quant_type": "block_wise_int8"}, NotImplementedError, "FastDeploy has no"),
        ({"cache_quant_type": 3}, TypeError, "cache_quant_type: expected str, got int"),
        ({"cache_k_quant_scales": None}, ValueError, "cache_k_scales: .*needs scales, got None"),
        ({"kv_token_num": -1}, ValueError, "kv_token_num: expected at least 0, got -1"),
        ({"kv_token_num": None}, TypeError, "kv_token_num"),
        ({"rms_norm_eps": -1.0}, ValueError, "rms_norm_eps"),
        ({"rms_norm_eps": "1"}, TypeError, "rms_norm_eps: expected float, got str"),
        ({"q_norm_weight": int32([1])}, TypeError, "q_norm_weight: expected dtype"),
        ({"qkv": to_paddle(np.zeros((88, 5), BF16))}, ValueError, r"qkv: expected shape \[T"),
        ({"qkv": to_paddle(np.zeros((88, 1024), np.float32))}, TypeError, "qkv: expected dtype"),
        (
            {"rotary_embs": to_paddle(np.zeros((2, 1, 9, 1, 40), np.float32))},
            ValueError,
            "rotary_embs: expected 32 or 64 columns",
        ),
    ],
)
def test_wrong_arguments_are_named(changes, error, text):
    step = Step(SEQS, blocks=12)
    with pytest.raises(error, match=f"gqa_rope_write_cache: .*{text}"):
        ops.gqa_rope_write_cache(*step.arguments(**changes))


def test_lengths_of_all_slots(place):
    """Up to FastDeploy 2.5 they lie behind those of the sequences that run."""
    step = Step(SEQS, blocks=12)
    names = ("seq_lens_encoder", "seq_lens_decoder", "block_tables")
    arrays = (step.encoder, step.decoder, step.tables)
    more = [to_paddle(np.concatenate([x, x[:2]]), place) for x in arrays]
    step.run_and_check(place, **dict(zip(names, more)))
    arguments, wanted = merge_arguments(place, batch_shape=False)
    for i in (2, 3):
        lens = to_numpy(arguments[i])
        arguments[i] = to_paddle(np.concatenate([lens, lens[:2]]), place)
    ops.merge_prefill_decode_output(*arguments)
    assert_same_bits(to_numpy(arguments[0]), wanted)


@pytest.mark.parametrize("cache_quant_type", ["cache_int8", "cache_fp8"])
def test_bug15_scales_of_the_whole_model_are_refused(cache_quant_type):
    """A rank that holds 2 of 8 heads must pass its own."""
    step = Step(SEQS, cache_quant_type=cache_quant_type, blocks=12)
    given = to_paddle(np.arange(1, 9, dtype=np.float32))
    with pytest.raises(ValueError, match=r"cache_k_dequant_scales: expected .* scales.*got 8"):
        ops.gqa_rope_write_cache(*step.arguments(cache_k_dequant_scales=given))
    with pytest.raises(ValueError, match=r"cache_k_scales: .*needs scales, got None"):
        ops.gqa_rope_write_cache(*step.arguments(cache_k_dequant_scales=None))


@pytest.mark.skipif(not EMPTY_OUTPUTS, reason="this Paddle has no empty outputs")
def test_an_empty_step(place):
    step = Step([(0, 5, 0), (0, 0, 0)])
    outputs = ops.gqa_rope_write_cache(*step.arguments(place))
    assert [x.shape[0] for x in outputs] == [0, 0, 0, 0]
    step.run_and_check(place)


def _traced(qkv, key, value, k_scales, v_scales, cu_q, cu_k, new, encoder, decoder, ids, tables,
            rotary):  # fmt: skip
    return ops.gqa_rope_write_cache(
        qkv, key, value, cu_q, cu_k, rotary, new, encoder, decoder, ids, tables,
        None, None, None, None, None, None, None, None, k_scales, v_scales, None, None, None, None,
        None, 21, 256, 1e-5, False, "block_wise_fp8", len(rotary.shape) == 6,
    )  # fmt: skip


@pytest.mark.parametrize("rope_3d", [False, True])
def test_all_modes_of_paddle(place, rope_3d):
    step = Step([(20, 0, 20), (0, 9, 1)], rope_3d=rope_3d)
    arrays = [step.qkv, *step.caches, *step.scales, step.cu_q, step.cu_k, step.new, step.encoder,
              step.decoder, step.batch_ids, step.tables, step.table]  # fmt: skip
    outputs, inputs = run_all_modes(_traced, arrays, place)
    wanted, caches, scales = step.expected()
    for a, b in zip(outputs, wanted):
        assert_same_bits(a, b)
    for a, b in zip(inputs[1:5], caches + scales):
        assert_same_bits(a, b)


# merge_prefill_decode_output


def merge_arguments(place, dtype=BF16, dim=128, extra=0, batch_shape=True):
    rng = np.random.default_rng(1)
    encoder, decoder = np.array([5, 0, 0, 0, 7]), np.array([3, 9, 0, 4, 0])
    new = np.array([5, 5, 2, 0, 7])
    cu = np.concatenate([[0], np.cumsum(new)])
    prefill, decode = (
        rng.integers(0, 256, (19 + extra, 3 * dim * np.dtype(dtype).itemsize), np.uint8).view(dtype)
        for _ in "pd"
    )
    wanted = prefill.copy()
    wanted[5:10] = decode[5:10]  # sequence 1 is the only decode sequence with new tokens
    lens = [x[:, None] if batch_shape else x for x in (encoder, decoder, new)]
    tensors = [to_paddle(prefill.copy(), place), to_paddle(decode, place)]
    return [*tensors, *(int32(x, place) for x in (*lens, cu)), 3, dim, 1], wanted


@pytest.mark.parametrize(
    "dtype", [BF16, np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.uint8)], ids=str
)
@pytest.mark.parametrize("dim", [128, 192, 7])
def test_bug13_all_tokens_of_decode_seqs_are_merged(place, dtype, dim):
    """All 5 new tokens of a decode sequence, though max_token is 1; others stay as they are."""
    arguments, wanted = merge_arguments(place, dtype, dim=dim, extra=3)
    result = ops.merge_prefill_decode_output(*arguments)
    assert_same_bits(to_numpy(arguments[0]).view(np.uint8), wanted.view(np.uint8))
    assert_same_bits(to_numpy(result).view(np.uint8), wanted.view(np.uint8))


def test_three_dimensions_and_fewer_decode_tokens(place):
    arguments, wanted = merge_arguments(place, batch_shape=False)
    arguments[0] = to_paddle(to_numpy(arguments[0]).reshape(19, 3, 128).copy(), place)
    arguments[1] = to_paddle(to_numpy(arguments[1])[:8].copy(), place)
    before = to_numpy(arguments[0]).reshape(19, -1).copy()
    ops.merge_prefill_decode_output(*arguments)
    wanted[8:10] = before[8:10]
    assert_same_bits(to_numpy(arguments[0]).reshape(19, -1), wanted)


def test_wild_lengths_of_a_merge(place):
    for changes in ([2**31 - 1] * 5, [-(2**31)] * 5, [0, 400, 400, 400, 400]):
        arguments, _ = merge_arguments(place, batch_shape=False)
        for i in (4, 5):
            values = np.array(changes if i == 4 else [-5, *changes], np.int64)
            arguments[i] = int32(values.astype(np.int32), place)
        ops.merge_prefill_decode_output(*arguments)


@pytest.mark.parametrize(
    ("index", "value", "error", "text"),
    [
        (0, None, TypeError, "encoder_res: expected a tensor, got None"),
        (0, 5, TypeError, "encoder_res: expected a tensor, got int"),
        (1, to_paddle(np.zeros((19, 384), np.float32)), TypeError, "decoder_res: expected dtype"),
        (0, to_paddle(np.zeros((19, 5), BF16)), ValueError, "encoder_res: expected shape"),
        (1, to_paddle(np.zeros(19, BF16)), ValueError, "decoder_res: expected shape"),
        (0, int32(np.zeros((19, 384))), TypeError, "encoder_res: dtype int32 is not supported"),
        (2, to_paddle(np.zeros(5, np.int64)), TypeError, "seq_lens_encoder: expected dtype int32"),
        (3, int32([1]), ValueError, "seq_lens_decoder: expected shape"),
        (5, int32([0, 1]), ValueError, "cu_seq_q: expected shape"),
        (6, 0, ValueError, "head_num: expected at least 1, got 0"),
        (7, -3, ValueError, "head_dim: expected at least 1, got -3"),
        (8, 0, ValueError, "max_token: expected at least 1, got 0"),
        (6, 1.5, TypeError, "head_num"),
    ],
)
def test_wrong_arguments_of_a_merge_are_named(index, value, error, text):
    arguments, _ = merge_arguments("cpu")
    arguments[index] = value
    with pytest.raises(error, match=f"merge_prefill_decode_output: {text}"):
        ops.merge_prefill_decode_output(*arguments)


def test_a_merge_with_itself_is_refused():
    arguments, _ = merge_arguments("cpu")
    arguments[1] = arguments[0]
    with pytest.raises(ValueError, match="must not share memory with decoder_res"):
        ops.merge_prefill_decode_output(*arguments)


def _merge(prefill, decode, encoder, decoder, new, cu):
    return ops.merge_prefill_decode_output(prefill, decode, encoder, decoder, new, cu, 3, 128, 2)


def test_all_modes_of_a_merge(place):
    arguments, wanted = merge_arguments("cpu")
    outputs, inputs = run_all_modes(_merge, [to_numpy(x) for x in arguments[:6]], place)
    assert_same_bits(outputs[0], wanted)
    assert_same_bits(inputs[0], wanted)


# Documentation, and the way to a backend.


@pytest.mark.parametrize("name", ops.__all__)
def test_the_example_gives_what_it_says(name):
    function = getattr(ops, name)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert test.examples
    lines: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=lines.append)
    assert not lines, "".join(lines)


def test_a_cache_written_so_can_be_converted_and_served(place):
    """What the compatibility operator wrote, the backends read after a conversion in place."""
    step = Step([(70, 0, 70)], scale_dtype=np.float32)
    step.run_and_check(place)
    caches = [*step.tensors["caches"], *step.tensors["scales"]]
    backends.convert_caches(caches, cache_quant_type="block_wise_fp8")
    _, expected, _ = step.expected()
    for kind, tensor, theirs in zip("kv", caches, expected):
        logical = unpack(theirs, kind, "fastdeploy", int8=False)
        assert_same_bits(to_numpy(tensor), pack(logical, kind, "fastattn", int8=False))


def test_the_package_has_a_docstring():
    assert compat.__doc__ and paddle.__version__

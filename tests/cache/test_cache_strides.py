"""Caches that are views: any order of their dimensions, read and written where they lie."""

from __future__ import annotations

import dataclasses

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.functional._cache_types import codes_per_byte
from tests.cache import test_append_cache, test_rope_write_cache, test_write_cache
from tests.support.attention import (
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT8,
    MIXED_KINDS,
    PLAIN,
    CacheKind,
    PagedProblem,
    paged_problem,
)
from tests.support.cache import QUANTISED, Cache, make_cache, make_step, make_values
from tests.support.compare import assert_same_bits
from tests.support.strides import (
    LAYOUTS,
    PLANE_LAYOUTS,
    PeakMemory,
    Placed,
    default_place,
    strided,
)
from tests.support.tensors import BF16, int32, skip_slices_on, to_numpy, to_paddle

TYPES = [("none", "e4m3"), *QUANTISED]
KINDS = [
    PLAIN,
    CacheKind(dtype="float16"),
    CacheKind("cache_int8", "channel"),
    CacheKind("cache_fp8", "head", "e4m3"),
    CacheKind("cache_fp8", "tensor", "e5m2"),
    BLOCK_WISE_FP8,
    BLOCK_WISE_INT8,
    CacheKind("block_wise_fp8", scale_dtype="bfloat16"),
    *MIXED_KINDS,
]
#: Decode, a few tokens, prefill and a chunk, over whole blocks and parts of them.
SEQS = [(100, 1), (64, 3), (0, 130), (75, 70), (0, 1)]


@dataclasses.dataclass
class StridedProblem(PagedProblem):
    """The same problem, its cache laid out as views."""

    layout: str = ""

    @classmethod
    def of(cls, problem: PagedProblem, layout: str) -> StridedProblem:
        fields = {f.name: getattr(problem, f.name) for f in dataclasses.fields(problem)}
        return cls(**fields, layout=layout)

    def arguments(self, place: str = "cpu"):
        positional, keywords = super().arguments(place)
        self.placed = Placed([self.k.packed(), self.v.packed()], self.layout, place)
        positional[1:3] = self.placed.tensors
        if self.kind.dynamic:
            scales = Placed([self.k.scales, self.v.scales], self.layout, place, seed=1)
            keywords["cache_k_scales"], keywords["cache_v_scales"] = scales.tensors
        return positional, keywords


@pytest.mark.few_on_cpu("kind", "dim")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_paged_attention(place, kind, dim, layout):
    problem = paged_problem(SEQS, heads=(6, 3), dim=dim, kind=kind)
    out, lse = StridedProblem.of(problem, layout).check(place)
    expected, expected_lse = problem.run(place)
    assert_same_bits(out, expected, "out")
    assert_same_bits(lse, expected_lse, "lse")


@pytest.mark.parametrize("layout", ["gaps", "unlike", "interleaved"])
@pytest.mark.parametrize("kind", [PLAIN, KINDS[2], KINDS[3], KINDS[4], BLOCK_WISE_FP8], ids=str)
def test_values_that_are_not_finite_for_some_queries(place, kind, layout):
    """A NaN in V that late queries of a prompt see and early ones do not."""
    problem = paged_problem(SEQS, heads=(6, 3), dim=64, kind=kind)
    for seq, position in ((2, 77), (3, 120)):
        block = problem.block_tables[seq, position // 64]
        problem.v.poison((block, slice(None), position % 64))
    out, lse = StridedProblem.of(problem, layout).run(place)
    expected, expected_lse = problem.run(place)
    assert_same_bits(out, expected, "out")
    assert_same_bits(lse, expected_lse, "lse")
    if kind.quant_type != "cache_int8":  # whose codes are all finite
        nan = np.isnan(expected.astype(np.float32)).any(axis=(1, 2))
        assert nan.any() and not nan.all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("q_type", ["e4m3:tensor", "e4m3:token_head"])
@pytest.mark.parametrize("kind", [KINDS[3], KINDS[4], BLOCK_WISE_FP8], ids=str)
def test_paged_attention_with_fp8_queries(place, kind, q_type, layout):
    problem = paged_problem(SEQS, heads=(6, 3), dim=128, kind=kind, q_type=q_type)
    out, _ = StridedProblem.of(problem, layout).check(place)
    assert_same_bits(out, problem.run(place)[0], "out")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("heads", [(4, 1), (3, 3)])
def test_one_kv_head_and_one_block(place, heads, layout):
    """Strides of dimensions of one entry mean nothing."""
    problem = paged_problem([(3, 40)], heads=heads, dim=128, kind=BLOCK_WISE_FP8)
    table = problem.block_tables[0, 0]
    for stored in (problem.k, problem.v):
        stored.elements = stored.elements[table : table + 1]
        stored.scales = stored.scales[table : table + 1]
    problem.block_tables = np.zeros_like(problem.block_tables)
    out, _ = StridedProblem.of(problem, layout).check(place)
    assert_same_bits(out, problem.run(place)[0], "out")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_FP8], ids=str)
def test_blocks_that_are_not_assigned(place, kind, layout):
    problem = paged_problem([(200, 1), (200, 90)], heads=(4, 2), dim=128, kind=kind)
    problem.block_tables[:, 1] = [-1, len(problem.k.elements)]
    out, _ = StridedProblem.of(problem, layout).check(place)
    assert_same_bits(out, problem.run(place)[0], "out")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [PLAIN, BLOCK_WISE_INT8], ids=str)
def test_cascade_attention(place, kind, layout):
    problem = paged_problem(
        [(128, 1), (192, 2), (130, 40)], heads=(4, 2), dim=128, kind=kind, share=True
    )
    plan = F.plan_cascade(
        problem.block_tables, problem.seq_lens_decoder, problem.seq_lens_this_time, 128, place=place
    )
    results = []
    for p in (problem, StridedProblem.of(problem, layout)):
        (q, key_cache, value_cache, _, cu, _, new, *longest), keywords = p.arguments(place)
        results.append(
            F.cascade_attention(q, key_cache, value_cache, plan, cu, new, *longest, **keywords)
        )
    assert_same_bits(to_numpy(results[1]), to_numpy(results[0]), "out")


def place_cache(cache: Cache, layout: str, place: str) -> tuple[list, list[Placed]]:
    """The tensors key, value, k_scales, v_scales; and the memory of those that are written."""
    placed = [Placed([cache.key, cache.value], layout, place)]
    scales = [None if a is None else to_paddle(a, place) for a in (cache.k_scales, cache.v_scales)]
    if cache.cache_quant_type.startswith("block_wise"):
        placed.append(Placed([cache.k_scales, cache.v_scales], layout, place, seed=1))
        scales = placed[1].tensors
    return [*placed[0].tensors, *scales], placed


def assert_written(placed: list[Placed], expected: Cache) -> None:
    placed[0].assert_holds([expected.key, expected.value], "cache")
    if len(placed) > 1:
        placed[1].assert_holds([expected.k_scales, expected.v_scales], "scales")


#: New tokens that each of the kernels takes: decode, and prompts.
STEPS = {"decode": ([0, 1, 63, 64, 100], [1, 1, 1, 1, 2]), "prefill": ([0, 63, 100], [65, 2, 200])}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(("dtype", "head_dim"), [(BF16, 64), (BF16, 128), (np.float32, 128)])
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), TYPES)
def test_write_cache_kv(place, cache_quant_type, fp8_format, head_dim, dtype, step, layout):
    step, num_blocks = make_step(*STEPS[step])
    cache = make_cache(cache_quant_type, num_blocks, 3, head_dim, fp8_format=fp8_format)
    shape = (step.num_tokens, 3, head_dim)
    key, value = make_values(shape, dtype, 1), make_values(shape, dtype, 2)
    (key_cache, value_cache, k_scales, v_scales), placed = place_cache(cache, layout, place)
    returned = F.write_cache_kv(
        to_paddle(key, place),
        to_paddle(value, place),
        key_cache,
        value_cache,
        *(to_paddle(a, place) for a in step.arrays),
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        **cache.options,
    )
    assert_written(placed, test_write_cache.model(cache, key, value, step))
    assert returned[0].data_ptr() == key_cache.data_ptr()
    assert returned[1].data_ptr() == value_cache.data_ptr()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cache", test_rope_write_cache.CACHES, ids="-".join)
def test_rope_write_cache_kv(place, cache, norm, step, layout):
    case = test_rope_write_cache.make_case(
        *STEPS[step], cache=cache, kv_heads=2, head_dim=128, norm=norm, neox=True
    )
    (key_cache, value_cache, k_scales, v_scales), placed = place_cache(case.cache, layout, place)
    q, _ = F.rope_write_cache_kv(
        to_paddle(case.qkv, place),
        key_cache,
        value_cache,
        to_paddle(case.rotary_embs, place),
        *(to_paddle(a, place) for a in case.step.arrays),
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        **case.cache.options,
        **{k: None if a is None else to_paddle(a, place) for k, a in case.tensors.items()},
        **case.options,
    )
    expected_q, _, expected = test_rope_write_cache.expected(case)
    assert_same_bits(to_numpy(q), expected_q, "q")
    assert_written(placed, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_append_cache_kv_c8(place, cache_quant_type, fp8_format, head_dim, layout):
    _check_append(place, cache_quant_type, fp8_format, head_dim, layout, "fastattn")


@pytest.mark.parametrize("layout", PLANE_LAYOUTS)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize(("cache_quant_type", "fp8_format"), QUANTISED)
def test_append_cache_kv_c8_in_the_fastdeploy_layout(
    place, cache_quant_type, fp8_format, head_dim, layout
):
    if 2 in codes_per_byte(cache_quant_type):
        pytest.skip("FastDeploy has no such cache")
    _check_append(place, cache_quant_type, fp8_format, head_dim, layout, "fastdeploy")


def _check_append(place, cache_quant_type, fp8_format, head_dim, layout, cache_layout):
    cached = [0, 1, 64, 200, 7]
    step, num_blocks = make_step(cached, [0] * len(cached))
    cache = make_cache(cache_quant_type, num_blocks, 3, head_dim, fp8_format=fp8_format)
    cu = np.cumsum([0, *cached]).astype(np.int32)
    markers = test_append_cache.outputs(cache, cu[-1], BF16)
    cache = test_append_cache.in_layout(cache, cache_layout)
    (key_cache, value_cache, k_scales, v_scales), placed = place_cache(cache, layout, place)
    outputs = [to_paddle(a.copy(), place) for a in markers]
    F.append_cache_kv_c8(
        key_cache,
        value_cache,
        *outputs,
        *(to_paddle(a, place) for a in (step.block_tables, step.seq_lens_decoder, cu)),
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        dynamic_quant=cache_quant_type.startswith("block_wise"),
        cache_layout=cache_layout,
        **cache.options,
    )
    seqs = (step.block_tables, step.seq_lens_decoder, cu)
    expected = test_append_cache.model(cache, *markers, *seqs, cache_layout)
    for name, actual, wanted in zip(("key", "value"), outputs, expected):
        assert_same_bits(to_numpy(actual), wanted, name)
    assert_written(placed, cache)  # only read


@pytest.mark.parametrize("layout", PLANE_LAYOUTS)
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("cache_quant_type", "src", "dst"),
    [
        ("cache_int8", "fastdeploy", "logical"),
        ("block_wise_fp8", "fastdeploy", "fastattn"),
        ("cache_fp8", "logical", "fastdeploy"),
        ("none", "fastdeploy", "fastattn"),
        ("cache_fp8", "logical", "logical"),
    ],
)
def test_conversions(place, cache_quant_type, src, dst, in_place, layout):
    """In place, only blocks [1, 4) of 5."""
    rng = np.random.default_rng(0)
    none = cache_quant_type == "none"
    blocks = [rng.integers(0, 256, (5, 3, 64, 128), np.uint8) for _ in "kv"]
    if none:
        blocks = [x.astype(np.uint16).view(BF16) for x in blocks]
    placed = Placed(blocks, layout, place)
    expected = []
    for kind, tensor, array in zip("kv", placed.tensors, blocks):
        options = {"kind": kind, "cache_quant_type": cache_quant_type, "src": src, "dst": dst}
        wanted = array if none else reference.convert_cache_layout(array, **options)
        if in_place:
            F.convert_cache_blocks(tensor, **options, begin=1, end=4)
            changed = array.copy()
            changed[1:4] = wanted[1:4].reshape(changed[1:4].shape)
            expected.append(changed)
        else:
            out = F.convert_cache_layout(tensor, **options)
            assert_same_bits(to_numpy(out), wanted, kind)
            expected.append(array)
    placed.assert_holds(expected)


@pytest.mark.parametrize("layout", PLANE_LAYOUTS)
@pytest.mark.parametrize("cache_quant_type", ["none", "cache_int8", "cache_fp8", "block_wise_fp8"])
def test_gqa_rope_write_cache(place, cache_quant_type, layout):
    from fastattn.compat import fastdeploy as ops
    from tests.support.fastdeploy_step import SEQS as STEP
    from tests.support.fastdeploy_step import Step

    step = Step(STEP, cache_quant_type=cache_quant_type, dim=128, blocks=12)
    arguments = step.arguments(place)
    placed = [Placed(step.caches, layout, place)]
    replaced = dict(zip(map(id, step.tensors["caches"]), placed[0].tensors))
    if cache_quant_type == "block_wise_fp8":
        placed.append(Placed(step.scales, layout, place, seed=1))
        replaced.update(zip(map(id, step.tensors["scales"]), placed[1].tensors))
    outputs = ops.gqa_rope_write_cache(*(replaced.get(id(a), a) for a in arguments))
    wanted, caches, scales = step.expected()
    for name, a, b in zip(("q", "k", "v", "qkv_out"), outputs, wanted):
        assert_same_bits(to_numpy(a), b, name)
    placed[0].assert_holds(caches, "caches")
    if len(placed) > 1:
        placed[1].assert_holds(scales, "scales")


def _far_apart(place: str, dtype: str, shapes: list[list[int]]) -> list[paddle.Tensor]:
    """K and V side by side in blocks that lie more than 2^31 elements from each other."""
    item = 2 if dtype == "bfloat16" else 1
    plane = shapes[0][2] * shapes[0][3]
    size = shapes[0][1] * plane
    stride = 2**31 + 64 * 4096
    total = (shapes[0][0] - 1) * stride + 2 * size
    if place == "gpu":
        memory = paddle.device.cuda.get_device_properties(0).total_memory
        if memory < 3 * total * item:
            pytest.skip("too little memory")
    try:  # on the CPU, memory that nothing touches need not exist
        with default_place(place):
            pool = paddle.empty([total], dtype=dtype)
    except (MemoryError, RuntimeError) as error:
        pytest.skip(f"too little memory: {error}")
    return [
        strided(pool, shape, [stride, plane, shape[3], 1], i * size * item)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize(("cache_type", "dtype"), [("none", "bfloat16"), ("cache_fp8", "uint8")])
def test_strides_of_more_than_32_bits(place, cache_type, dtype):
    """Written and read again: the results of a contiguous cache."""
    shapes = [[3, 2, 64, 128], [3, 2, 64, 128] if cache_type == "none" else [3, 2, 128, 64]]
    far = _far_apart(place, dtype, shapes)
    with default_place(place):
        near = [paddle.empty(shape, dtype=dtype) for shape in shapes]
    step = [int32(x, place) for x in ([[2, 0, 1]], [0, 150], [0], [150])]
    key, value = (to_paddle(make_values((150, 2, 128), BF16, i), place) for i in (1, 2))
    q = to_paddle(make_values((150, 4, 128), BF16, 3), place)
    options = {"cache_quant_type": cache_type}
    if cache_type != "none":
        for name, scale in (("cache_k_scales", 0.011), ("cache_v_scales", 0.017)):
            options[name] = to_paddle(np.array([scale], np.float32), place)
    results = []
    for caches in (far, near):
        F.write_cache_kv(key, value, *caches, *step, **options)
        results.append(to_numpy(F.paged_attention(q, *caches, *step, 150, 150, **options)))
    assert np.isfinite(results[0].astype(np.float32)).all()
    assert_same_bits(results[0], results[1], "out")


@pytest.mark.parametrize("layout", ["interleaved", "tokens_first"])
@pytest.mark.parametrize("cache_quant_type", ["none", "block_wise_fp8"])
def test_no_operator_copies_a_cache(place, cache_quant_type, layout):
    """64 MiB of cache and a few tokens: less than an eighth of that is ever allocated."""
    blocks, kv = (1024, 2) if cache_quant_type == "none" else (2048, 2)
    cache = make_cache(cache_quant_type, blocks, kv, 128)
    assert cache.key.nbytes >= 32 << 20
    (key_cache, value_cache, k_scales, v_scales), _ = place_cache(cache, layout, place)
    table = np.arange(blocks)[None, -3:]
    step = [int32(x, place) for x in (table, [0, 2], [120], [2])]
    key = to_paddle(make_values((2, kv, 128), BF16, 1), place)
    q = to_paddle(make_values((2, 2 * kv, 128), BF16, 2), place)
    qkv = to_paddle(make_values((2, 4 * kv * 128), BF16, 3), place)
    outputs = [to_paddle(np.zeros((120, kv, 128), BF16), place) for _ in "kv"]
    scales = {"cache_k_scales": k_scales, "cache_v_scales": v_scales}
    options = {**cache.options, **scales}
    calls = {
        "write_cache_kv": lambda: F.write_cache_kv(
            key, key, key_cache, value_cache, *step, **options
        ),
        "rope_write_cache_kv": lambda: F.rope_write_cache_kv(
            qkv, key_cache, value_cache, None, *step, num_heads=2 * kv, num_kv_heads=kv, **options
        ),
        "paged_attention": lambda: F.paged_attention(
            q, key_cache, value_cache, *step, 2, 122, **options
        ),
    }
    if cache_quant_type != "none":
        calls["append_cache_kv_c8"] = lambda: F.append_cache_kv_c8(
            key_cache, value_cache, *outputs, step[0], step[2], int32([0, 120], place),
            dynamic_quant=True, **options,
        )  # fmt: skip
    if layout in PLANE_LAYOUTS:
        calls["convert_cache_blocks"] = lambda: F.convert_cache_blocks(
            key_cache, kind="k", cache_quant_type=cache_quant_type, src="fastattn",
            dst="fastdeploy", begin=5, end=7,
        )  # fmt: skip
    memory = PeakMemory(place)
    for name, call in calls.items():
        call()  # what a first call sets up is not a copy
        memory.start()
        call()
        assert memory.growth() < cache.key.nbytes // 8, name


def test_peak_memory_sees_a_copy(place):
    """What the test above relies on. So large that no memory of the process is used again."""
    with default_place(place):
        source = paddle.empty([96 << 20], dtype="uint8")
    memory = PeakMemory(place)
    memory.start()
    if place == "cpu":
        source.numpy().copy()
    else:
        with default_place(place):
            paddle.empty([96 << 20], dtype="uint8")
    assert memory.growth() >= 96 << 20


def _write(key_cache, value_cache, **options):
    tokens = paddle.zeros([2, key_cache.shape[1], key_cache.shape[3]], dtype="float32")
    step = [int32(x) for x in ([[0]], [0, 2], [0], [2])]
    return F.write_cache_kv(tokens, tokens, key_cache, value_cache, *step, **options)


def _read(key_cache, value_cache, **options):
    q = paddle.zeros([2, 2 * key_cache.shape[1], key_cache.shape[3]], dtype="bfloat16")
    step = [int32(x) for x in ([[0]], [0, 2], [0], [2])]
    return F.paged_attention(q, key_cache, value_cache, *step, 2, 2, **options)


POOL = [8, 2, 2, 64, 64]  # blocks, K and V, heads, tokens, channels


@pytest.mark.parametrize("call", [_read, _write])
@pytest.mark.parametrize(
    ("strides", "text"),
    [
        ([16384, 4096, 1, 64], r"expected stride 1 in the last dimension, got shape "
         r"\[8, 2, 64, 64\] with strides \[16384, 4096, 1, 64\]"),
        ([16384, 8192, 128, 2], "expected stride 1 in the last dimension"),
        ([0, 4096, 64, 1], "expected positive strides, got shape .* with strides"),
        ([16384, 4096, 0, 1], "expected positive strides"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["key_cache", "value_cache"])
def test_refused_strides(call, strides, text, which):
    pool = paddle.zeros(POOL, dtype="bfloat16")
    good = paddle.zeros([8, 2, 64, 64], dtype="bfloat16")
    bad = strided(pool, [8, 2, 64, 64], strides)
    caches = (bad, good) if which == "key_cache" else (good, bad)
    with pytest.raises(ValueError, match=f"{which}: {text}"):
        call(*caches)


def test_writers_refuse_elements_that_share_memory():
    pool = paddle.zeros(POOL, dtype="bfloat16")
    good = paddle.zeros([8, 2, 64, 64], dtype="bfloat16")
    bad = strided(pool, [8, 2, 64, 64], [16384, 2048, 64, 1])
    with pytest.raises(ValueError, match=r"key_cache: .*no two of its elements may"):
        _write(bad, good)
    _read(bad, good)


def test_k_and_v_of_one_pool_are_apart_and_others_are_not():
    pool = paddle.zeros(POOL, dtype="bfloat16")
    strides = [16384, 4096, 64, 1]
    first, second = (strided(pool, [8, 2, 64, 64], strides, i * 2 * 8192) for i in range(2))
    _write(first, second)
    _write(second, first)
    shared = "must not share memory with key_cache"
    for other in (first, strided(pool, [8, 2, 64, 64], strides, 8192)):
        with pytest.raises(ValueError, match=f"value_cache: .*{shared}"):
            _write(first, other)
    with pytest.raises(ValueError, match=shared):  # the last block of one is the first of the other
        _write(first[:7], strided(pool, [7, 2, 64, 64], strides, 2 * 16384))


def test_rows_of_the_fastdeploy_layout_lie_side_by_side():
    cache = make_cache("cache_fp8", 3, 2, 64)
    placed = Placed([cache.key, cache.value], "gaps", "cpu")
    outputs = [paddle.zeros([5, 2, 64], dtype="bfloat16") for _ in "kv"]
    text = "key_cache: expected the rows of a block and KV head side by side, got shape"
    with pytest.raises(ValueError, match=text):
        F.append_cache_kv_c8(
            *placed.tensors,
            *outputs,
            *(int32(x) for x in ([[0]], [5], [0, 5])),
            cache_k_scales=to_paddle(cache.k_scales),
            cache_v_scales=to_paddle(cache.v_scales),
            dynamic_quant=False,
            cache_layout="fastdeploy",
            **cache.options,
        )
    with pytest.raises(ValueError, match="cache: expected the rows of a block and KV head"):
        F.convert_cache_layout(
            placed.tensors[0], kind="k", cache_quant_type="cache_fp8", src="fastattn", dst="logical"
        )


@pytest.mark.parametrize("call", [_read, _write])
def test_strides_of_scales(call):
    cache = make_cache("block_wise_fp8", 8, 2, 64)
    pool = paddle.ones([8, 2, 64, 2], dtype="float32")
    good = paddle.ones([8, 2, 64], dtype="float32")
    for name in ("cache_k_scales", "cache_v_scales"):
        scales = {"cache_k_scales": good, "cache_v_scales": good + 0}
        scales[name] = strided(pool, [8, 2, 64], [256, 128, 2])
        with pytest.raises(ValueError, match=f"{name}: expected stride 1 in the last dimension"):
            call(to_paddle(cache.key), to_paddle(cache.value), **scales, **cache.options)


def test_alignment(place):
    """Kernels of a GPU move 16 bytes at a time, those of the CPU single elements."""
    memory = to_paddle(np.zeros(1 << 16, BF16), place)
    good = to_paddle(np.zeros((2, 2, 64, 64), BF16), place)
    q = to_paddle(np.zeros((2, 4, 64), BF16), place)
    step = [int32(x, place) for x in ([[0]], [0, 2], [0], [2])]
    for strides, offset, text in (
        ([8192, 4096, 64, 1], 2, "expected an address of a multiple of 16 bytes on a GPU"),
        ([8196, 4096, 64, 1], 0, "expected strides of a multiple of 16 bytes on a GPU"),
        ([8704, 4352, 68, 1], 0, "expected strides of a multiple of 16 bytes on a GPU"),
    ):
        bad = strided(memory, [2, 2, 64, 64], strides, offset)
        if place == "cpu":
            F.paged_attention(q, bad, good, *step, 2, 2)
            continue
        with pytest.raises(ValueError, match=f"key_cache: {text}"):
            F.paged_attention(q, bad, good, *step, 2, 2)


def test_views_as_users_make_them(place):
    """``[num_blocks, 2, 64, KV, D]``, as other packages keep K and V, by slices and a transpose."""
    skip_slices_on(place)
    problem = paged_problem(SEQS, heads=(6, 3), dim=128)
    pool = np.stack([problem.k.packed(), problem.v.packed()], 1).transpose(0, 1, 3, 2, 4)
    memory = to_paddle(pool, place)
    views = [memory[:, i].transpose([0, 2, 1, 3]) for i in range(2)]
    for i, view in enumerate(views):
        assert view.data_ptr() - memory.data_ptr() == i * pool[0, 0].nbytes
    positional, keywords = problem.arguments(place)
    positional[1:3] = views
    out = F.paged_attention(*positional, **keywords)
    assert_same_bits(to_numpy(out), problem.run(place)[0], "out")

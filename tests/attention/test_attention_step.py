"""attention_step: the bits of rope_write_cache_kv and paged_attention in turn, in one call."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import reference
from fastattn.functional._cache_types import codes_per_byte
from fastattn.reference.feedback import feedback_of
from fastattn.reference.rope import make_rotary_embs
from tests.attention.test_gpu_graph import capture
from tests.cache.test_rope_write_cache_errors import ERRORS, arguments, codes, zeros
from tests.support.bounds import assert_error_ratio
from tests.support.cache import Cache, Step, make_cache, make_step, make_values
from tests.support.compare import assert_same_bits
from tests.support.static import run_all_modes
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

H, KV = 4, 2
#: Lengths of ragged sequences: cached and new tokens. Two have no new ones.
CACHED, NEW = [70, 0, 129, 5, 64], [3, 66, 1, 0, 0]
DECODE = [1, 1, 1, 0, 1]
TYPES = [
    ("none", "e4m3"),
    ("cache_int8", "e4m3"),
    ("cache_fp8", "e4m3"),
    ("cache_fp8", "e5m2"),
    ("block_wise_int8", "e4m3"),
    ("block_wise_fp8", "e4m3"),
    ("block_wise_int4", "e4m3"),
    ("block_wise_mxfp4", "e4m3"),
    ("block_wise_k8v4", "e4m3"),
    ("block_wise_kfp8v4", "e4m3"),
]
#: Arguments of rope_write_cache_kv that the attention is not given.
WRITES = {
    *("q_norm_weight", "k_norm_weight", "rms_norm_eps", "use_neox_rotary_style", "rotary_dim"),
    *("qk_norm_before_rope", "qkv_bias", "q_quant", "q_scale", "batch_id_per_token"),
    *("k_rotation", "k_center", "k_feedback"),
}
RNG = np.random.default_rng(11)


@dataclasses.dataclass
class Problem:
    """A step over a cache that holds the keys of the steps before."""

    qkv: np.ndarray
    cache: Cache
    step: Step
    table: np.ndarray
    options: dict[str, Any]  # arrays and plain values

    def on(self, place: str) -> dict[str, Any]:
        """Tensors of the step by name; the cache is a copy."""
        names = ("block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time")
        return {
            "qkv": to_paddle(self.qkv, place),
            "key_cache": to_paddle(self.cache.key.copy(), place),
            "value_cache": to_paddle(self.cache.value.copy(), place),
            "cache_k_scales": self._scales(self.cache.k_scales, place),
            "cache_v_scales": self._scales(self.cache.v_scales, place),
            "rotary_embs": to_paddle(self.table, place),
            **{n: to_paddle(x, place) for n, x in zip(names, self.step.arrays)},
            **{
                name: to_paddle(x, place) if isinstance(x, np.ndarray) else x
                for name, x in self.options.items()
            },
            **self.cache.options,
            "num_heads": H,
            "num_kv_heads": KV,
        }

    @staticmethod
    def _scales(scales, place):
        return None if scales is None else to_paddle(scales.copy(), place)


def make_problem(
    kind=TYPES[0], new=NEW, *, dim=64, dtype=BF16, granularity="head", padding=0, seed=0, **options
) -> Problem:
    step, num_blocks = make_step(CACHED, new, seed=seed)
    cache = make_cache(
        kind[0],
        num_blocks,
        KV,
        dim,
        fp8_format=kind[1],
        dtype=dtype,
        granularity=granularity,
        seed=seed,
    )
    width = (H + 2 * KV) * dim
    table = make_rotary_embs(256, options.get("rotary_dim", dim))
    before = dataclasses.replace(
        step,
        cu_seqlens_q=np.cumsum([0, *CACHED]).astype(np.int32),
        seq_lens_decoder=np.zeros(len(CACHED), np.int32),
        seq_lens_this_time=np.asarray(CACHED, np.int32),
    )
    writes = {name: x for name, x in options.items() if name in WRITES}
    for name in ("q_quant", "q_scale", "batch_id_per_token"):
        writes.pop(name, None)
    qkv = make_values((sum(CACHED), width), dtype, seed + 1)
    reference.rope_write_cache_kv(
        qkv,
        cache.key,
        cache.value,
        table,
        *before.arrays,
        num_heads=H,
        num_kv_heads=KV,
        cache_k_scales=cache.k_scales,
        cache_v_scales=cache.v_scales,
        **cache.options,
        **writes,
    )
    qkv = make_values((sum(new) + padding, width), dtype, seed + 2)
    return Problem(qkv, cache, step, table, options)


def in_one(problem: Problem, place: str, **more) -> tuple[dict[str, Any], Any]:
    given = {**problem.on(place), **more}
    lengths = {"max_seqlen_q": max(NEW), "max_seqlen_k": 200}
    return given, F.attention_step(**lengths | given)


def in_turn(problem: Problem, place: str, **more) -> tuple[dict[str, Any], Any]:
    """The two operators, with the arguments that a caller has to know of."""
    given = {**problem.on(place), **more}
    both = {
        name: given.pop(name)
        for name in (
            *("key_cache", "value_cache", "cache_k_scales", "cache_v_scales", "cache_quant_type"),
            *("fp8_format", "block_tables", "cu_seqlens_q", "seq_lens_decoder"),
            "seq_lens_this_time",
        )
    }
    heads = {name: given.pop(name) for name in ("num_heads", "num_kv_heads", "rotary_embs")}
    qkv = given.pop("qkv")
    write = {name: given.pop(name) for name in list(given) if name in WRITES}
    rotation, center = write.get("k_rotation", "none"), write.get("k_center")
    scores = given.get("sinks") is not None or given.get("return_softmax_lse", False)
    left = center is not None and scores
    q_rotation = "none" if left else rotation
    q, descale = F.rope_write_cache_kv(qkv, q_rotation=q_rotation, **both, **heads, **write)
    if left:
        given.update(k_rotation=rotation, k_center=center)
    if descale is not None and given.get("out_scale") is None and "out_dtype" not in given:
        given["out_dtype"] = str(qkv.dtype).rpartition(".")[2]
    lengths = {"max_seqlen_q": max(NEW), "max_seqlen_k": 200}
    out = given.pop("out", None)
    if out is not None:
        given["out"] = out.reshape([out.shape[0], H, -1])
    result = F.paged_attention(q, q_descale=descale, **both, **lengths | given)
    return both, result


def check(problem: Problem, place: str, **more) -> list[np.ndarray]:
    ours, got = in_one(problem, place, **more)
    theirs, want = in_turn(problem, place, **more)
    got, want = (list(x) if isinstance(x, tuple) else [x] for x in (got, want))
    assert len(got) == len(want) and got[0].shape[1] == H * problem.qkv.shape[1] // (H + 2 * KV)
    found = [to_numpy(x) for x in got]
    wanted = [to_numpy(x) for x in want]
    wanted[0] = wanted[0].reshape(found[0].shape)
    for name, a, b in zip(("out", "softmax_lse"), found, wanted):
        assert a.dtype == b.dtype
        assert_same_bits(a, b, name)
    for name in ("key_cache", "value_cache", "cache_k_scales", "cache_v_scales"):
        if ours[name] is not None:
            assert_same_bits(to_numpy(ours[name]), to_numpy(theirs[name]), name)
    return found


def floats(*shape, low=-1.0, high=1.0):
    return RNG.uniform(low, high, shape).astype(np.float32)


def offsets(new, cached=CACHED) -> np.ndarray:
    """Keys [start, end) of each new token: ranges that begin and end anywhere."""
    rows = []
    for done, n in zip(cached, new):
        for i in range(n):
            end = RNG.integers(1, done + n + 1)
            rows.append([RNG.integers(0, end), end if i % 5 else 0])
    return np.asarray(rows, np.int32).reshape(-1, 2)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: "-".join(kind))
@pytest.mark.parametrize("new", [NEW, DECODE], ids=["mixed", "decode"])
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.few_on_cpu("new", "dim")
def test_every_cache_type(place, kind, new, dim):
    rotation = "hadamard" if 2 in codes_per_byte(kind[0]) else "none"
    check(make_problem(kind, new, dim=dim, k_rotation=rotation, seed=dim), place)


def transforms(kind, dim=64) -> dict[str, dict[str, Any]]:
    """Options by name; a type takes those that suit its codes."""
    gram = floats(KV, 200, dim)
    center = {"k_center": floats(KV, dim)}
    feedback = feedback_of(np.einsum("hti,htj->hij", gram, gram), "none")
    return {
        "rotation": {"k_rotation": "hadamard"},
        "centre": center,
        "both": {"k_rotation": "hadamard", **center},
        "sinks": {"k_rotation": "hadamard", **center, "sinks": floats(H)},
        "lse": {"k_rotation": "hadamard", **center, "return_softmax_lse": True},
        "centre and both": {**center, "sinks": floats(H), "return_softmax_lse": True},
        "feedback": {"k_feedback": feedback},
    }


@pytest.mark.parametrize("name", transforms(TYPES[2]))
@pytest.mark.parametrize("kind", TYPES[1:3] + TYPES[4:7], ids=lambda kind: kind[0])
def test_transformed_keys(place, kind, name):
    check(make_problem(kind, **transforms(kind)[name]), place)


OPTIONS: dict[str, dict[str, Any]] = {
    "bias, norm": {
        "qkv_bias": floats((H + 2 * KV) * 64),
        "q_norm_weight": floats(64, low=0.5, high=2),
        "k_norm_weight": floats(64, low=-2, high=-0.5),
        "rms_norm_eps": 1e-3,
    },
    "norm first": {
        "q_norm_weight": floats(64, low=0.5, high=2),
        "k_norm_weight": floats(64, low=-2, high=-0.5),
        "qk_norm_before_rope": True,
    },
    "neox": {"use_neox_rotary_style": True},
    "part": {"rotary_dim": 32},
    "window": {"window_size": (20, -1)},
    "both sides": {"causal": False, "window_size": (9, 3)},
    "not causal": {"causal": False},
    "softcap": {"softcap": 3.0, "softmax_scale": 0.3},
    "sinks": {"sinks": floats(H), "return_softmax_lse": True},
    "sinks of bf16": {"sinks": floats(H).astype(BF16)},
    "lse": {"return_softmax_lse": True},
    "float32": {"out_dtype": "float32", "return_softmax_lse": True},
    "codes": {"out_scale": floats(1, low=0.01, high=0.02)},
    "invariant": {"batch_invariant": True, "return_softmax_lse": True},
    "per tensor": {"q_quant": "per_tensor", "q_scale": floats(1, low=0.02, high=0.03)},
    "per head": {"q_quant": "per_token_head", "return_softmax_lse": True},
    "codes of both": {"q_quant": "per_token_head", "out_scale": floats(1, low=0.01, high=0.02)},
    "codes, float32": {"q_quant": "per_token_head", "out_dtype": "float32"},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", [TYPES[0], TYPES[2], TYPES[5]], ids=lambda kind: kind[0])
@pytest.mark.parametrize("dtype", [BF16, np.float16], ids=["bf16", "fp16"])
@pytest.mark.few_on_cpu("dtype")
def test_options(place, kind, name, dtype):
    if kind[0] == "none" and "q_quant" in OPTIONS[name]:
        pytest.skip("e4m3 queries need a cache of codes")
    check(make_problem(kind, dtype=dtype, **OPTIONS[name]), place)


@pytest.mark.parametrize("kind", [TYPES[0], TYPES[5]], ids=lambda kind: kind[0])
@pytest.mark.parametrize("new", [NEW, DECODE], ids=["mixed", "decode"])
def test_mask_offsets(place, kind, new):
    problem = make_problem(kind, new, causal=False, mask_offsets=offsets(new))
    check(problem, place, return_softmax_lse=True)


@pytest.mark.parametrize("granularity", ["tensor", "head", "channel"])
def test_granularities_of_static_scales(place, granularity):
    check(make_problem(TYPES[1], granularity=granularity), place)


@pytest.mark.parametrize("given", [False, True])
def test_padding_and_a_given_output(place, given):
    """Padding is 0 in a new output and stays as it is in a given one."""
    problem = make_problem(TYPES[5], padding=3)
    ids = np.repeat(np.arange(5), NEW).astype(np.int32)
    problem.options["batch_id_per_token"] = np.concatenate([ids, [-1] * 3]).astype(np.int32)
    if not given:
        (out,) = check(problem, place)
        assert not out[-3:].astype(np.float32).any()
        return
    held = [to_paddle(np.full([len(problem.qkv), H * 64], 7, BF16), place) for _ in range(2)]
    _, result = in_one(problem, place, out=held[0])
    _, want = in_turn(problem, place, out=held[1])
    assert result.data_ptr() == held[0].data_ptr()
    assert_same_bits(to_numpy(result), to_numpy(want).reshape(result.shape))
    assert (to_numpy(result)[-3:].astype(np.float32) == 7).all()


def test_padding_inside_of_a_sequence(place):
    problem = make_problem(TYPES[5])
    ids = np.repeat(np.arange(5), NEW).astype(np.int32)
    ids[4::7] = -1
    problem.options["batch_id_per_token"] = ids
    check(problem, place)


def test_strided_caches_and_qkv(place):
    """K and V of one pool, and the projection as columns of a wider one."""
    problem = make_problem(TYPES[2])
    plain, want = in_one(problem, place)
    both = np.stack([problem.cache.key, problem.cache.value.reshape(problem.cache.key.shape)], 1)
    pool, wide = to_paddle(both, place), np.zeros([len(problem.qkv), 1024], BF16)
    wide[:, : problem.qkv.shape[1]] = problem.qkv
    halves = pool[:, 0], pool[:, 1]
    qkv = to_paddle(wide, place)[:, : problem.qkv.shape[1]]
    _, got = in_one(problem, place, qkv=qkv, key_cache=halves[0], value_cache=halves[1])
    assert_same_bits(to_numpy(got), to_numpy(want))
    for i, name in enumerate(("key_cache", "value_cache")):
        assert_same_bits(to_numpy(pool)[:, i], to_numpy(plain[name]), name)


@pytest.mark.parametrize("name", ["plain", "sinks", "lse", "bias, norm"])
@pytest.mark.parametrize("kind", [TYPES[0], TYPES[2], TYPES[5], TYPES[6]], ids=lambda k: k[0])
def test_the_model(place, kind, name):
    """The cache bit for bit, the output within the bounds of fp64."""
    options = {**OPTIONS, **transforms(kind), "plain": {}}[name]
    if kind[0] == "none" and "k_center" in options:
        options = {k: x for k, x in options.items() if not k.startswith("k_")}
    problem = make_problem(kind, **options)
    given, got = in_one(problem, place)
    lse = None
    if isinstance(got, tuple):
        got, lse = got
    results = []
    for precision in ("float64", "bfloat16" if place == "gpu" else "float32"):
        cache = problem.cache.copy()
        results.append(
            reference.attention_step(
                problem.qkv,
                cache.key,
                cache.value,
                problem.table,
                *problem.step.arrays,
                num_heads=H,
                num_kv_heads=KV,
                cache_k_scales=cache.k_scales,
                cache_v_scales=cache.v_scales,
                precision=precision,
                **cache.options,
                **{"return_softmax_lse": False, **problem.options},
            )
        )
    (exact, exact_lse), (naive, _) = results
    by_head = [x.reshape(len(x), H, -1) for x in (to_numpy(got), exact, naive)]
    assert_error_ratio(*by_head, "bfloat16", "out")
    if lse is not None:
        np.testing.assert_allclose(to_numpy(lse), exact_lse, rtol=2e-2, atol=2e-2)
    assert_same_bits(to_numpy(given["key_cache"]), cache.key)
    assert_same_bits(to_numpy(given["value_cache"]), cache.value)


def traced_step(qkv, key, value, k_scales, v_scales, table, blocks, cu, cached, new, ids, mask):
    """A call that Paddle can trace."""
    return F.attention_step(
        qkv,
        key,
        value,
        table,
        blocks,
        cu,
        cached,
        new,
        66,
        200,
        num_heads=H,
        num_kv_heads=KV,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        cache_quant_type="block_wise_fp8",
        batch_id_per_token=ids,
        mask_offsets=mask,
        q_quant="per_token_head",
        return_softmax_lse=True,
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_all_modes(place, dynamic):
    problem = make_problem(TYPES[5])
    cache = problem.cache
    arrays = [problem.qkv, cache.key, cache.value, cache.k_scales, cache.v_scales, problem.table]
    arrays += [*problem.step.arrays, np.repeat(np.arange(5), NEW).astype(np.int32), offsets(NEW)]
    outputs, inputs = run_all_modes(traced_step, arrays, place, dynamic=dynamic)
    options = {"mask_offsets": arrays[-1], "q_quant": "per_token_head", "return_softmax_lse": True}
    problem.options.update(options, batch_id_per_token=arrays[-2])
    after, (out, lse) = in_turn(problem, place)
    assert_same_bits(outputs[0], to_numpy(out).reshape(outputs[0].shape))
    assert_same_bits(outputs[1], to_numpy(lse))
    names = ("key_cache", "value_cache", "cache_k_scales", "cache_v_scales")
    for name, got in zip(names, inputs[1:5]):
        assert_same_bits(got, to_numpy(after[name]), name)


def step_with_static_scales(qkv, key, value, k_scales, v_scales, blocks, cu, cached, new):
    seqs = (blocks, cu, cached, new)
    return F.attention_step(
        qkv,
        key,
        value,
        None,
        *seqs,
        66,
        200,
        num_heads=H,
        num_kv_heads=KV,
        cache_k_scales=k_scales,
        cache_v_scales=v_scales,
        cache_quant_type="cache_fp8",
    )


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="asks every operator's gradient")
def test_a_program_in_training_mode():
    """Scales that are parameters want a gradient, and no operator has one."""
    problem = make_problem(TYPES[2])
    given = problem.on("cpu")
    names = ("qkv", "key_cache", "value_cache", "cache_k_scales", "cache_v_scales")
    tensors = [given[name] for name in names] + [int32(x) for x in problem.step.arrays]
    tensors[3].stop_gradient = tensors[4].stop_gradient = False
    program = paddle.jit.to_static(step_with_static_scales, full_graph=True)
    with paddle.no_grad():
        out = program(*tensors)
    _, want = in_turn(problem, "cpu", rotary_embs=None)
    assert_same_bits(to_numpy(out), to_numpy(want).reshape(out.shape))


@pytest.mark.gpu
def test_a_graph():
    """Replays write the caches and the output of whatever its inputs hold then."""
    problem = make_problem(TYPES[5], DECODE)
    given, _ = in_one(problem, "gpu")
    with capture() as graph:
        out = F.attention_step(max_seqlen_q=1, max_seqlen_k=200, **given)
    for seed in (5, 6):
        qkv = make_values(problem.qkv.shape, BF16, seed)
        given["qkv"].copy_(to_paddle(qkv, "gpu"), True)
        graph.replay()
        paddle.device.cuda.synchronize()
        replayed = dataclasses.replace(problem, qkv=qkv)
        _, want = in_one(replayed, "gpu", max_seqlen_q=1)
        assert_same_bits(to_numpy(out), to_numpy(want))
    graph.reset()


def call(**changes):
    return F.attention_step(**{"max_seqlen_q": 2, "max_seqlen_k": 2, **arguments(**changes)})


@pytest.mark.parametrize(
    ("error", "text", "changes"), [e[1:] for e in ERRORS], ids=[e[0] for e in ERRORS]
)
def test_errors_of_the_writer(error, text, changes):
    with pytest.raises(error, match="attention_step: .*" + text):
        call(**changes)


POOL = zeros([1024], "float16")
ATTENTION_ERRORS = {
    "window": (ValueError, "window_size: expected -1", {"window_size": (-2, -1)}),
    "no window": (TypeError, r"window_size: expected \(left, right\)", {"window_size": 3}),
    "softcap": (ValueError, "softcap: expected a finite number of", {"softcap": -1.0}),
    "scale": (ValueError, "softmax_scale: ", {"softmax_scale": float("nan")}),
    "sinks": (ValueError, r"sinks: expected shape \[4\]", {"sinks": zeros([2])}),
    "sinks dtype": (TypeError, "sinks: expected dtype", {"sinks": zeros([4], "float16")}),
    "offsets": (ValueError, r"mask_offsets: expected shape \[2, 2\]", {"mask_offsets": int32([0])}),
    "out": (ValueError, r"out: expected shape \[2, 256\]", {"out": zeros([2, 4, 64], "float16")}),
    "out dtype": (TypeError, "out: expected dtype float16", {"out": zeros([2, 256])}),
    "out_dtype": (ValueError, "out_dtype: expected auto, float32", {"out_dtype": "int8"}),
    "other": (TypeError, "out_dtype: expected float16 as q has", {"out_dtype": "bfloat16"}),
    "out_scale": (ValueError, r"out_scale: expected shape \[1\]", {"out_scale": zeros([2])}),
    "bound": (ValueError, "max_seqlen_k: ", {"max_seqlen_k": -1}),
    "bound of queries": (ValueError, "max_seqlen_q: ", {"max_seqlen_q": -1}),
    "shared out": (
        ValueError,
        "out: it is written and must not share memory with qkv",
        {"qkv": POOL.reshape([2, 512]), "out": POOL[:512].reshape([2, 256])},
    ),
}


@pytest.mark.parametrize(
    ("error", "text", "changes"), ATTENTION_ERRORS.values(), ids=ATTENTION_ERRORS
)
def test_errors_of_the_attention_come_before_the_write(error, text, changes):
    caches = {name: zeros([2, 2, 64, 64], "float16") for name in ("key_cache", "value_cache")}
    ones = {"qkv": to_paddle(np.ones([2, 512], np.float16))}
    with pytest.raises(error, match="attention_step: .*" + text):
        call(**ones | caches | changes)
    for cache in caches.values():
        assert not cache.numpy().any()


CENTER = {"k_center": to_paddle(np.ones([2, 64], np.float32))}


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("k_center: softcap is not supported", {"softcap": 1.0}),
        ("q_quant: 'per_token_head' is not supported with k_center", {"sinks": zeros([4])}),
        ("q_quant: 'per_token_head' is not supported", {"return_softmax_lse": True}),
        ("out: a given output is not supported with k_center and sinks", {"q_quant": "none"}),
    ],
)
def test_what_does_not_go_with_a_centre(text, changes):
    given = {"q_quant": "per_token_head", **changes}
    if given["q_quant"] == "none":
        given.update(sinks=zeros([4]), out=zeros([2, 256], "float16"))
    lengths = {"max_seqlen_q": 2, "max_seqlen_k": 2}
    with pytest.raises(NotImplementedError, match="attention_step: " + text):
        F.attention_step(**codes(**CENTER, **lengths, **given))


@pytest.mark.parametrize("name", ["sinks", "mask_offsets", "out_scale"])
def test_a_cache_that_the_attention_reads_is_refused(name):
    shapes = {"sinks": [4], "mask_offsets": [2, 2], "out_scale": [1]}
    pool = zeros([2 * 2 * 64 * 64], "float32")
    cache = pool.view("float16")[: 2 * 2 * 64 * 64].reshape([2, 2, 64, 64])
    part = pool[: int(np.prod(shapes[name]))].reshape(shapes[name])
    part = part.view("int32") if name == "mask_offsets" else part
    with pytest.raises(ValueError, match=f"key_cache: it is written .* share memory with {name}"):
        call(key_cache=cache, **{name: part})


def test_a_step_without_tokens():
    _, out = in_one(make_problem(TYPES[0], [0] * 5), "cpu")
    assert out.shape == [0, H * 64]


def test_that_a_wrong_scale_would_be_noticed():
    """Of the comparison with the model: V's scales a 64th larger."""
    problem = make_problem(TYPES[2])
    wrong = dataclasses.replace(problem, cache=problem.cache.copy())
    wrong.cache.v_scales *= np.float32(1 + 2**-6)
    outs = [to_numpy(in_one(x, "cpu")[1]) for x in (problem, wrong)]
    exact = np.asarray(outs[0], np.float64)
    with pytest.raises(AssertionError):
        assert_error_ratio(outs[1], exact, exact, "bfloat16", "out")

"""The interpreter itself: PTX written here, against NumPy."""

from __future__ import annotations

import ctypes
import itertools

import ml_dtypes
import numpy as np
import pytest

from tests.support import virtual_gpu

pytestmark = pytest.mark.skipif(
    not virtual_gpu.there(), reason="FASTATTN_LIBRARY names no library for the virtual GPU"
)

REGISTERS = (
    ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %d<20>; "
)
# The thread's number in %r0, its place in arrays of 4 bytes in %d0.
THREAD = (
    "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x; "
    "mad.lo.s32 %r0, %r1, %r2, %r3; mul.wide.u32 %d0, %r0, 4; "
)


def run(body, arrays, threads, *, ctas=1, shared=0, declarations=""):
    """Run a kernel whose parameters are addresses of the arrays, in %d1, %d2 and so on."""
    names = [f"p{i}" for i in range(len(arrays))]
    loads = "".join(f"ld.param.u64 %d{i + 1}, [{name}]; " for i, name in enumerate(names))
    params = ", ".join(f".param .u64 {name}" for name in names)
    text = (
        f".version 9.0\n.target sm_90a\n.address_size 64\n{declarations}\n"
        f".visible .entry k({params})\n{{ {REGISTERS}{loads}{THREAD}\n{body}\nret; }}\n"
    )
    pointers = [ctypes.c_uint64(array.ctypes.data) for array in arrays]
    arguments = (ctypes.c_void_p * len(arrays))(*(ctypes.addressof(p) for p in pointers))
    error = ctypes.create_string_buffer(2000)
    status = virtual_gpu.runtime().virtual_gpu_run(
        text.encode(), b"k", ctas, threads, 1, ctypes.c_int64(shared), arguments, error, 2000
    )
    if status != 0:
        raise RuntimeError(error.value.decode())


def elementwise(instruction, dtype, *inputs):
    """What an instruction makes of %r10, %f10 and so on, in %r20 or %f20, element by element."""
    out = np.zeros(inputs[0].shape, dtype)
    loads = ""
    for i, array in enumerate(inputs):
        kind = "f" if array.dtype == np.float32 else "r"
        move = "f32" if kind == "f" else "b32"
        loads += f"add.s64 %d10, %d{i + 1}, %d0; ld.global.{move} %{kind}{10 + i}, [%d10]; "
    kind, move = ("f", "f32") if dtype == np.float32 else ("r", "b32")
    store = f"add.s64 %d10, %d{len(inputs) + 1}, %d0; st.global.{move} [%d10], %{kind}20;"
    run(f"{loads} {instruction} {store}", [*inputs, out], 64, ctas=out.size // 64)
    return out


def random_words():
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 2**32, 256, dtype=np.uint64).astype(np.uint32) for _ in range(3)]
    edges = np.array([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 31, 32], np.uint32)
    for i, array in enumerate(arrays):
        array[: edges.size**2] = np.resize(np.repeat(edges, edges.size**i % 63 or 1), edges.size**2)
    return arrays


def signed(array):
    return array.astype(np.int32).astype(np.int64)


def low(values):
    return (values & 0xFFFFFFFF).astype(np.uint32)


INTEGER = {
    "add.s32 %r20, %r10, %r11;": lambda a, b, c: low(signed(a) + signed(b)),
    "sub.s32 %r20, %r10, %r11;": lambda a, b, c: low(signed(a) - signed(b)),
    "mul.lo.s32 %r20, %r10, %r11;": lambda a, b, c: low(signed(a) * signed(b)),
    "mul.hi.s32 %r20, %r10, %r11;": lambda a, b, c: low((signed(a) * signed(b)) >> 32),
    "mul.hi.u32 %r20, %r10, %r11;": lambda a, b, c: (
        (a.astype(np.uint64) * b.astype(np.uint64)) >> np.uint64(32)
    ).astype(np.uint32),
    "mad.lo.s32 %r20, %r10, %r11, %r12;": lambda a, b, c: low(signed(a) * signed(b) + signed(c)),
    "max.s32 %r20, %r10, %r11;": lambda a, b, c: low(np.maximum(signed(a), signed(b))),
    "min.u32 %r20, %r10, %r11;": lambda a, b, c: np.minimum(a, b),
    "and.b32 %r20, %r10, %r11;": lambda a, b, c: a & b,
    "not.b32 %r20, %r10;": lambda a, b, c: ~a,
    "shr.s32 %r20, %r10, 5;": lambda a, b, c: low(signed(a) >> 5),
    "shr.u32 %r20, %r10, 40;": lambda a, b, c: np.zeros_like(a),
    "shl.b32 %r20, %r10, 7;": lambda a, b, c: low(a.astype(np.uint64) << np.uint64(7)),
    "shf.l.wrap.b32 %r20, %r10, %r11, 9;": lambda a, b, c: low((b << 9) | (a >> 23)),
    "lop3.b32 %r20, %r10, %r11, %r12, 0xCA;": lambda a, b, c: (a & b) | (~a & c),
    "bfe.u32 %r20, %r10, 3, 9;": lambda a, b, c: (a >> 3) & 0x1FF,
    "bfe.s32 %r20, %r10, 3, 9;": lambda a, b, c: low(((signed((a >> 3) & 0x1FF)) ^ 256) - 256),
    "bfi.b32 %r20, %r10, %r11, 4, 8;": lambda a, b, c: (b & ~np.uint32(0xFF0)) | ((a & 255) << 4),
    "prmt.b32 %r20, %r10, %r11, 0x7531;": lambda a, b, c: (
        (b & 0xFF000000) | ((b & 0xFF00) << 8) | ((a & 0xFF000000) >> 16) | ((a & 0xFF00) >> 8)
    ),
    "popc.b32 %r20, %r10;": lambda a, b, c: np.array([bin(x).count("1") for x in a], np.uint32),
    "clz.b32 %r20, %r10;": lambda a, b, c: np.array([32 - int(x).bit_length() for x in a], "u4"),
    "brev.b32 %r20, %r10;": lambda a, b, c: np.array([int(f"{x:032b}"[::-1], 2) for x in a], "u4"),
    "setp.lt.s32 %p1, %r10, %r11; selp.b32 %r20, %r10, %r12, %p1;": lambda a, b, c: np.where(
        signed(a) < signed(b), a, c
    ),
    "setp.hi.u32 %p1, %r10, %r11; mov.b32 %r20, 9; @!%p1 bra END; mov.b32 %r20, 7; END:": (
        lambda a, b, c: np.where(a > b, 7, 9).astype(np.uint32)
    ),
}


@pytest.mark.parametrize("instruction", INTEGER)
def test_integers(instruction):
    words = random_words()
    np.testing.assert_array_equal(
        elementwise(instruction, np.uint32, *words), INTEGER[instruction](*words)
    )


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_quotients(kind):
    a, b, _ = random_words()
    b |= 1  # never 0, and not -1 beside the lowest number
    b[b == 0xFFFFFFFF] = 3
    got = [elementwise(f"{op}.{kind} %r20, %r10, %r11;", np.uint32, a, b) for op in ("div", "rem")]
    x, y = (signed(a), signed(b)) if kind == "s32" else (a.astype(np.int64), b.astype(np.int64))
    quotient = np.trunc(x / y).astype(np.int64)
    np.testing.assert_array_equal(got[0], low(quotient))
    np.testing.assert_array_equal(got[1], low(x - quotient * y))


def floats():
    rng = np.random.default_rng(2)
    arrays = [(rng.normal(size=256) * 2.0 ** rng.integers(-20, 20, 256)) for _ in range(3)]
    arrays = [array.astype(np.float32) for array in arrays]
    arrays[0][:6] = [0, -0.0, np.inf, -np.inf, np.nan, 1e-42]
    return arrays


FLOAT = {
    "add.f32 %f20, %f10, %f11;": lambda a, b, c: a + b,
    "mul.f32 %f20, %f10, %f11;": lambda a, b, c: a * b,
    "fma.rn.f32 %f20, %f10, %f11, %f12;": lambda a, b, c: (
        a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)
    ).astype(np.float32),
    "div.rn.f32 %f20, %f10, %f11;": lambda a, b, c: a / b,
    "max.f32 %f20, %f10, %f11;": np.fmax,
    "max.NaN.f32 %f20, %f10, %f11;": np.maximum,
    "neg.f32 %f20, %f10;": lambda a, b, c: -a,
    "abs.f32 %f20, %f10;": lambda a, b, c: np.abs(a),
    "sqrt.rn.f32 %f20, %f12;": lambda a, b, c: np.sqrt(c),
    "add.ftz.f32 %f20, %f10, 0f00000000;": lambda a, b, c: np.where(np.abs(a) < 1e-38, 0, a),
}


@pytest.mark.parametrize("instruction", FLOAT)
@np.errstate(all="ignore")
def test_floating_point(instruction):
    a, b, c = floats()
    c = np.abs(c) if "sqrt" in instruction else c
    expected = FLOAT[instruction](a, b) if "max" in instruction else FLOAT[instruction](a, b, c)
    got = elementwise(instruction, np.float32, a, b, c)
    np.testing.assert_array_equal(got, expected.astype(np.float32))


@pytest.mark.parametrize(
    "word, dtype",
    [
        ("f16x2", np.float16),
        ("bf16x2", ml_dtypes.bfloat16),
        ("satfinite.e4m3x2", ml_dtypes.float8_e4m3fn),
        ("satfinite.e5m2x2", ml_dtypes.float8_e5m2),
    ],
)
@np.errstate(all="ignore")
def test_narrow_floating_point(word, dtype):
    a, b, _ = floats()
    limit = float(ml_dtypes.finfo(dtype).max)
    if "satfinite" in word:
        a, b = np.clip(a, -limit, limit), np.clip(b, -limit, limit)
    body = f"cvt.rn.{word}.f32 %r20, %f10, %f11;"
    if "x2" in word and np.dtype(dtype).itemsize == 1:
        body = f"cvt.rn.{word}.f32 %h1, %f10, %f11; cvt.u32.u16 %r20, %h1;"
    got = elementwise(body, np.uint32, a, b)
    unsigned = f"u{np.dtype(dtype).itemsize}"
    codes = [x.astype(dtype).view(unsigned).astype(np.uint32) for x in (a, b)]
    bits = 8 * np.dtype(dtype).itemsize
    keep = ~np.isnan(a)
    np.testing.assert_array_equal(got[keep], ((codes[0] << bits) | codes[1])[keep])


def test_lanes_that_diverge_meet_again():
    """Steps of the Collatz sequence, a loop of another length in every lane, then a sum."""
    start = np.arange(1, 129, dtype=np.uint32)
    out = np.zeros(128, np.uint32)
    body = """
        add.s64 %d10, %d1, %d0; ld.global.u32 %r10, [%d10]; mov.b32 %r11, 0;
    LOOP: setp.le.u32 %p1, %r10, 1; @%p1 bra DONE;
        add.s32 %r11, %r11, 1; and.b32 %r12, %r10, 1; setp.eq.s32 %p2, %r12, 0; @%p2 bra EVEN;
        mad.lo.s32 %r10, %r10, 3, 1; bra LOOP;
    EVEN: shr.u32 %r10, %r10, 1; bra LOOP;
    DONE: redux.sync.add.u32 %r13, %r11, 0xffffffff;
        add.s64 %d10, %d2, %d0; st.global.u32 [%d10], %r13;
    """
    run(body, [start, out], 128)
    steps = []
    for value in start.tolist():
        count = 0
        while value > 1:
            value, count = (3 * value + 1 if value % 2 else value // 2), count + 1
        steps.append(count)
    np.testing.assert_array_equal(out, np.repeat(np.reshape(steps, (4, 32)).sum(1), 32))


@pytest.mark.parametrize("mode", ["bfly", "up", "down", "idx"])
def test_shuffles(mode):
    values = np.arange(100, 164, dtype=np.uint32)
    out = np.zeros(64, np.uint32)
    clamp = 0 if mode == "up" else 31
    body = f"""
        add.s64 %d10, %d1, %d0; ld.global.u32 %r10, [%d10];
        shfl.sync.{mode}.b32 %r11|%p1, %r10, 3, {clamp}, -1;
        selp.b32 %r12, 1000, 0, %p1; add.s32 %r11, %r11, %r12;
        add.s64 %d10, %d2, %d0; st.global.u32 [%d10], %r11;
    """
    run(body, [values, out], 64)
    lanes = np.arange(32)
    source = {"bfly": lanes ^ 3, "up": lanes - 3, "down": lanes + 3, "idx": np.full(32, 3)}[mode]
    inside = (source >= 0) & (source < 32)
    one = np.where(inside, source, lanes)
    expected = values.reshape(2, 32)[:, one] + np.where(inside, 1000, 0)
    np.testing.assert_array_equal(out, expected.reshape(-1))


def test_shared_memory_and_barriers():
    """Each thread reads what its opposite in the CTA wrote; bar.red counts the odd ones."""
    values = np.arange(192, dtype=np.uint32) * 7
    out = np.zeros(192, np.uint32)
    body = """
        add.s64 %d10, %d1, %d0; ld.global.u32 %r10, [%d10];
        mov.u32 %r11, memory; shl.b32 %r12, %r3, 2; add.s32 %r13, %r11, %r12;
        st.shared.u32 [%r13], %r10;
        and.b32 %r14, %r3, 1; setp.ne.s32 %p1, %r14, 0; bar.red.popc.u32 %r15, 0, %p1;
        sub.s32 %r16, %r2, %r3; shl.b32 %r16, %r16, 2; add.s32 %r16, %r11, %r16;
        ld.shared.u32 %r17, [%r16+-4]; add.s32 %r17, %r17, %r15;
        add.s64 %d10, %d2, %d0; st.global.u32 [%d10], %r17;
    """
    run(
        body, [values, out], 96, ctas=2, shared=96 * 4,
        declarations=".extern .shared .align 16 .b8 memory[];",
    )  # fmt: skip
    expected = values.reshape(2, 96)[:, ::-1] + 48
    np.testing.assert_array_equal(out, expected.reshape(-1))


def test_a_product_of_tensor_cores():
    """m16n8k16 of bf16: fragments as the PTX ISA has them."""
    rng = np.random.default_rng(3)
    a = rng.normal(size=(16, 16)).astype(ml_dtypes.bfloat16)
    b = rng.normal(size=(16, 8)).astype(ml_dtypes.bfloat16)
    out = np.zeros((16, 8), np.float32)
    fragments_a, fragments_b = np.zeros((32, 4), "u4"), np.zeros((32, 2), "u4")
    for lane, half in itertools.product(range(32), range(4)):
        row, column = lane // 4 + 8 * (half % 2), lane % 4 * 2 + 8 * (half // 2)
        fragments_a[lane, half] = a[row, column : column + 2].view("u4")[0]
    for lane, half in itertools.product(range(32), range(2)):
        row = lane % 4 * 2 + 8 * half
        fragments_b[lane, half] = np.ascontiguousarray(b[row : row + 2, lane // 4]).view("u4")[0]
    body = """
        mul.wide.u32 %d11, %r0, 16; add.s64 %d11, %d1, %d11;
        ld.global.v4.u32 {%r10, %r11, %r12, %r13}, [%d11];
        mul.wide.u32 %d12, %r0, 8; add.s64 %d12, %d2, %d12;
        ld.global.v2.u32 {%r14, %r15}, [%d12]; mov.f32 %f1, 0f3F800000;
        mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f10, %f11, %f12, %f13},
            {%r10, %r11, %r12, %r13}, {%r14, %r15}, {%f1, %f1, %f1, %f1};
        shr.u32 %r20, %r0, 2; and.b32 %r21, %r0, 3; shl.b32 %r20, %r20, 5; shl.b32 %r21, %r21, 3;
        add.s32 %r22, %r20, %r21; cvt.u64.u32 %d13, %r22; add.s64 %d13, %d3, %d13;
        st.global.v2.f32 [%d13], {%f10, %f11}; st.global.v2.f32 [%d13+256], {%f12, %f13};
    """
    run(body, [fragments_a, fragments_b, out], 32)
    expected = a.astype(np.float64) @ b.astype(np.float64) + 1
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "body, message",
    [
        # a barrier that nobody else comes to
        ("setp.lt.u32 %p1, %r3, 32; @%p1 bar.sync 1, 64;", "no thread goes on"),
        ("mov.u32 %r10, memory; ld.shared.u32 %r11, [%r10+64];", "of shared memory"),
        ("mov.u32 %r10, memory; ld.shared.v2.u32 {%r11, %r12}, [%r10+4];", "aligned to 8"),
        ("ld.global.u32 %r11, [%d15];", "global address"),
        ("mbarrier.init.shared::cta.b64 [0], 1; LOOP: mbarrier.try_wait.parity.shared::cta.b64 "
         "%p1, [0], 0; @!%p1 bra LOOP;", "no thread goes on"),
        ("add.s31 %r1, %r1, %r1;", "does not know"),
        ("setp.lt.f16x2 %p1|%p2, %r1, %r2;", "no such instruction"),
        ("red.global.add.noftz.bf16x2 [%d1], %r1;", "an atomic operation on this type"),
    ],
)  # fmt: skip
def test_faults_are_told(body, message):
    unused = np.zeros(4, np.uint32)
    body = "mov.b64 %d15, 16; " + body
    with pytest.raises(RuntimeError, match=message):
        run(
            body, [unused], 64, shared=64,
            declarations=".extern .shared .align 16 .b8 memory[];",
        )  # fmt: skip


def test_the_comparison_can_fail():
    words = random_words()
    got = elementwise("add.s32 %r20, %r10, %r11;", np.uint32, *words)
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(got, INTEGER["sub.s32 %r20, %r10, %r11;"](*words))

"""Calls around Paddle's registry: results and errors as through it, and nothing registered."""

from __future__ import annotations

import textwrap
import warnings

import numpy as np
import paddle
import pytest

import fastattn.functional as F
from fastattn import _ops, _views
from tests.support import fresh
from tests.support.calls import CALLS, OPERATORS, make_call
from tests.support.compare import assert_same_bits
from tests.support.tensors import to_numpy

DIRECT = _ops._load_direct()[0] is not None
pytestmark = pytest.mark.skipif(not DIRECT, reason="built without Python.h")


@pytest.fixture
def registry(monkeypatch):
    """All calls go through Paddle's registry."""
    monkeypatch.setattr(_ops, "_load_direct", lambda: (None, {}))


@pytest.mark.parametrize("op", OPERATORS)
def test_facts_are_those_of_the_registration(op):
    direct, registered = _ops.signature(op), _ops.registered_signature(op)
    assert direct.attrs == tuple(a.split(":")[0].strip() for a in registered.attrs)
    assert direct._replace(attrs=()) == registered._replace(attrs=())


@pytest.mark.parametrize("name", CALLS)
def test_both_ways_give_the_same_bits(name, place, monkeypatch):
    got = make_call(name, place)()
    monkeypatch.setattr(_ops, "_load_direct", lambda: (None, {}))
    for i, (a, b) in enumerate(zip(got, make_call(name, place)(), strict=True)):
        assert_same_bits(to_numpy(a), to_numpy(b), f"{name}: result {i}")


def run(code: str) -> str:
    done = fresh.run(textwrap.dedent(code))
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_dygraph_registers_nothing_and_a_program_does():
    out = run(
        """
        import numpy as np
        import paddle
        from fastattn import functional as F

        paddle.set_device("cpu")
        raw = paddle.base.core.eager._run_custom_op
        x = paddle.ones([2, 64])
        expected = F.quantize_fp8(x, granularity="token")[0].numpy()
        try:
            raw("fastattn_quantize_fp8", x, None, None, "token", 128)
        except (RuntimeError, ValueError, OSError) as error:
            print("unknown" if "fastattn_quantize_fp8" in str(error) else error)
        paddle.enable_static()
        program = paddle.static.Program()
        with paddle.static.program_guard(program):
            codes, _ = F.quantize_fp8(paddle.static.data("x", [2, 64]), granularity="token")
            feed = {"x": np.ones([2, 64], "float32")}
            (got,) = paddle.static.Executor().run(program, feed=feed, fetch_list=[codes])
        paddle.disable_static()
        print((got == expected).all(), list(F.quantize_fp8(x, granularity="token")[0].shape))
        raw("fastattn_quantize_fp8", x, None, None, "token", 128)
        """
    )
    assert out.splitlines() == ["unknown", "True [2, 64]"]


X = paddle.ones([4, 256])
BAD = {
    "None": lambda: F.quantize_fp8(None),
    "no tensor": lambda: F.quantize_fp8(np.ones([4, 256], np.float32)),
    "name": lambda: F.quantize_fp8(X, granularity="row"),
    "number for a name": lambda: F.quantize_fp8(X, granularity=3),
    "string for a number": lambda: F.quantize_fp8(X, granularity="group", group_size="64"),
    "bool for a number": lambda: F.quantize_fp8(X, granularity="group", group_size=True),
    "dtype": lambda: F.quantize_fp8(X.astype("int32")),
    "shape": lambda: F.quantize_fp8(X, paddle.ones([2])),
    "empty optional": lambda: F.quantize_fp8(X, paddle.ones([0])),
    "kind": lambda: F.convert_cache_layout(X, kind="q", cache_quant_type="none", src="a", dst="b"),
    "zero dimensions": lambda: F.quantize_fp8(X, paddle.to_tensor(1.0)),
}


@pytest.mark.parametrize("case", BAD)
def test_both_ways_refuse_alike(case, monkeypatch):
    errors = []
    for _ in range(2):
        with pytest.raises((TypeError, ValueError, NotImplementedError)) as caught:
            BAD[case]()
        errors.append((type(caught.value), str(caught.value)))
        monkeypatch.setattr(_ops, "_load_direct", lambda: (None, {}))
    assert errors[0] == errors[1]


def test_numbers_of_numpy_are_numbers():
    expected = F.quantize_fp8(X, granularity="group", group_size=64)
    got = F.quantize_fp8(X, granularity="group", group_size=np.int64(64))
    for a, b in zip(got, expected):
        assert_same_bits(to_numpy(a), to_numpy(b))


def test_integers_beyond_a_float_are_refused():
    q, weights = paddle.ones([1, 2, 128], "bfloat16"), paddle.ones([1, 2])
    text = "indexer_q_quant: factor: expected a finite float"
    with pytest.raises(ValueError, match=text):
        F.indexer_q_quant(q, weights, factor=10**400)
    q, cu = paddle.ones([1, 1, 64]), paddle.to_tensor([0, 1], "int32")
    with pytest.raises(ValueError, match="flash_attention: softmax_scale: expected a"):
        F.flash_attention(q, q, q, cu, cu, 1, 1, softmax_scale=-(10**400))
    with pytest.raises(ValueError, match=text):
        _ops.call("indexer_q_quant", (q, weights, None), (10**400,))


def test_memory_that_runs_out_is_a_memory_error():
    sig = _ops.signature("quantize_fp8")
    for text in ("\n\nResourceExhaustedError: Fail to alloc memory of 9 size.", "out of memory"):
        with pytest.raises(MemoryError, match="quantize_fp8"):
            _ops.reraise_of(sig, RuntimeError(text))


def test_a_library_of_another_build_is_refused(tmp_path):
    library = tmp_path / "other.so"
    library.write_bytes(b"\x7fELF no library")
    module = _ops._direct_module(_ops.library_path())
    with pytest.raises(RuntimeError, match=r"other\.so"):
        module.bind(str(library))
    with pytest.raises(RuntimeError, match="has no table of operators"):
        module.bind("libm.so.6")


@pytest.mark.parametrize("arguments", [(), (0,), (99, (), (), None), (0, (), (), None)])
def test_a_raw_call_that_is_wrong_raises(arguments):
    run_, _ = _ops._load_direct()
    with pytest.raises(TypeError):
        run_(*arguments)


class TestGradients:
    """The operators have none, and say so once."""

    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch):
        monkeypatch.setattr(_ops, "_told_no_gradient", set())

    @pytest.fixture(params=["direct", "registry"], autouse=True)
    def _way(self, request):
        if request.param == "registry":
            request.getfixturevalue("registry")

    def test_one_warning_names_the_operator(self):
        x = paddle.ones([2, 64])
        x.stop_gradient = False
        with pytest.warns(RuntimeWarning, match=r"^quantize_fp8: x wants a gradient") as caught:
            F.quantize_fp8(x)
            F.quantize_fp8(x)
        assert len(caught) == 1 and caught[0].filename == __file__
        lse = paddle.zeros([1, 2])
        x3 = paddle.ones([2, 1, 64])
        x3.stop_gradient = False
        with pytest.warns(RuntimeWarning, match=r"^merge_attn_states: suffix_output wants"):
            F.merge_attn_states(x3.detach(), lse, x3, lse)

    def test_no_warning_where_gradients_are_off(self):
        x = paddle.ones([2, 64])
        y = paddle.ones([2, 64])
        y.stop_gradient = False
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            F.quantize_fp8(x)
            with paddle.no_grad():
                F.quantize_fp8(y)

    def test_what_is_written_may_not_want_one(self):
        x, output = paddle.ones([2, 64]), paddle.zeros([2, 64], "uint8")
        output.stop_gradient = False
        with pytest.raises(ValueError, match=r"output: .* must have stop_gradient = True"):
            F.quantize_fp8(x, output=output)


def test_a_strided_output_is_written_where_it_lies():
    rng = np.random.default_rng(3)
    sides = [paddle.to_tensor(rng.normal(size=(5, 3, 64)).astype(np.float32)) for _ in range(2)]
    lses = [paddle.to_tensor(rng.normal(size=(3, 5)).astype(np.float32)) for _ in range(2)]
    expected, _ = F.merge_attn_states(sides[0], lses[0], sides[1], lses[1])
    pool = paddle.full([5, 7, 64], 9.0)
    output = pool[:, 2:5]
    if output.is_contiguous():
        pytest.skip("this Paddle copies slices")
    got, _ = F.merge_attn_states(sides[0], lses[0], sides[1], lses[1], output=output)
    assert_same_bits(to_numpy(got), to_numpy(expected))
    assert_same_bits(to_numpy(pool)[:, 2:5], to_numpy(expected))
    assert (to_numpy(pool)[:, [0, 1, 5, 6]] == 9).all()


def test_threads_that_make_the_first_call_bind_once():
    out = run(
        """
        import sys, threading
        import paddle
        from fastattn import _ops, functional as F

        paddle.set_device("cpu")
        counts = []
        load = _ops._load_library
        _ops._load_library = lambda: counts.append(1) or load()
        sys.setswitchinterval(1e-6)
        barrier = threading.Barrier(8)
        x = paddle.ones([2, 64])
        results = []

        def first():
            barrier.wait()
            results.append(F.quantize_fp8(x, granularity="token")[0])

        threads = [threading.Thread(target=first) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(len(counts), len(results))
        """
    )
    assert out.split() == ["1", "8"]


def test_a_tensor_that_is_cleared_during_a_call_stays_until_its_end():
    out = run(
        """
        import threading, time
        import numpy as np
        import paddle
        import fastattn.functional as F

        paddle.set_device("cpu")
        array = np.random.default_rng(0).normal(size=(8192, 1024)).astype(np.float32)
        expected = F.quantize_fp8(paddle.to_tensor(array), granularity="token")[0].numpy()
        results = []
        for _ in range(10):
            x = paddle.to_tensor(array)
            thread = threading.Thread(
                target=lambda x=x: results.append(F.quantize_fp8(x, granularity="token")[0])
            )
            thread.start()
            time.sleep(0.003)  # the kernel takes several times as long
            x._clear()
            thread.join()
        print(len(results), all((r.numpy() == expected).all() for r in results))
        """
    )
    assert out.split()[1] == "True" and int(out.split()[0]) > 0


def test_a_tensor_without_data_is_declined():
    x = paddle.ones([2, 3, 4])
    x._clear_data()
    assert _ops.helpers().flat(x) is None


def test_a_flat_view_keeps_what_its_source_had():
    x = paddle.arange(4096, dtype="float32").reshape([4, 2, 512])
    flat = _views.flat(x)
    x.cast_("float64")
    junk = [paddle.full([4, 2, 512], 9.0) for _ in range(20)]
    assert (flat.numpy().reshape(-1) == np.arange(4096)).all() and junk


@pytest.fixture(params=["direct", "paddle"])
def views(request, monkeypatch):
    """Views as ``_direct`` makes them, and as Paddle does where that was not built."""
    if request.param == "paddle":
        monkeypatch.setattr(_ops, "helpers", lambda: None)


PADDLE_2 = paddle.__version__.startswith("2.")
ARRAY = np.arange(240, dtype=np.float32).reshape([4, 6, 10])


@pytest.mark.parametrize(
    "shape", [[24, 10], [4, 60], [240], [2, 2, 3, 1, 20], [-1], [-1, 10], [2, -1, 5], [4, 60, -1]]
)
def test_a_view_has_the_memory_of_its_source(views, shape):
    x = paddle.to_tensor(ARRAY)
    half = [-1 if shape[0] == -1 else shape[0] // 2, *shape[1:]]
    for source, array, wanted in ((x, ARRAY, shape), (x[1:3], ARRAY[1:3], half)):
        view = _views.view(source, wanted)
        assert_same_bits(to_numpy(view), array.reshape(wanted))
        assert view.data_ptr() == source.data_ptr()
    x.zero_()
    assert not to_numpy(_views.view(x, shape)).any()


def test_a_tensor_is_its_own_view():
    x = paddle.to_tensor(ARRAY)
    strided = x.transpose([1, 0, 2])
    assert (
        _views.view(x, [4, 6, 10]) is x
        and _views.view(x, [4, -1, 10]) is x
        and _views.view(strided, [6, 4, 10]) is strided
    )


def test_a_view_of_a_strided_tensor_has_its_elements_in_order(views):
    strided = paddle.to_tensor(ARRAY).transpose([2, 0, 1])
    got = to_numpy(_views.view(strided, [5, 48]))
    assert_same_bits(got, np.ascontiguousarray(ARRAY.transpose(2, 0, 1)).reshape(5, 48))


def test_a_view_passes_a_gradient_on(views):
    x, factors = paddle.to_tensor(ARRAY, stop_gradient=False), paddle.to_tensor(ARRAY[::-1].copy())
    (_views.view(x, [24, 10]) * factors.reshape([24, 10])).sum().backward()
    assert_same_bits(to_numpy(x.grad), ARRAY[::-1].copy())


def test_a_view_outlives_what_its_source_was(views):
    x = paddle.to_tensor(ARRAY)
    view, some = _views.view(x, [240]), _views.strided_view(x, [2, 3], [100, 7], 5)
    x.cast_("float64")
    junk = [paddle.full([4, 6, 10], 9.0) for _ in range(20)]
    assert_same_bits(to_numpy(view), ARRAY.reshape(240))
    assert some.tolist() == [[5, 12, 19], [105, 112, 119]] and junk


def check_strided_view(dtype: str, begin: int = 0) -> None:
    """A view of what a buffer has from element `begin` on, read and written."""
    values = np.arange(1, 301) % 128
    buffer = paddle.to_tensor(values, "float32").astype(dtype)
    view = _views.strided_view(buffer[begin:] if begin else buffer, [2, 3, 5], [100, 10, 2], 30)
    assert list(view.shape) == [2, 3, 5] and list(view.strides) == [100, 10, 2]
    i, j, k = np.indices([2, 3, 5])
    where = begin + 30 + 100 * i + 10 * j + 2 * k
    assert (view.astype("int32").numpy() == values[where]).all()
    view.zero_()
    values[where] = 0
    assert (buffer.astype("int32").numpy() == values).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "uint8"])
def test_a_view_with_strides(views, dtype):
    check_strided_view(dtype)


@pytest.mark.skipif(PADDLE_2, reason="Paddle 2.6 counts from the beginning of what is viewed")
def test_a_view_with_strides_of_a_view():
    check_strided_view("bfloat16", 7)


@pytest.mark.parametrize(
    "arguments",
    [
        ([2, 3], [10, 1], 228),  # ends one element behind the last
        ([2, 3], [10, 1], -1),
        ([2, 3], [-10, 1], 100),
        ([2, 3], [10], 0),
        ([2, 3], [2**62, 2**62], 0),
        ([2, 0], [10, 1], 0),
        ([2, 3], (10, 1), 0),
        ([2, 3], [10, 1], 0.0),
        ([2, 3], [10, 1]),
        ([239],),
        ([-240],),
        ([-2, -120],),
        ([-1, -1],),
        ([-1, 7],),
        ([-1, 0],),
        ([-1, 2**32, 2**32],),
        ([-1, 480],),
        ([2**32, 2**32],),
        ([240.0],),
        ([240, True],),
        ((240,),),
        ([1] * 9 + [240],),
        (None,),
    ],
)
def test_what_is_no_view_is_declined(arguments):
    x = paddle.to_tensor(ARRAY)
    assert _ops.helpers().view(x, *arguments) is None
    last = _ops.helpers().view(x, [2, 3], [10, 1], 227)
    if PADDLE_2:  # has no strides that another tensor could be made with
        assert last is None
    else:
        assert last.tolist() == [[227, 228, 229], [237, 238, 239]]


@pytest.mark.parametrize(
    "make",
    [
        lambda: None,
        lambda: ARRAY,
        lambda: paddle.zeros([0, 240]),
        lambda: paddle.to_tensor(ARRAY).transpose([1, 0, 2]),
        lambda: paddle.to_tensor(ARRAY, stop_gradient=False),
    ],
)
def test_what_has_no_view_is_declined(make):
    assert _ops.helpers().view(make(), [240]) is None
    assert _ops.helpers().view(make(), [2, 3], [10, 1], 0) is None
    x = paddle.to_tensor(ARRAY)
    x._clear_data()
    assert _ops.helpers().view(x, [240]) is None


def test_a_sparse_tensor_is_refused_by_name():
    sparse = paddle.sparse.sparse_coo_tensor([[0, 1], [1, 2]], [1.0, 2.0], [4, 256])
    with pytest.raises(TypeError, match="quantize_fp8: x: expected a dense tensor, got a sparse"):
        F.quantize_fp8(sparse)

"""Operators in several threads at once, and in a process that is forked."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import fastattn.functional as F
from tests.support import fresh
from tests.support.compare import assert_same_bits
from tests.support.tensors import int32, to_numpy, to_paddle


def test_threads_may_call_at_once(place):
    rng = np.random.default_rng(0)
    q, k, v = (to_paddle(rng.normal(size=(300, 4, 64)).astype(np.float16), place) for _ in range(3))
    x = to_paddle(rng.normal(size=(2048, 256)).astype(np.float32), place)
    lengths = int32([0, 300], place)

    def run():
        out = F.flash_attention(q, k, v, lengths, lengths, 300, 300)
        return (out, *F.quantize_fp8(x, granularity="token"))

    expected = [to_numpy(t) for t in run()]
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(run() for _ in range(5))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 20
    for result in results:
        for tensor, array in zip(result, expected):
            assert_same_bits(to_numpy(tensor), array)


def test_a_forked_process_may_call():
    # OpenMP's threads do not exist in the child; waiting for them would be for ever.
    code = """
        import os
        import paddle
        import fastattn.functional as F
        paddle.set_device("cpu")
        x = paddle.ones([4096, 512])
        F.quantize_fp8(x, granularity="token")
        child = os.fork()
        codes, _ = F.quantize_fp8(x, granularity="token")
        same = bool((codes.numpy() == 0x7E).all())
        if child == 0:
            os._exit(0 if same else 1)
        _, status = os.waitpid(child, 0)
        assert same and status == 0, status
    """
    done = fresh.run(textwrap.dedent(code), timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("load_first", [False, True], ids=["load_in_child", "load_in_parent"])
def test_a_forked_process_may_be_the_first_to_call(tmp_path, load_first):
    """The parent's threads were those of another user of OpenMP."""
    source = tmp_path / "threads.cc"
    source.write_text(
        """
        extern "C" int count_threads() {
          int count = 0;
        #pragma omp parallel num_threads(4) reduction(+ : count)
          count += 1;
          return count;
        }
        """
    )
    library = tmp_path / "threads.so"
    build = ["g++", "-shared", "-fPIC", "-fopenmp", "-o", str(library), str(source)]
    subprocess.run(build, check=True, timeout=120)
    code = f"""
        import ctypes, os, signal
        import numpy as np
        import paddle
        import fastattn.functional as F
        from fastattn import _ops
        paddle.set_device("cpu")
        x = paddle.to_tensor(np.ones([8192, 4096], np.float32))
        if {load_first}:
            _ops.load()
        assert ctypes.CDLL({str(library)!r}).count_threads() == 4
        child = os.fork()
        if child == 0:
            signal.alarm(60)  # it ends a child that waits for ever
            codes, _ = F.quantize_fp8(x, granularity="token")
            os._exit(0 if bool((codes.numpy() == 0x7E).all()) else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0, status
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "4"}
    run = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(run, check=True, timeout=120, env=environment)


TRACED_ERRORS = {
    "shape function": "F.quantize_fp8(x, granularity='row')",
    "group": "F.quantize_fp8(x, granularity='group', group_size=7)",
    "layout": "F.convert_cache_layout(x, kind='q', cache_quant_type='none', src='a', dst='b')",
    "rank": "F.rope_write_cache_kv(x, x, x, None, x, x, x, x, num_heads=1, num_kv_heads=1)",
    "q_quant": "F.rope_write_cache_kv(h, c, c, None, i, i, i, i, num_heads=1, num_kv_heads=1, "
    "q_quant='q')",
    "attribute type": "F.quantize_fp8(x, granularity=3)",
    "attribute bool": "F.flash_attention(c, c, c, i, i, 1, 1, causal='x')",
    "attribute range": "F.quantize_fp8(x, group_size=2**40)",
    "dtype name": "F.mxfp4_dequantize(x, x, dtype='q')",
    "eager tensor": "F.quantize_fp8(x, EAGER)",
    "eager x": "F.quantize_fp8(EAGER)",
    "quant name": "F.indexer_q_rope_quant(x, x, x, x, 1.0, 1.0, quant='q')",
    "quant rank": "F.indexer_q_rope_quant(x, x, x, x, 1.0, 1.0)",
    "numpy string": "F.flash_attention(c, c, c, i, i, 1, 1, softmax_scale=np.str_('1'))",
}


def test_errors_in_a_traced_program_do_not_end_the_process():
    # Each is refused while it is traced, or by the kernel when the program runs (of which Paddle 3
    # tells no more than "std::exception").
    code = f"""
        import numpy as np
        import paddle
        import fastattn.functional as F
        paddle.set_device("cpu")
        EAGER = paddle.to_tensor([2.0])
        paddle.enable_static()
        for name, text in {TRACED_ERRORS!r}.items():
            program = paddle.static.Program()
            with paddle.static.program_guard(program):
                x = paddle.static.data("x", [4, 256], "float32")
                h = paddle.static.data("h", [4, 192], "float16")
                c = paddle.static.data("c", [4, 1, 64, 64], "float16")
                i = paddle.static.data("i", [4], "int32")
                feed = dict(
                    x=np.ones([4, 256], "float32"), h=np.ones([4, 192], "float16"),
                    c=np.ones([4, 1, 64, 64], "float16"), i=np.ones([4], "int32"),
                )
                try:
                    result = eval(text)
                    result = result[0] if isinstance(result, tuple) else result
                    paddle.static.Executor(paddle.CPUPlace()).run(
                        program, feed=feed, fetch_list=[result]
                    )
                except (TypeError, ValueError, RuntimeError, OSError, NotImplementedError) as error:
                    print("refused:", name, type(error).__name__, str(error)[:99])
                else:
                    raise AssertionError(name)
    """
    done = fresh.run(textwrap.dedent(code), timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("refused: ") == len(TRACED_ERRORS), done.stdout

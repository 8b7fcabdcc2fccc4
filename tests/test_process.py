"""Operators in several threads at once, and in a process that is forked."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading

import numpy as np

import fastattn.functional as F
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
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, timeout=120)

"""A CPU kernel that gets no memory raises MemoryError, in whichever thread it happens."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from fastattn import _ops

LIMITED = """
    import resource
    import paddle
    import fastattn.functional as F

    paddle.set_device("cpu")
    rows, columns = 4, 2**22
    logits = paddle.zeros([rows, columns])
    lengths = paddle.full([rows], columns, "int32")
    few = paddle.full([rows], 100, "int32")
    F.quantize_fp8(paddle.ones([4096, 512]), granularity="token")  # starts the threads
    F.topk_indices(logits, lengths, 5)
    F.topk_indices(logits[:, :100], few, 5)
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (8 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        F.topk_indices(logits, lengths, 5)
    except MemoryError as error:
        assert str(error).startswith("topk_indices: "), error
    else:
        raise SystemExit("there was memory")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    expected = [[0, 1, 2, 3, 4]] * rows
    assert F.topk_indices(logits, lengths, 5).tolist() == expected
"""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.skipif(_ops.helpers() is None, reason="Paddle's registry makes another error of it")
def test_memory_error(threads):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(LIMITED)],
        capture_output=True,
        text=True,
        timeout=120,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "OMP_NUM_THREADS": str(threads),
            "MALLOC_TRIM_THRESHOLD_": "0",
        },
        check=False,
    )
    assert process.returncode == 0, process.stderr

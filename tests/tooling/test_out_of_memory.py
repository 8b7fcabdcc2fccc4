"""A CPU kernel that gets no memory raises MemoryError, in whichever thread it happens."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import paddle
import pytest

from fastattn import _ops

LIMITED = """
    import resource
    import sys
    import paddle
    import fastattn.functional as F

    paddle.set_device("cpu")
    traced = sys.argv[1] == "True"
    rows, columns = 4, 2**24 if traced else 2**22  # more than a thread's heap has
    logits = paddle.zeros([rows, columns])
    lengths = paddle.full([rows], columns, "int32")
    few = paddle.full([rows], 100, "int32")
    F.quantize_fp8(paddle.ones([4096, 512]), granularity="token")  # starts the threads

    def topk(logits, lengths):
        return F.topk_indices(logits, lengths, 5)

    if traced:
        topk = paddle.jit.to_static(topk, full_graph=True)
    topk(logits, lengths)
    topk(logits[:, :100], few)
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (8 << 20)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        topk(logits, lengths)
    except MemoryError as error:
        assert "topk" in str(error) and "out of memory" in str(error), error
    else:
        raise SystemExit("there was memory")
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    expected = [[0, 1, 2, 3, 4]] * rows
    assert topk(logits, lengths).tolist() == expected
"""


@pytest.mark.parametrize("threads, traced", [(1, False), (2, False), (2, True)])
@pytest.mark.skipif(_ops.helpers() is None, reason="Paddle's registry makes another error of it")
def test_memory_error(tmp_path, threads, traced):
    if traced and paddle.__version__.startswith("2."):
        pytest.skip("Paddle 2.6 makes another error of it")
    script = tmp_path / "limited.py"
    script.write_text(textwrap.dedent(LIMITED))
    process = subprocess.run(
        [sys.executable, str(script), str(traced)],
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

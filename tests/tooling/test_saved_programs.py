"""Saved programs in a process that has made no call before."""

from __future__ import annotations

import subprocess

import paddle
import pytest

import fastattn.functional as F
from tests.support.fresh import run

_LOAD = """
import numpy as np, paddle
{before}
loaded = paddle.jit.load({path!r})
codes, scales = loaded(paddle.full([3, 64], 6.0))
assert codes.shape == [3, 32] and (codes.numpy() == 0x77).all()
print("loaded")
"""
_PREDICT = """
import numpy as np, paddle
import fastattn.functional
from paddle import inference
files = [{path!r} + end for end in (".json", ".pdiparams")]
predictor = inference.create_predictor(inference.Config(*files))
x = predictor.get_input_handle(predictor.get_input_names()[0])
x.copy_from_cpu(np.full((3, 64), 6.0, np.float32))
predictor.run()
codes = predictor.get_output_handle(predictor.get_output_names()[0]).copy_to_cpu()
assert codes.shape == (3, 32) and (codes == 0x77).all()
print("loaded")
"""


class Quantiser(paddle.nn.Layer):
    def forward(self, x):
        return F.mxfp4_quantize(x)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("program") / "quantiser")
    spec = [paddle.static.InputSpec([None, 64], "float32")]
    paddle.jit.save(paddle.jit.to_static(Quantiser(), input_spec=spec), path)
    return path


def check(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("loaded")


@pytest.mark.parametrize(
    "before",
    [
        "import fastattn.functional",
        "import fastattn.backends",
        "import fastattn; fastattn.register()",
        "from paddle.jit import load; import fastattn; fastattn.register(); paddle.jit.load = load",
    ],
)
def test_load_ahead_of_any_call(saved, before):
    """Paddle 3 ended the process: it dereferences a null pointer at an unknown operator."""
    check(run(_LOAD.format(before=before, path=saved)))


@pytest.mark.skipif(paddle.__version__.startswith("2."), reason="programs of Paddle 3")
def test_predictor(saved):
    check(run(_PREDICT.format(path=saved)))


def test_loaders_keep_their_names():
    for function in (paddle.jit.load, paddle.static.load_inference_model):
        assert function.__wrapped__.__name__ == function.__name__
        assert function.__doc__ == function.__wrapped__.__doc__

"""CUDA graphs of calls."""

from __future__ import annotations

import contextlib

import paddle


@contextlib.contextmanager
def capture():
    """Capture what runs inside; yields the graph."""
    from paddle.device.cuda.graphs import CUDAGraph

    paddle.device.cuda.synchronize()  # no memory with work pending may be freed meanwhile
    graph = CUDAGraph()
    graph.capture_begin()
    yield graph
    graph.capture_end()

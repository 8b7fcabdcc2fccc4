"""CUDA graphs of calls."""

from __future__ import annotations

import contextlib
import gc

import paddle


@contextlib.contextmanager
def capture():
    """Capture what runs inside; yields the graph.

    Nothing of an older graph may be freed meanwhile, which Paddle 2.6 does not survive: neither
    memory with work pending nor what Python's collector would find.
    """
    from paddle.device.cuda.graphs import CUDAGraph

    gc.collect()
    paddle.device.cuda.synchronize()
    graph = CUDAGraph()
    collects = gc.isenabled()
    gc.disable()
    try:
        graph.capture_begin()
        yield graph
        graph.capture_end()
    finally:
        if collects:
            gc.enable()

"""A layer's attention step as a server runs it: through a backend, rope and cache write included.

A server does not know lengths on the host, so the step's metadata have none, as FastDeploy's runner
leaves them; the same step with exact lengths stands beside it. Layers have caches of their own,
together several times the L2 cache. A step is replayed in a CUDA graph, and made eagerly, where the
host may take longer than the GPU.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.cases.layers import MODELS, Layers
from benchmarks.core import cuda
from benchmarks.core.devices import Gpu
from benchmarks.core.peers import peers
from benchmarks.core.rows import Row, register
from benchmarks.core.timing import Call

QUANTS = ("cache_fp8", "block_wise_fp8", "cache_int8", "block_wise_int8", "none")
CONTEXT = 8192
#: Name of a step -> cached tokens and new tokens of each sequence.
STEPS = {
    **{f"decode {batch} x 8k": [(CONTEXT - 1, 1)] * batch for batch in (1, 16, 64, 128)},
    "2048 behind 6144 + 32 x 8k": [(6144, 2048), *[(CONTEXT - 1, 1)] * 32],
}
_QUICK = ("Qwen3-8B",), ("block_wise_fp8",), ("decode 1 x 8k",)
#: Layers' steps that are made eagerly before anything is waited for, at least.
_EAGER_CALLS = 64


def eager_us(*steps: list[Call]) -> list[tuple[float, float]]:
    """Microseconds of a layer without a graph, for several ways to make the same layers' steps.

    Returns
    -------
    list of (float, float)
        For each way, the time on the GPU's clock and that of the host's thread. The ways take
        turns, so that a host that changes its speed changes it for all.
    """
    count = len(steps[0])
    works = [calls * max(1, -(-_EAGER_CALLS // count)) for calls in steps]
    return [
        (us / len(calls), host / len(calls))
        for calls, (us, host) in zip(works, cuda.median_eager_us(works))
    ]


@register("step", "gpu")
def step(device: Gpu) -> Iterator[Row]:
    """Layers of four models, every cache type: decode of 1 to 128 sequences, and a mixed step."""
    models, quants, steps = _QUICK if device.quick else (MODELS, QUANTS, STEPS)
    for model in models:
        for quant in quants:
            for name in steps:
                layers = Layers(device, MODELS[model], quant, STEPS[name])
                unknown, exact = layers.calls(exact=False), layers.calls(exact=True)
                us, shape = device.us(unknown), f"{model} {quant} {name}"
                row = Row("layer step", f"{shape}, graph", us)
                yield row.beside("exact lengths", device.us(exact))
                for other in peers("step", model=model, step=name):
                    if quant in other["quants"]:
                        yield row.beside(other["peer"], other["us"])
                (eager, host), (eager_exact, host_exact) = eager_us(unknown, exact)
                row = Row("layer step", f"{shape}, eager", eager)
                yield row.beside("host", host)
                yield row.beside("exact lengths", eager_exact)
                yield row.beside("host, exact lengths", host_exact)
                del layers, unknown, exact

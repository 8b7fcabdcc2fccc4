"""A decode step in a CUDA graph: tensors that stay in place, replayed as sequences grow and end.

    python examples/cuda_graph_decode.py                  # on a CPU: eager, nothing is captured
    python examples/cuda_graph_decode.py --device gpu     # on a GPU: captured once, then replayed

A graph reads the addresses of its capture. So all that changes from step to step (lengths, block
tables, tokens) is written into the tensors that the graph knows. Paddle 2.6 has no kernels for GPUs
of today: this program only copies with Paddle and computes with fastattn, so it runs there, too.
"""

import argparse
import gc

import ml_dtypes
import numpy as np
import paddle

from fastattn.backends import AttentionLayer, FlashAttentionBackend, ForwardMeta, make_config

HEADS, KV, DIM, BLOCKS, LONGEST = 4, 2, 64, 16, 256


class DecodeStep:
    """One layer's attention for up to `batch` sequences, over a cache without quantisation.

    Parameters
    ----------
    batch : int
        Sequences that the graph has room for; others stay inactive.
    place : paddle.Place
    """

    def __init__(self, batch, place):
        self.batch, self.place, self.graph = batch, place, None
        self.backend = FlashAttentionBackend(make_config(max_model_len=LONGEST), KV, HEADS, DIM)
        self.layer = AttentionLayer(layer_id=0)
        self.caches = [self.on(np.zeros([BLOCKS, KV, 64, DIM], np.uint16)) for _ in "kv"]
        self.qkv = self.on(np.zeros([batch, (HEADS + 2 * KV) * DIM], np.uint16))
        self.meta = self.meta_of([0] * batch, [0] * batch, [[-1] * (LONGEST // 64)] * batch, batch)

    def on(self, array):
        return paddle.to_tensor(array, place=self.place)

    def meta_of(self, cached, new, tables, num_tokens=None):
        return ForwardMeta.for_step(
            cached=cached,
            new=new,
            block_tables=tables,
            caches=self.caches,
            num_tokens=num_tokens,  # more than the new ones: the rest is padding
            rope_already_applied=True,  # this program has no rotary embedding
            step_use_cudagraph=num_tokens is not None,  # lengths of the host hold for one step only
        )

    def run(self, qkv, meta):
        """Write K and V of the new tokens and attend, eagerly or into a graph."""
        self.backend.init_attention_metadata(meta)
        return self.backend.attend(qkv, self.layer, meta)

    def capture(self):
        """Capture the step; on a CPU nothing is captured."""
        self.run(self.qkv, self.meta)  # once eagerly, so that nothing is set up inside the capture
        if not isinstance(self.place, paddle.CUDAPlace):
            return
        from paddle.device.cuda.graphs import CUDAGraph

        gc.collect()
        gc.disable()  # memory that is freed while a graph is captured breaks Paddle 2.6
        paddle.device.cuda.synchronize()
        self.graph = CUDAGraph()
        self.graph.capture_begin()
        self.out = self.run(self.qkv, self.meta)  # keep it: replays write into its memory
        self.graph.capture_end()
        gc.enable()

    def replay(self, cached, new, tables, qkv):
        """Attention of the next step, a bfloat16 array [batch, H * D]; padding gives 0."""
        now = self.meta_of(cached, new, tables, self.batch)
        for name in ("cu_seqlens_q", "batch_id_per_token", "block_tables", "seq_lens_decoder"):
            getattr(self.meta, name).copy_(getattr(now, name), True)
        self.meta.seq_lens_this_time.copy_(now.seq_lens_this_time, True)
        self.qkv.copy_(self.on(qkv), True)
        if self.graph is None:
            self.out = self.run(self.qkv, self.meta)
        else:
            self.graph.replay()
        return self.out.numpy().view(ml_dtypes.bfloat16)


def attention(q, k, v):
    """What a query [H, D] gets of the keys and values [n, KV, D] of its sequence, in fp64."""
    k, v = (np.repeat(x.astype(np.float64), HEADS // KV, axis=1) for x in (k, v))
    scores = np.einsum("hd,nhd->hn", q.astype(np.float64), k) / DIM**0.5
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hn,nhd->hd", p / p.sum(axis=1, keepdims=True), v)


def main(argv=None):
    """Prefill three sequences, then decode while they grow, rest and end; the largest error."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args(argv)
    place = paddle.CUDAPlace(0) if args.device == "gpu" else paddle.CPUPlace()
    random = np.random.default_rng(0)

    def projection(tokens):  # stands for a model's layer
        return random.normal(size=[tokens, HEADS + 2 * KV, DIM]).astype(ml_dtypes.bfloat16)

    def bits(x):  # how Paddle takes bfloat16
        return x.reshape(len(x), -1).view(np.uint16)

    lengths = [60, 3, 120]
    blocks = [[3], [7], [1, 12]]
    free = [b for b in range(BLOCKS) if b not in (3, 7, 1, 12)]

    def tables():
        return [own + [-1] * (LONGEST // 64 - len(own)) for own in blocks]

    step = DecodeStep(len(lengths), place)
    prompt = projection(sum(lengths))
    step.run(step.on(bits(prompt)), step.meta_of([0] * 3, lengths, tables()))  # a prefill, eagerly
    known = np.split(prompt, np.cumsum(lengths)[:-1])
    step.capture()
    print("captured; each step is a replay" if step.graph else "a CPU: not captured, runs eagerly")
    worst = 0.0
    for number in range(args.steps):
        # Sequence 1 rests in every third step; sequence 2 ends after two thirds of them.
        new = [1, int(number % 3 != 0), int(number < args.steps * 2 // 3)]
        for own, length, more in zip(blocks, lengths, new):
            if more and length == 64 * len(own):  # the next token needs another block
                own.append(free.pop())
        tokens = projection(len(new))  # those beyond sum(new) are padding
        out = step.replay(lengths, new, tables(), bits(tokens)).reshape(-1, HEADS, DIM)
        row = 0
        for i in np.flatnonzero(new):
            known[i] = np.concatenate([known[i], tokens[row : row + 1]])
            q, k, v = np.split(known[i], [HEADS, HEADS + KV], axis=1)
            worst = max(worst, np.abs(attention(q[-1], k, v) - out[row].astype(np.float64)).max())
            row += 1
        assert not out[row:].astype(np.float32).any()
        lengths = [a + b for a, b in zip(lengths, new)]
        print(f"step {number}: lengths {lengths}, largest error so far {worst:.4f}")
    return worst, step.graph is not None


if __name__ == "__main__":
    main()

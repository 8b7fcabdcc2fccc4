"""One attention layer of DeepSeek-V3 (dense) and of V3.2 (sparse, by an indexer), by the operators.

    python examples/deepseek_layer.py                     # on a CPU
    python examples/deepseek_layer.py --device gpu        # on a GPU
    python examples/deepseek_layer.py --topk 64           # keys that a query of V3.2 sees

All tokens have absorbed queries: W_uk is multiplied into Q, so that a head attends to the 512
latent and 64 rotated channels that the cache has, and W_uv follows the attention. The program
prefills two sequences in chunks, decodes, and compares with the layer's definition in fp64: K and V
expanded, no cache. Weights are random; projections are NumPy's.
"""

import argparse

import ml_dtypes
import numpy as np
import paddle

import fastattn.functional as F
from fastattn.backends import ForwardMeta

HIDDEN, HEADS, Q_LORA, NOPE, ROPE, LATENT, VALUE = 256, 4, 192, 128, 64, 512, 128
INDEX_HEADS, INDEX_DIM, BLOCK, LONGEST = 16, 128, 64, 256
SCALE = (NOPE + ROPE) ** -0.5  # of the head before absorption; YaRN multiplies by mscale ** 2


def rotate(x, positions, neighbours):
    """Rotate x [T, heads, 64] in pairs of neighbours, or of channels i and i + 32."""
    angles = positions[:, None, None] * 10000.0 ** (-np.arange(0, ROPE, 2) / ROPE)
    a, b = (x[..., ::2], x[..., 1::2]) if neighbours else np.split(x, 2, axis=-1)
    pair = a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)
    return np.stack(pair, -1).reshape(x.shape) if neighbours else np.concatenate(pair, -1)


def rms(x):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)


class Projections:
    """Random weights of a layer, and what hidden states are projected to."""

    def __init__(self):
        random = np.random.default_rng(0)

        def matrix(*shape):
            return random.normal(size=shape) / shape[-2] ** 0.5

        self.q_a, self.kv_a = matrix(HIDDEN, Q_LORA), matrix(HIDDEN, LATENT + ROPE)
        self.q_b = matrix(Q_LORA, HEADS * (NOPE + ROPE))
        self.uk, self.uv = matrix(HEADS, LATENT, NOPE), matrix(HEADS, LATENT, VALUE)
        self.index_q = matrix(Q_LORA, INDEX_HEADS * INDEX_DIM)
        self.index_k, self.index_w = matrix(HIDDEN, INDEX_DIM), matrix(HIDDEN, INDEX_HEADS)

    def of(self, x, positions):
        low, kv = rms(x @ self.q_a), x @ self.kv_a
        q = (low @ self.q_b).reshape(len(x), HEADS, NOPE + ROPE)
        q_rope = rotate(q[..., NOPE:], positions, True)
        latent, rope = rms(kv[:, :LATENT]), rotate(kv[:, None, LATENT:], positions, True)[:, 0]
        absorbed = np.einsum("thn,hln->thl", q[..., :NOPE], self.uk, optimize=True)
        index_q = (low @ self.index_q).reshape(len(x), INDEX_HEADS, INDEX_DIM)
        k = x @ self.index_k
        index_k = (k - k.mean(-1, keepdims=True)) / (k.std(-1, keepdims=True) + 1e-6)  # LayerNorm
        parts = [index_q, index_k[:, None]]  # the indexer rotates halves, the attention neighbours
        parts = [
            np.concatenate([rotate(p[..., :ROPE], positions, False), p[..., ROPE:]], -1)
            for p in parts
        ]
        return {
            "q": np.concatenate([absorbed, q_rope], -1),
            "latent": latent,
            "rope": rope,
            "index_q": parts[0],
            "index_k": parts[1][:, 0],
            "index_w": x @ self.index_w,
            # Not absorbed, for the definition alone.
            "plain_q": np.concatenate([q[..., :NOPE], q_rope], -1),
            "plain_k": np.einsum("nl,hld->nhd", latent, self.uk, optimize=True),
            "plain_v": np.einsum("nl,hld->nhd", latent, self.uv, optimize=True),
        }


class Layer:
    """A layer over its caches. `topk` None is V3: all keys, a bfloat16 cache."""

    def __init__(self, blocks, place, topk=None):
        self.blocks, self.place, self.topk = blocks, place, topk
        if topk is None:
            self.latents = self.on(np.zeros([blocks, BLOCK, 1, LATENT + ROPE], np.uint16))
        else:
            self.latents = self.on(np.zeros([blocks, BLOCK, 1, 656], np.uint8))
            self.index_keys = self.on(np.zeros([blocks, BLOCK, INDEX_DIM + 4], np.uint8))

    def on(self, array):
        return paddle.to_tensor(np.ascontiguousarray(array), place=self.place)

    def bf16(self, array):
        return self.on(array.astype(ml_dtypes.bfloat16).view(np.uint16))

    def step(self, of, cached, new, tables):
        """Latent outputs [T, H, 512] of a step's tokens, and the keys that the indexer chose."""
        meta = ForwardMeta.for_step(
            cached=cached, new=new, block_tables=tables, caches=[self.latents]
        )
        seqs = meta.block_tables, meta.cu_seqlens_q, meta.seq_lens_decoder, meta.seq_lens_this_time
        most = max(np.add(cached, new))
        owner, positions, slots = F.token_maps(
            meta.batch_id_per_token, *seqs[:3], num_tokens=sum(new), num_blocks=self.blocks
        )
        q, tokens = self.bf16(of["q"]), (self.bf16(of["latent"]), self.bf16(of["rope"]))
        if self.topk is None:
            F.mla_write_cache(*tokens, self.latents, slots, cache_format="bf16")
            out = F.mla_attention(
                q,
                self.latents,
                *seqs,
                max(new),
                int(most),
                cache_format="bf16",
                softmax_scale=SCALE,
            )
            return self.result(out), None
        F.mla_write_cache(*tokens, self.latents, slots, cache_format="fp8_656")
        F.indexer_k_write_cache(self.bf16(of["index_k"]), self.index_keys, slots)
        lengths, tables, _, _ = F.query_rows(owner, positions, seqs[0], seqs[1])
        weights = self.on(of["index_w"].astype(np.float32))
        codes, weights = F.indexer_q_quant(
            self.bf16(of["index_q"]), weights, (INDEX_DIM * INDEX_HEADS) ** -0.5
        )
        codes = codes.reshape([-1, 1, INDEX_HEADS, INDEX_DIM])
        keys = self.index_keys, weights, lengths, tables, int(most)
        chosen = F.paged_indexer_topk(codes, *keys, self.topk)
        slots, count = F.topk_to_slots(chosen, seqs[0], owner, num_blocks=self.blocks)
        out = F.mla_sparse_attention(
            q, self.latents, slots,
            cache_format="fp8_656", topk_length=count, softmax_scale=SCALE,
        )  # fmt: skip
        return self.result(out), chosen.numpy()

    def result(self, out):
        return out.numpy().view(ml_dtypes.bfloat16).astype(np.float64)


def definition(of, t, keys):
    """Output [H, 128] of token t over `keys`: K and V expanded for each head, fp64."""
    q, k, v = of["plain_q"][t], of["plain_k"][keys], of["plain_v"][keys]
    scores = np.einsum("hd,nhd->hn", q[:, :NOPE], k) + q[:, NOPE:] @ of["rope"][keys].T
    p = np.exp(scores * SCALE - (scores * SCALE).max(-1, keepdims=True))
    return np.einsum("hn,nhd->hd", p / p.sum(-1, keepdims=True), v)


def best(of, t, topk):
    """The keys with the largest index scores, in fp64."""
    products = np.maximum(of["index_q"][t] @ of["index_k"][: t + 1].T, 0)
    return set(np.argsort(-(of["index_w"][t] @ products))[:topk].tolist())


def serve(w, layer, texts):
    """Prefill in chunks, then decode; the relative error, and the share of best keys chosen."""
    tables, cached = [[4, 1, 7, 0], [2, 6, 3, 5]], [0, 0]
    squares, found = np.zeros(2), []
    for new in ([90, 40], [60, 1], [1, 1], [1, 1], [3, 1]):  # a chunk beside a decoding sequence
        pieces = [
            {name: array[c : c + n] for name, array in of.items()}
            for of, c, n in zip(texts, cached, new)
        ]
        step = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        out, chosen = layer.step(step, cached, new, tables)
        out = np.einsum("thl,hlv->thv", out, w.uv, optimize=True)  # W_o would follow
        row = 0
        for of, c, n in zip(texts, cached, new):
            for t in range(c, c + n):
                keys = (
                    np.arange(t + 1) if chosen is None else np.sort(chosen[row][chosen[row] >= 0])
                )
                expected = definition(of, t, keys)
                squares += ((out[row] - expected) ** 2).sum(), (expected**2).sum()
                if chosen is not None and t + 1 > layer.topk:
                    found.append(len(best(of, t, layer.topk) & set(keys.tolist())) / layer.topk)
                row += 1
        cached = [c + n for c, n in zip(cached, new)]
    return float((squares[0] / squares[1]) ** 0.5), float(np.mean(found)) if found else 1.0


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--topk", type=int, default=32)
    args = parser.parse_args(argv)
    place = paddle.CUDAPlace(0) if args.device == "gpu" else paddle.CPUPlace()
    w, random = Projections(), np.random.default_rng(1)
    texts = [w.of(random.normal(size=(n, HIDDEN)), np.arange(n)) for n in (155, 44)]
    results = {}
    for name, topk in (("DeepSeek-V3", None), ("DeepSeek-V3.2", args.topk)):
        results[name] = error, share = serve(w, Layer(8, place, topk), texts)
        keys = "all keys" if topk is None else f"{topk} keys, {100 * share:.0f} % of them the best"
        print(f"{name}: {keys}, relative error {error:.4f}")
    return results


if __name__ == "__main__":
    main()

"""Pages that vLLM or FlashInfer wrote, into a cache of fastattn and back, checked bit by bit.

    python examples/convert_vllm_pages.py                 # on a CPU
    python examples/convert_vllm_pages.py --device gpu    # on a GPU, with Paddle 3

vLLM keeps pages of 16 tokens, [pages, 16, KV, D] (FlashInfer's NHD, too; its HND pages are
[pages, KV, 16, D]). fastattn has blocks of 64: [blocks, KV, 64, D], and V of an 8-bit cache
[blocks, KV, D, 64] in an order of its own. So four pages of a sequence become one block.
"""

import argparse

import ml_dtypes
import numpy as np
import paddle

import fastattn.functional as F

BLOCK = 64


def to_blocks(pages, tables, kind, cache_quant_type, layout="NHD"):
    """Pages of sequences as blocks: a new cache, in the order of the sequences.

    Parameters
    ----------
    pages : Tensor, shape [pages, page_size, KV, D] ("NHD") or [pages, KV, page_size, D] ("HND")
        bfloat16 or float16, or uint8 (e4m3 codes).
    tables : array of int, shape [B, n]
        Pages of each sequence; -1 for none. n * page_size is a multiple of 64.
    kind : {"k", "v"}
    cache_quant_type : {"none", "cache_fp8"}

    Returns
    -------
    Tensor
        As `paged_attention` takes it. Block ``b * n * page_size / 64 + i`` has tokens 64 i to
        64 i + 63 of sequence b.
    """
    if layout == "HND":
        pages = pages.transpose([0, 2, 1, 3])
    heads = pages.shape[2]
    index = paddle.to_tensor(np.maximum(tables, 0).reshape(-1), dtype="int64", place=pages.place)
    tokens = bits(pages).index_select(index).reshape([-1, BLOCK, heads, bits(pages).shape[3]])
    tokens = tokens.transpose([0, 2, 1, 3]).contiguous().view(pages.dtype)
    where = {"kind": kind, "cache_quant_type": cache_quant_type}
    return F.convert_cache_layout(tokens, **where, src="logical", dst="fastattn")


def to_pages(blocks, pages, tables, kind, cache_quant_type, layout="NHD"):
    """Write blocks of :func:`to_blocks` back into pages; pages of no sequence stay."""
    where = {"kind": kind, "cache_quant_type": cache_quant_type}
    tokens = bits(F.convert_cache_layout(blocks, **where, src="fastattn", dst="logical"))
    size = pages.shape[1 if layout == "NHD" else 2]
    tokens = tokens.transpose([0, 2, 1, 3])  # [blocks, 64, KV, D]
    tokens = tokens.reshape([-1, size, *tokens.shape[2:]])
    if layout == "HND":
        tokens = tokens.transpose([0, 2, 1, 3])
    used = np.flatnonzero(tables.reshape(-1) >= 0)
    rows = paddle.to_tensor(used, dtype="int64", place=pages.place)
    index = paddle.to_tensor(tables.reshape(-1)[used], dtype="int64", place=pages.place)
    return bits(pages).scatter(index, tokens.index_select(rows)).view(pages.dtype)


def bits(tensor):
    """8- and 16-bit numbers by fours and twos, as int32, which Paddle can gather on every place."""
    return tensor.contiguous().view("int32")


def attention(pages, tables, length, q, layout):
    """Of one query a sequence over `length` keys, by NumPy in fp64 from vLLM's pages."""
    found = []
    for table, one in zip(tables, q.astype(np.float64)):
        if layout == "HND":
            k, v = (x[table].transpose(0, 2, 1, 3) for x in pages)
        else:
            k, v = (x[table] for x in pages)
        k, v = (x.reshape(-1, *x.shape[2:])[:length].astype(np.float64) for x in (k, v))
        k, v = (np.repeat(x, one.shape[0] // x.shape[1], axis=1) for x in (k, v))
        p = np.exp(np.einsum("hd,nhd->hn", one, k) / one.shape[1] ** 0.5)
        found.append(np.einsum("hn,nhd->hd", p / p.sum(axis=1, keepdims=True), v))
    return np.stack(found)


def convert(kind, layout, size, place):
    """One layout: there and back, and an attention; whether the bits agree, and the error."""
    random = np.random.default_rng(0)
    batch, heads, dim, length, count = 2, 2, 128, 100, 128 // size
    tables = random.permutation(batch * count + 3)[: batch * count].reshape(batch, count)
    shape = [batch * count + 3, size, heads, dim]
    if layout == "HND":
        shape = [shape[0], heads, size, dim]
    dtype = ml_dtypes.bfloat16 if kind == "none" else ml_dtypes.float8_e4m3fn
    arrays = [random.normal(size=shape).astype(dtype) for _ in "kv"]

    def on(array):
        return paddle.to_tensor(array.view(np.uint16 if kind == "none" else np.uint8), place=place)

    pages = [on(x) for x in arrays]
    blocks = [to_blocks(x, tables, name, kind, layout) for x, name in zip(pages, "kv")]
    empty = [on(np.zeros_like(x)) for x in arrays]
    back = [to_pages(x, e, tables, name, kind, layout) for x, e, name in zip(blocks, empty, "kv")]
    used = tables.reshape(-1)
    same = all((a.numpy()[used] == b.numpy()[used]).all() for a, b in zip(pages, back))

    q = random.normal(size=(batch, 4, dim)).astype(ml_dtypes.bfloat16)
    ints = [
        paddle.to_tensor(x, dtype="int32", place=place)
        for x in ([[0, 1], [2, 3]], [0, 1, 2], [length - 1] * 2, [1, 1])
    ]
    one = paddle.to_tensor([1.0], place=place)
    scales = {} if kind == "none" else {"cache_k_scales": one, "cache_v_scales": one}
    out = F.paged_attention(
        paddle.to_tensor(q.view(np.uint16), place=place),
        *blocks, *ints, 1, length, cache_quant_type=kind, **scales,
    )  # fmt: skip
    out = out.numpy().view(ml_dtypes.bfloat16).astype(np.float64)
    return same, np.abs(out - attention(arrays, tables, length, q, layout)).max()


def main(argv=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    args = parser.parse_args(argv)
    place = paddle.CUDAPlace(0) if args.device == "gpu" else paddle.CPUPlace()
    results = {}
    for kind in ("none", "cache_fp8"):
        for layout in ("NHD", "HND"):
            for size in (16, 32, 64):
                same, error = results[kind, layout, size] = convert(kind, layout, size, place)
                print(
                    f"{kind}, {layout}, pages of {size}: there and back "
                    f"{'the same bits' if same else 'DIFFERS'}, attention within {error:.4f}"
                )
    return results


if __name__ == "__main__":
    main()

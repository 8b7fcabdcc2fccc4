import paddle

import fastattn.functional as F

paddle.set_device("cpu")
paddle.seed(0)
nan = float("nan")
cache = {
    "key_cache": paddle.zeros([3, 1, 64, 64], "uint8"),
    "value_cache": paddle.zeros([3, 1, 64, 64], "uint8"),
    "cache_k_scales": paddle.full([3, 1, 64], nan),
    "cache_v_scales": paddle.full([3, 1, 64], nan),
    "cache_quant_type": "block_wise_fp8",
}


def step(written, read, **changes):
    q, k, v = (paddle.randn([3, heads, 64]).astype("bfloat16") for heads in (2, 1, 1))
    write, attend = (paddle.to_tensor([[block]], "int32") for block in (written, read))
    names = ("cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time")
    seqs = {n: paddle.to_tensor(x, "int32") for n, x in zip(names, ([0, 3], [0], [3]))}
    F.write_cache_kv(k, v, block_tables=write, **seqs, **cache)
    longest = {"max_seqlen_q": 3, "max_seqlen_k": 3}
    return F.paged_attention(q, block_tables=attend, **seqs, **longest, **{**cache, **changes})


step(written=2, read=2)
step(written=2, read=1)
try:
    step(written=2, read=2, cache_v_scales=paddle.ones([2, 1, 64]))
except ValueError as error:
    print(error)

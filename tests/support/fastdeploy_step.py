"""A step in FastDeploy's convention: inputs of its operators, and what must come out of them."""

from __future__ import annotations

import numpy as np

from fastattn.compat import fastdeploy as ops
from fastattn.reference.cache import block_of, new_tokens, quantize_token, static_scales
from fastattn.reference.layout import pack, unpack
from fastattn.reference.numerics import from_codes
from fastattn.reference.rope import make_rotary_embs, rope_qkv
from tests.support.compare import assert_same_bits
from tests.support.tensors import BF16, int32, to_numpy, to_paddle

TYPES = ("none", "cache_int8", "cache_fp8", "block_wise_fp8")
#: (encoder, decoder, new) of each sequence.
SEQS = [(70, 0, 70), (9, 67, 9), (0, 100, 1), (5, 64, 5), (0, 30, 0), (0, 5, 3)]


class Step:
    """Inputs of a step in FastDeploy's convention, and what must come out.

    Parameters
    ----------
    seqs : list of (encoder, decoder, new)
    """

    def __init__(self, seqs, *, cache_quant_type="block_wise_fp8", dtype=BF16, heads=4, kv=2,
                 dim=128, neox=False, partial=False, norm=False, padding=0, blocks=9,
                 per_channel=False, scale_dtype=BF16, rope_3d=False, seed=0):  # fmt: skip
        rng = np.random.default_rng(seed)
        self.type, self.heads, self.kv, self.dim, self.neox = cache_quant_type, heads, kv, dim, neox
        self.rotary_dim = dim // 2 if partial else dim
        self.encoder, self.decoder, self.new = (np.array(x, np.int32) for x in zip(*seqs))
        self.cu_q = np.concatenate([[0], np.cumsum(self.new)]).astype(np.int32)
        prefix = np.where(self.encoder > 0, self.decoder, 0)
        self.cu_k = np.concatenate([[0], np.cumsum(prefix + self.new)]).astype(np.int32)
        tokens = int(self.cu_q[-1]) + padding
        self.batch_ids = np.full(tokens, -1, np.int32)
        self.batch_ids[: self.cu_q[-1]] = np.repeat(np.arange(len(seqs)), self.new)
        self.qkv = rng.normal(size=(tokens, (heads + 2 * kv) * dim)).astype(dtype)
        self.rope_3d = rope_3d
        if rope_3d:  # a table for each slot, two more than sequences
            self.table = np.stack([self._table(partial, 77 + i) for i in range(len(seqs) + 2)])
        else:
            self.table = self._table(partial, 77)
        self.norms = [rng.uniform(0.5, 2, dim).astype(np.float32) if norm else None for _ in "qk"]
        order = rng.permutation(blocks)
        self.tables = np.full((len(seqs), 4), -1, np.int32)
        at = 0
        for seq, length in enumerate(self.decoder + self.new):
            count = -(-int(length) // 64)
            self.tables[seq, :count] = order[at : at + count]
            at += count
        assert at <= blocks
        self.code = "int8" if cache_quant_type == "cache_int8" else "e4m3"
        self.scales = None
        if cache_quant_type == "none":
            self.caches = [rng.normal(size=(blocks, kv, 64, dim)).astype(dtype) for _ in "kv"]
        else:
            finite = np.array([c for c in range(256) if c & 0x7F != 0x7F], np.uint8)
            logical = [rng.choice(finite, (blocks, kv, 64, dim)) for _ in "kv"]
            self.caches = [
                pack(x, kind, "fastdeploy", int8=self.code == "int8")
                for x, kind in zip(logical, "kv")
            ]
            shape = (kv * dim if per_channel else kv,)
            if cache_quant_type == "block_wise_fp8":
                shape = (blocks, kv, 64)
            bound = 127 if self.code == "int8" else 448
            self.scales = [(rng.uniform(2, 6, shape) / bound).astype(scale_dtype) for _ in "kv"]

    def _table(self, partial, theta):
        table = make_rotary_embs(256, self.rotary_dim, theta=theta, neox=self.neox)
        return np.ascontiguousarray(table[..., : self.dim // 4] if partial else table)

    def arguments(self, place="cpu", *, older=False, **changes):
        """Positional arguments, in FastDeploy's order; tensors by name in `self.tensors`."""

        def on(x):
            return None if x is None else to_paddle(np.array(x), place)

        scales = [on(x) for x in self.scales] if self.scales else [None, None]
        dynamic = self.type == "block_wise_fp8"
        stale = on(np.zeros(self.kv, BF16))  # FastDeploy's layers have these for every type
        quant, dequant = (scales, [stale] * 2) if dynamic else ([stale] * 2, scales)
        if self.type == "none":
            quant, dequant = [None] * 2, [None] * 2
        tiles = [int32([0], place)] * 2 + [int32([1])]  # the counts are on the host
        self.tensors = {"caches": [on(x) for x in self.caches], "scales": scales}
        named = {
            "qkv": on(self.qkv),
            "key_cache": self.tensors["caches"][0],
            "value_cache": self.tensors["caches"][1],
            "cu_seqlens_q": on(self.cu_q),
            "cu_seqlens_k": on(self.cu_k),
            "rotary_embs": on(self.table),
            "seq_lens_this_time": on(self.new[:, None]),
            "seq_lens_encoder": on(self.encoder[:, None]),
            "seq_lens_decoder": on(self.decoder[:, None]),
            "batch_id_per_token": on(self.batch_ids),
            "block_tables": on(self.tables),
            **dict(zip(["kv_batch_ids", "kv_tile_ids_per_batch", "kv_num_blocks"], tiles)),
            **dict(zip(["cache_batch_ids", "cache_tile_ids", "cache_num_blocks"], tiles)),
            "q_norm_weight": on(self.norms[0]),
            "k_norm_weight": on(self.norms[1]),
            "cache_k_quant_scales": quant[0],
            "cache_v_quant_scales": quant[1],
            "cache_k_dequant_scales": dequant[0],
            "cache_v_dequant_scales": dequant[1],
            "cache_k_zp": None,
            "cache_v_zp": None,
            "kv_signal_data": None,
            "kv_token_num": int(self.cu_k[-1]),
            "max_seq_len": 256,
            "rms_norm_eps": 1e-5,
            "use_neox_rotary_style": self.neox,
            "cache_quant_type": self.type,
            "rope_3d": self.rope_3d,
            **changes,
        }
        if older:
            del named["use_neox_rotary_style"]
        return list(named.values())

    def expected(self):
        """q, k, v, qkv_out, and the caches' and scales' bytes after the step."""
        tokens = len(self.qkv)
        owners = list(new_tokens(tokens, self.cu_q, self.decoder, self.new, self.batch_ids))
        positions, batch_ids = np.zeros((2, tokens), int)
        for token, seq, position in owners:
            positions[token], batch_ids[token] = position, seq
        q, k, v = rope_qkv(
            self.qkv,
            positions,
            self.table,
            num_heads=self.heads,
            num_kv_heads=self.kv,
            q_norm_weight=self.norms[0],
            k_norm_weight=self.norms[1],
            rms_norm_eps=1e-5,
            use_neox_rotary_style=self.neox,
            rotary_dim=self.rotary_dim,
            batch_ids=batch_ids,
        )
        own = np.zeros(tokens, bool)
        own[[token for token, _, _ in owners]] = True
        q, k, v = (np.where(own[:, None, None], x, np.zeros((), x.dtype)) for x in (q, k, v))
        fused = np.concatenate([q, k, v], axis=1).reshape(self.qkv.shape)
        outs, caches, scales = [], [], []
        for side, new in enumerate((k, v)):
            cache, scale = self._side(side)
            out = np.zeros((int(self.cu_k[-1]), self.kv, self.dim), self.qkv.dtype)
            cached = [
                (self.cu_k[seq] + i, block_of(self.tables[seq], i, len(cache)), i % 64)
                for seq, prefix in enumerate(np.where(self.encoder > 0, self.decoder, 0))
                for i in range(prefix)
            ]
            rows, blocks, slots = self._columns([at for at in cached if at[1] is not None])
            out[rows] = self._read(cache, scale, blocks, slots)
            written = []
            for token, seq, position in owners:
                prefix = self.decoder[seq] if self.encoder[seq] > 0 else 0
                out[self.cu_k[seq] + prefix + token - self.cu_q[seq]] = new[token]
                if self.encoder[seq] > 0:
                    block = block_of(self.tables[seq], position, len(cache))
                    if block is not None:
                        written.append((token, block, position % 64))
            tokens, blocks, slots = self._columns(written)
            self._write(cache, scale, blocks, slots, new[tokens])
            if self.type != "none":
                cache = pack(cache, "kv"[side], "fastdeploy", int8=self.code == "int8")
            outs.append(out)
            caches.append(cache)
            scales.append(scale)
        return [q, *outs, fused], caches, scales

    def _side(self, side):
        cache, scale = self.caches[side].copy(), None
        if self.type != "none":
            cache = unpack(cache, "kv"[side], "fastdeploy", int8=self.code == "int8").copy()
            scale = self.scales[side].copy()
        return cache, scale

    @staticmethod
    def _columns(places):
        """A list of (row, block, slot) as three arrays."""
        return np.array(places, np.int64).reshape(-1, 3).T

    def _read(self, cache, scale, blocks, slots):
        codes = cache[blocks, :, slots]
        if self.type == "none":
            return codes
        if self.type == "block_wise_fp8":
            multiplier = scale[blocks, :, slots].astype(np.float32)[..., None]
        else:
            multiplier = static_scales(scale, self.kv, self.dim)
        return (from_codes(codes, self.code).astype(np.float32) * multiplier).astype(self.qkv.dtype)

    def _write(self, cache, scale, blocks, slots, x):
        if self.type == "none":
            cache[blocks, :, slots] = x
            return
        codes, dynamic = quantize_token(x, scale, self.type)
        cache[blocks, :, slots] = codes.view(np.uint8)
        if dynamic is not None:
            scale[blocks, :, slots] = dynamic

    def run_and_check(self, place="cpu", **options):
        outputs = ops.gqa_rope_write_cache(*self.arguments(place, **options))
        wanted, caches, scales = self.expected()
        assert isinstance(outputs, tuple) and len(outputs) == 4
        for name, a, b in zip(("q", "k", "v", "qkv_out"), outputs, wanted):
            assert_same_bits(to_numpy(a), b, name)
        for name, a, b in zip("kv", self.tensors["caches"], caches):
            assert_same_bits(to_numpy(a), b, f"{name} cache")
        if self.type == "block_wise_fp8":
            for name, a, b in zip("kv", self.tensors["scales"], scales):
                assert_same_bits(to_numpy(a), b, f"{name} scales")


#: Prefill, chunked prefill, prefix hit, decode, stopped, and speculative sequences.

"""Whether what is timed is right: FastDeploy's operators beside attention in float64.

Three sequences are prefilled, one goes on with a chunk while the others decode, then all decode.
Keys and values of the reference are the rotated ones before the cache rounds them.
"""

from __future__ import annotations

import torch
from library import BLOCK, Cache, Library, Shape, Step

#: Relative RMS error of an output that counts as right, given what the cache rounds away.
BOUNDS = {"none": 0.01, "cache_int8": 0.03, "cache_fp8": 0.06, "block_wise_fp8": 0.06}
MAX_MODEL_LEN = 4096
#: Steps of (cached, new, in prefill).
STEPS = {
    "prefill": [(0, 200, True), (0, 1000, True), (0, 1500, True)],
    "mixed": [(200, 1, False), (1000, 1, False), (1500, 1300, True)],
    "decode": [(201, 1, False), (1001, 1, False), (2800, 1, False)],
    "next decode": [(202, 1, False), (1002, 1, False), (2801, 1, False)],
}
_SEQUENCES, _LONGEST, _SAMPLES = 3, 2802, 16


def rotary_table(shape: Shape, sequences: int, max_model_len: int) -> torch.Tensor:
    """Cosines and sines, float32: (2, 1, L, 1, D) for neox, D / 2 else; first B with rope_3d."""
    half = shape.dim // 2
    frequencies = 1e4 ** (-torch.arange(half, device="cuda") / half)
    positions = torch.arange(max_model_len, device="cuda")[:, None]
    copies = sequences if shape.rope_3d else 1
    phases = 0.3 * torch.arange(copies, device="cuda")[:, None, None]
    angles = positions * frequencies + phases  # (B, L, D / 2)
    if shape.neox:
        angles = torch.cat((angles, angles), -1)
    table = torch.stack((angles.cos(), angles.sin()), 1)[:, :, None, :, None]
    return table.float().contiguous() if shape.rope_3d else table[0].float().contiguous()


def _rotated(x: torch.Tensor, table: torch.Tensor, start: int, neox: bool) -> torch.Tensor:
    """Rotate (T, heads, D) at positions from `start` on; `table` is (2, 1, L, 1, D or D / 2)."""
    half = x.shape[-1] // 2
    cos, sin = table[:, 0, start : start + len(x), :, :half].double()
    if neox:
        left, right = x[..., :half], x[..., half:]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)
    left, right = x[..., ::2], x[..., 1::2]
    return torch.stack((left * cos - right * sin, right * cos + left * sin), -1).flatten(-2)


def make_cache(shape: Shape, blocks: int) -> tuple[Cache, torch.Tensor]:
    """An empty cache; magnitudes (2, kv) that keys and values may have."""
    kv, dim = shape.kv, shape.dim
    heads = torch.arange(kv, device="cuda")
    sizes = torch.stack((1 + 0.5 * heads, 0.4 + 0.3 * heads))
    dtype = torch.bfloat16 if shape.quant == "none" else torch.uint8
    key, value = torch.zeros(2, blocks, kv, BLOCK, dim, dtype=dtype, device="cuda")
    if shape.quant == "none":
        return Cache(key, value), sizes
    if shape.quant == "block_wise_fp8":
        k, v = torch.zeros(2, blocks, kv, BLOCK, dtype=torch.bfloat16, device="cuda")
        return Cache(key, value, (k, v)), sizes
    bound = 127.0 if shape.quant == "cache_int8" else 448.0
    largest = 6 * sizes  # of normal numbers, which a rotation mixes by pairs
    k, v = (bound / largest).bfloat16()
    back_k, back_v = (largest / bound).bfloat16()
    return Cache(key, value, (k, v), (back_k, back_v)), sizes


class _History:
    """All keys and values of a sequence, rotated, float64."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def attend(
        self, q: torch.Tensor, positions: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of (T, H, D) queries at these positions."""
        keys, values = torch.cat(self.keys), torch.cat(self.values)
        group = q.shape[1] // keys.shape[1]
        keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        scores = torch.einsum("thd,shd->hts", q, keys) / q.shape[-1] ** 0.5
        later = torch.arange(len(keys), device="cuda") > positions[:, None]
        scores.masked_fill_(later, float("-inf"))
        if sinks is not None:
            column = sinks.double()[:, None, None].expand(-1, len(q), 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., : len(keys)]
        return torch.einsum("hts,shd->thd", weights, values)


def errors(library: Library, shape: Shape, with_sinks: bool) -> dict[str, float]:
    """Relative RMS error of each step, over samples of its rows."""
    torch.manual_seed(0)
    shape = shape._replace(max_model_len=MAX_MODEL_LEN)
    per_sequence = MAX_MODEL_LEN // BLOCK
    blocks = _SEQUENCES * per_sequence
    order = torch.randperm(blocks, device="cuda").int().view(_SEQUENCES, per_sequence)
    tables = torch.full((_SEQUENCES, per_sequence + 2), -1, dtype=torch.int32, device="cuda")
    tables[:, :per_sequence] = order
    cache, sizes = make_cache(shape, blocks)
    rotary = rotary_table(shape, _SEQUENCES, MAX_MODEL_LEN)
    sinks = torch.randn(shape.heads, device="cuda").bfloat16() if with_sinks else None
    histories = [_History() for _ in range(_SEQUENCES)]
    found = {}
    for name, sequences in STEPS.items():
        step = Step(sequences, tables, shape.heads // shape.kv, MAX_MODEL_LEN)
        qkv = torch.randn(step.tokens, shape.heads + 2 * shape.kv, shape.dim, device="cuda")
        qkv[:, shape.heads : -shape.kv] *= sizes[0][:, None]
        qkv[:, -shape.kv :] *= sizes[1][:, None]
        qkv = qkv.bfloat16()
        exact = qkv.double()
        out = torch.zeros(step.tokens, shape.heads * shape.dim, device="cuda").bfloat16()
        library.split_blocks(step, shape.heads // shape.kv)
        library.append_attention(step, shape, qkv.view(step.tokens, -1), cache, out, rotary, sinks)
        torch.cuda.synchronize()
        wrong, size, at = 0.0, 0.0, 0
        for i, (cached, new, _) in enumerate(sequences):
            rows = exact[at : at + new]
            table = rotary[i] if shape.rope_3d else rotary
            turned = _rotated(rows[:, : -shape.kv], table, cached, shape.neox)
            histories[i].keys.append(turned[:, shape.heads :])
            histories[i].values.append(rows[:, -shape.kv :])
            picked = torch.linspace(0, new - 1, min(new, _SAMPLES), device="cuda").long()
            query = turned[picked, : shape.heads]
            expected = histories[i].attend(query, cached + picked, sinks)
            got = out[at : at + new][picked].double().view_as(expected)
            wrong += float((got - expected).square().sum())
            size += float(expected.square().sum())
            at += new
        found[name] = (wrong / size) ** 0.5
    return found

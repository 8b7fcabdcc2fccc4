"""Check that the timed operators are right: FastDeploy's operators against float64 attention.

Three sequences are prefilled. Then one continues with a chunk while the others decode, and then all
decode. The reference rounds keys and values as the cache does (`rounding.py`) and queries to bf16.
So the remaining error is the error of the kernels, and 8-bit rounding does not hide a fault.
"""

from __future__ import annotations

from typing import NamedTuple

import prefill as prefill_path
import torch
from library import BLOCK, Cache, Library, Shape, Step
from rounding import FP8_MAX, INT8_MAX, Scales, dynamic_scales, stored

#: Relative RMS error up to which an output counts as right. On an H100 the error is 0.1 to 0.6 %
#: for 16 bits and dynamic scales, and 1.0 to 2.7 % for static scales, whose rounding is not
#: modelled completely. A wrong table, or the scale of another head, gives 35 % and more.
BOUND = 0.03
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
    """Cosines and sines, float32: (2, 1, L, 1, D) for neox, otherwise D / 2; rope_3d adds B in
    front.
    """
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


def misread_table(table: torch.Tensor, sequence: int) -> torch.Tensor:
    """Rotary table (2, 1, L, 1, D) with which FastDeploy's decode mistakenly rotates a sequence.

    With block_wise_fp8, neox and one table per sequence, FastDeploy reads the cosines of a sequence
    L * D floats after the cosines of the previous one. At that offset are the sines; the next table
    is at twice the offset. The fault is in `append_decode_cache_T_int8_neox_rope_kernel` in
    `decoder_write_cache_with_rope_impl.cuh` (lines 952 and 1042 of FastDeploy 2.6, 933 and 1021 of
    2.4 and 2.5; its other neox kernels have `HeadDim * 2` there). Every sequence but the first is
    rotated wrongly.

    Parameters
    ----------
    table : torch.Tensor
        Tables of all sequences, (B, 2, 1, L, 1, D).
    sequence : int
    """
    halves = table.flatten(0, 1)
    return halves[sequence : sequence + 2]


def rotates_wrongly(shape: Shape) -> bool:
    """Whether decode has the fault of :func:`misread_table`."""
    return shape.quant == "block_wise_fp8" and shape.neox and shape.rope_3d


def known_fault(shape: Shape, gathers: bool = False) -> str:
    """Known fault of FastDeploy with such a layer; empty if none is known.

    Parameters
    ----------
    shape : Shape
    gathers : bool
        Whether prefill uses `prefill.run`.
    """
    decode = "decode rotates with other sequences' rotary tables" if rotates_wrongly(shape) else ""
    prefill = prefill_path.known_fault(shape) if gathers else ""
    return "; ".join(fault for fault in (decode, prefill) if fault)


def make_cache(shape: Shape, blocks: int) -> tuple[Cache, torch.Tensor]:
    """An empty cache, and magnitudes (2, kv) for keys and values.

    Every head has another magnitude, so that mixed-up heads are detected. None is so large that the
    softmax magnifies the rounding of keys.
    """
    kv, dim = shape.kv, shape.dim
    heads = torch.arange(kv, device="cuda")
    sizes = torch.stack((1 + heads / kv, 0.4 + 0.3 * heads))
    dtype = torch.bfloat16 if shape.quant == "none" else torch.uint8
    key, value = torch.zeros(2, blocks, kv, BLOCK, dim, dtype=dtype, device="cuda")
    if shape.quant == "none":
        return Cache(key, value), sizes
    if shape.quant == "block_wise_fp8":
        k, v = torch.zeros(2, blocks, kv, BLOCK, dtype=torch.bfloat16, device="cuda")
        return Cache(key, value, (k, v)), sizes
    bound = INT8_MAX if shape.quant == "cache_int8" else FP8_MAX
    largest = 6 * sizes  # for normal numbers, which a rotation mixes in pairs
    k, v = (bound / largest).bfloat16()
    back_k, back_v = (largest / bound).bfloat16()
    return Cache(key, value, (k, v), (back_k, back_v)), sizes


class _History:
    """All keys and values of a sequence as the cache holds them, float64."""

    def __init__(self) -> None:
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.value_scales: list[torch.Tensor] = []  # for block_wise_fp8, (T, kv, 1)

    def misread_values(self) -> list[torch.Tensor]:
        """Values of a cached prefix as FastDeploy mistakenly reads them."""
        if not self.values:
            return []
        scales = torch.cat(self.value_scales).double()
        return [torch.cat(self.values) / scales * prefill_path.misread_scales(scales)]


def _attended(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    positions: torch.Tensor,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention of (T, H, D) queries at these positions."""
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


class _Reference:
    """Three sequences in float64: right, or with FastDeploy's known fault (`misread`)."""

    def __init__(
        self, shape: Shape, rotary: torch.Tensor, cache: Cache, sinks: torch.Tensor | None
    ) -> None:
        self._shape, self._rotary, self._sinks = shape, rotary, sinks
        static = cache.dequant_scales[0] is not None
        self._scales = [
            Scales(write, read) if static else None
            for write, read in zip(cache.quant_scales, cache.dequant_scales)
        ]
        self._histories = [_History() for _ in range(_SEQUENCES)]
        self.misread = False

    def attend(
        self,
        index: int,
        rows: torch.Tensor,
        cached: int,
        prefill: bool,
        picked: torch.Tensor,
        gathers: bool = False,
    ) -> torch.Tensor:
        """Write a sequence's rows (T, H + 2 kv, D) and return the outputs of the picked ones.

        With `gathers`, prefill attends to the unquantised new keys and values, in bf16.
        """
        shape, history = self._shape, self._histories[index]
        table = self._rotary[index] if shape.rope_3d else self._rotary
        if self.misread and not prefill and rotates_wrongly(shape):
            table = misread_table(self._rotary, index)
        turned = _rotated(rows[:, : -shape.kv], table, cached, shape.neox).bfloat16()
        queries, new_keys = turned[picked, : shape.heads].double(), turned[:, shape.heads :]
        new_values = rows[:, -shape.kv :]
        keys, values = history.keys, history.values
        if gathers and prefill:
            prefix = history.misread_values() if self.misread else values
            keys, values = [*keys, new_keys.double()], [*prefix, new_values]
        key_scales, value_scales = self._scales
        history.keys.append(stored(new_keys, shape.quant, key_scales))
        history.values.append(stored(new_values, shape.quant, value_scales))
        if shape.quant == "block_wise_fp8":
            history.value_scales.append(dynamic_scales(new_values.bfloat16()).dequant)
        at = cached + picked
        return _attended(queries, torch.cat(keys), torch.cat(values), at, self._sinks)


class Found(NamedTuple):
    """Relative RMS errors of a step's outputs."""

    #: Relative to the right output.
    error: float
    #: Relative to the output with the known fault, if there is one.
    as_known: float | None


def _relative(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """Relative RMS error of all (got, expected) pairs together."""
    wrong = sum(float((got - expected).square().sum()) for got, expected in pairs)
    return float((wrong / sum(float(expected.square().sum()) for _, expected in pairs)) ** 0.5)


def errors(
    library: Library, shape: Shape, with_sinks: bool, gathers: bool = False
) -> dict[str, Found]:
    """Errors of each step, over samples of its rows.

    With `gathers`, steps with prefill use `prefill.run`.
    """
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
    references = [_Reference(shape, rotary, cache, sinks)]
    if known_fault(shape, gathers):
        references.append(_Reference(shape, rotary, cache, sinks))
        references[-1].misread = True
    found = {}
    for name, sequences in STEPS.items():
        step = Step(sequences, tables, shape.heads // shape.kv, MAX_MODEL_LEN)
        qkv = torch.randn(step.tokens, shape.heads + 2 * shape.kv, shape.dim, device="cuda")
        qkv[:, shape.heads : -shape.kv] *= sizes[0][:, None]
        qkv[:, -shape.kv :] *= sizes[1][:, None]
        qkv = qkv.bfloat16()
        given = qkv.double()
        out = torch.zeros(step.tokens, shape.heads * shape.dim, device="cuda").bfloat16()
        library.split_blocks(step, shape.heads // shape.kv)
        flat = qkv.view(step.tokens, -1)
        by_path = gathers and any(prefill for _, _, prefill in sequences)
        if by_path:
            out = prefill_path.run(library, step, shape, flat, cache, out, rotary)
        else:
            library.append_attention(step, shape, flat, cache, out, rotary, sinks)
        torch.cuda.synchronize()
        pairs: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in references]
        at = 0
        for i, (cached, new, prefill) in enumerate(sequences):
            picked = torch.linspace(0, new - 1, min(new, _SAMPLES), device="cuda").long()
            for reference, of_reference in zip(references, pairs):
                rows = given[at : at + new]
                expected = reference.attend(i, rows, cached, prefill, picked, by_path)
                got = out[at : at + new][picked].double().view_as(expected)
                of_reference.append((got, expected))
            at += new
        of_step = [*map(_relative, pairs), None]
        found[name] = Found(of_step[0], of_step[1])
    return found

"""Which kernels a call takes, asked of the functions that the operators ask; no GPU is needed.

``FASTATTN_LOG=3``, dumps of calls and ``python -m fastattn explain`` tell this. For attention
operators it is ``DecideAttention`` of ``custom_ops/plan/attention.h``, for others the tables of
kernels in that folder, through the module ``fastattn._host``. That module assumes what contiguous
tensors have: a call of views that TMA cannot read takes another kernel all the same
(docs/architecture.md).
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastattn import env
from fastattn._formats import FORMATS

#: Operators whose kernels the host chooses by a function that can be asked.
ATTENTION = ("paged_attention", "flash_attention")

#: Others with a table of kernels of their own (``custom_ops/plan``), and that table's name.
TABLES = {
    "mla_attention": "mla_attention",
    "mla_sparse_attention": "mla_sparse_attention",
    "mqa_logits": "mqa_logits",
    "paged_mqa_logits": "mqa_logits",
    "indexer_topk": "mqa_logits",
    "paged_indexer_topk": "mqa_logits",
}

#: Rows of the table of cache types by name, and bits of a code.
TYPES = {row.name: row for row in FORMATS}
BITS = {row.code: row.bits for row in FORMATS}
BITS.update((row.value_code, row.value_bits) for row in FORMATS)


class Device(NamedTuple):
    """What the choice of kernels depends on."""

    name: str  # cpu or sm_90
    major: int = 0
    processors: int = 0

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.major > 0


CPU = Device("cpu")


class AttentionCall(NamedTuple):
    """An attention call as the plan functions take it."""

    op: str
    q_dtype: str
    k_dtype: str
    cache_type: str  # "ragged" for flash_attention
    num_tokens: int
    batch: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seqlen_q: int
    max_seqlen_k: int
    window_left: int = -1
    batch_invariant: bool = False
    split_invariant: bool = False
    general: bool = False  # with a tree mask, or windows or block tables of KV heads


@functools.lru_cache(maxsize=1)
def host() -> Any:
    """The module ``fastattn._host``; ImportError where it was not built."""
    return importlib.import_module("fastattn._host")


@functools.lru_cache(maxsize=8)
def device_of(place: str) -> Device:
    """Device of a place's name, ``cpu`` or ``gpu:0``."""
    if not place.startswith("gpu"):
        return CPU
    import paddle

    facts = paddle.device.cuda.get_device_properties(int(place.partition(":")[2] or 0))
    return Device(f"sm_{facts.major}{facts.minor}", facts.major, facts.multi_processor_count)


def key_dtype(cache_type: str, stored: str, fp8_format: str) -> str:
    """Type of a cache's codes, as the plan functions name it."""
    if cache_type == "none":
        return stored
    code = TYPES[cache_type].code if cache_type in TYPES else "e4m3"
    if code != "e4m3":
        return code
    e5m2 = stored == "float8_e5m2" or fp8_format == "e5m2"
    return "float8_e5m2" if e5m2 else "float8_e4m3fn"


def attention_call(
    op: str, tensors: Mapping[str, tuple[str, list[int]]], attrs: Mapping[str, Any]
) -> AttentionCall:
    """The plan functions' view of a call.

    Parameters
    ----------
    op : str
        One of :data:`ATTENTION`.
    tensors : mapping
        Dtype (Paddle's name) and shape by input.
    attrs : mapping
    """
    q_dtype, (tokens, heads, head_dim) = tensors["q"]
    if q_dtype == "uint8" or attrs["quantize_q"]:
        q_dtype = "float8_e4m3fn"
    if op == "paged_attention":
        stored, shape = tensors["key_cache"]
        kind = attrs["cache_quant_type"]
        tables = tensors["block_tables"][1]
        kv_heads = tables[1] if len(tables) == 3 else shape[1]  # which may be a pool's 1
        key = key_dtype(kind, stored, attrs["fp8_format"])
    else:
        stored, shape = tensors["k"]
        wanted = str(attrs["kv_dtype"])
        bits = {"e5m2": "float8_e5m2", "int8": "int8"}.get(wanted, "float8_e4m3fn")
        key, kind, kv_heads = (bits if stored == "uint8" else stored), "ragged", shape[1]
    return AttentionCall(
        op,
        q_dtype,
        key,
        kind,
        tokens,
        tensors["cu_seqlens_q"][1][0] - 1,
        heads,
        kv_heads,
        head_dim,
        attrs["max_seqlen_q"],
        attrs["max_seqlen_k"],
        attrs["window_left"],
        bool(attrs.get("batch_invariant")),
        bool(attrs.get("split_invariant")),
        "tree_mask" in tensors
        or "head_windows" in tensors
        or len(tensors.get("block_tables", ("", []))[1]) == 3,
    )


def _kernels(
    call: AttentionCall, whole: str, split: str, launches: list[dict[str, int]], dequantizes: bool
) -> list[str]:
    """Kernels in the order of their launch: ``LaunchAttention`` of ``cuda/attention/launch.cu``.

    `whole` and `split` take whole and split tiles, where the plan has any.
    """
    ragged, prefills = call.cache_type == "ragged", whole != "mma_sm80"
    kernels = ["dequantize_kv"] if dequantizes else []
    if prefills and not (dequantizes and ragged):
        kernels.append(whole)
    if dequantizes and "wgmma_q16" not in kernels:
        kernels.append("wgmma_q16")
    whole_is_done = prefills or (dequantizes and ragged)
    for launch in launches:
        name = split if launch["split"] else whole
        if (launch["split"] or not whole_is_done) and name not in kernels:
            kernels.append(name)
    if any(x["split"] and x["shares"] > 1 and not x["merges_in_kernel"] for x in launches):
        kernels.append("merge of partial results")
    return kernels


def decision(call: AttentionCall, device: Device) -> dict[str, Any]:
    """Kernels of an attention call on a GPU.

    Returns
    -------
    dict
        ``kernels``: names, in the order of their launch. ``launches``: what the plan says of each.
        ``workspace``: bytes. ``dequantize``: room for 16-bit K and V of long sequences; empty where
        codes are attended as they are. ``reasons``: of kernels that the call does not take, what
        they lack for it, in the words of their rows in ``custom_ops/plan``.
    """
    facts: Any = call[1:11]
    prefill, floats, launches = host().decide_attention(
        *facts,
        compute_major=device.major,
        num_sms=device.processors,
        batch_invariant=call.batch_invariant,
        split_invariant=call.split_invariant,
        general=call.general,
    )
    mib, operations = env.dequantized()
    limits: dict[str, Any] = {
        "compute_major": device.major,
        "window_left": call.window_left,
        "batch_invariant": call.batch_invariant,
        "split_invariant": call.split_invariant,
        "memory": int(min(mib, 2**20) * 2**20),
        "operations": operations,
        "general": call.general,
    }
    room = host().dequantize_plan(*facts, **limits)
    room = {name: value for name, value in room.items() if room["blocks"]}
    asked = host().attention_kernels(*facts, num_sms=device.processors, **limits)
    split = [name for name, role, why in asked if role == "split tiles" and not why]
    kernels = _kernels(call, prefill, "".join(split), launches, bool(room))
    return {
        "kernels": kernels,
        "reasons": {name: why for name, _, why in asked if why and name not in kernels},
        "launches": launches,
        "workspace": 4 * floats,
        "dequantize": room,
    }


def _latent_reasons(
    op: str, tensors: Mapping[str, tuple[str, list[int]]], attrs: Mapping[str, Any], major: int
) -> list[tuple[str, str]]:
    """Kernels of an operator over latent caches, and why they do not take the call."""
    (_, heads, dim), cache = tensors["q"][1], tensors["cache"][1]
    pages, page = cache[0], attrs["page_size"] if len(cache) == 2 else math.prod(cache[1:-1])
    if op == "mla_attention":
        new = attrs["max_seqlen_q"]
        found = host().mla_attention_kernels(attrs["cache_format"], heads, new, page, pages, major)
        return list(found)
    extra = attrs["extra_cache_format"] if "extra_cache" in tensors else ""
    fp32, largest = attrs["out_dtype"] == "float32", bool(attrs["return_max_logits"])
    return list(
        host().mla_sparse_attention_kernels(
            *(attrs["cache_format"], extra, dim, heads, page, pages, fp32, largest, major)
        )
    )


def _logits_reasons(
    tensors: Mapping[str, tuple[str, list[int]]], attrs: Mapping[str, Any], major: int
) -> list[tuple[str, str]]:
    """Kernels of an operator over index keys, and why they do not take the call."""
    q, quant = tensors["q"][1], attrs["quant"]
    dim = q[-1] * (1 if quant == "fp8" else 2)
    if "keys" in tensors:
        keys = tensors["keys"][1][0]
        found = host().mqa_logits_kernels(quant, dim, q[1], q[0], 1, keys, compute_major=major)
    else:
        keys, page = attrs["max_context_len"], attrs["page_size"]
        found = host().mqa_logits_kernels(
            *(quant, dim, q[2], q[0], q[1], keys, page, tensors["cache"][1][0], major)
        )
    return list(found)


def reasons_of(
    op: str,
    tensors: Mapping[str, tuple[str, list[int]]],
    attrs: Mapping[str, Any],
    device: Device,
) -> dict[str, str]:
    """For each kernel of an operator of :data:`TABLES` why it does not take a call, or ""."""
    if TABLES[op] == "mqa_logits":
        return dict(_logits_reasons(tensors, attrs, device.major))
    return dict(_latent_reasons(op, tensors, attrs, device.major))


def rows_of(op: str, device: Device) -> list[str]:
    """Kernels of an operator of :data:`TABLES` that a GPU runs, as they are tried."""
    return [
        name
        for table, name, first, last in host().all_kernels()
        if table == TABLES[op] and first <= device.major <= last
    ]


def facts_of(
    op: str,
    tensors: Mapping[str, tuple[str, list[int]]],
    attrs: Mapping[str, Any],
    device: Device,
) -> dict[str, Any]:
    """Kernel and plan of any operator's call, as far as the host can be asked; never raises."""
    try:
        if not device.is_gpu:
            isa = f", {host().cpu_isa()}" if "attention" in op else ""
            return {"kernel": f"C++ and OpenMP{isa}"}
        if op in ATTENTION:
            facts = decision(attention_call(op, tensors, attrs), device)
            return {"kernel": ", ".join(facts["kernels"]), **facts}
        if op in TABLES and not tensors:
            return {"kernel": ", else ".join(rows_of(op, device))}
        found: dict[str, Any] = {}
        if op in TABLES:
            why = reasons_of(op, tensors, attrs, device)
            taken = next(name for name, reason in why.items() if not reason)
            found.update(kernel=taken, reasons={k: v for k, v in why.items() if v})
        if op == "indexer_topk":
            rows, keys = tensors["q"][1][0], tensors["keys"][1][0]
            columns = attrs["max_seqlen_k"] if attrs["max_seqlen_k"] > 0 else keys
            tile, workspace = host().plan_indexer_topk(rows, columns, attrs["workspace_bytes"])
            found.update(tile_rows=tile, workspace=workspace)
        if op in ("indexer_topk", "paged_indexer_topk"):
            found["kernel"] += ", topk"
        if found:
            return found
        return {"kernel": f"the operator's only family, on {device.name}"}
    except Exception as error:
        return {"kernel": f"unknown ({type(error).__name__}: {error})"}

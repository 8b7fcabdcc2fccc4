"""What the NumPy models (:mod:`fastattn.reference`) say of a dumped call.

A model takes the arguments of the Python function; a dump has the operator's arguments. The
functions here translate. Operators that have no model are in :data:`WITHOUT_MODEL`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fastattn import reference
from fastattn.dump import compare
from fastattn.dump.compare import Verdict
from fastattn.dump.files import Array
from fastattn.functional._attributes import DEFAULT_SCALE
from fastattn.reference import numerics
from fastattn.reference.cache import code_of, dynamic_scales
from fastattn.reference.step import write_step

Given = dict[str, Any]  # inputs as arrays and attributes, by name; None for an absent input
Results = Mapping[str, Array]
Verdicts = dict[str, Verdict]

#: Operators that no function of :mod:`fastattn.reference` models.
WITHOUT_MODEL = {
    "gqa_rope_write_cache": "it is held to the operators that it joins",
    "merge_prefill_decode_output": "it copies rows",
    "radix_topk_ragged_transform": "it is held to topk_indices",
}

#: Operators that are not called again: a decode server would believe what they say.
NOT_REPLAYED = ("begin_kv_signals", "send_kv_signal")

#: Values of attributes by which an operator means that an argument was not given.
_NOT_GIVEN = {
    "page_size": 0,
    "extra_page_size": 0,
    "padded_heads": 0,
    "num_blocks": -1,
    "rotary_dim": -1,
    "max_seqlen_k": -1,
    "block_stride": -1,
    "prefill_tokens_with_context": -1,
    "softmax_scale": DEFAULT_SCALE,
}


def _call(function: Callable[..., Any], given: Given, **changes: Any) -> Any:
    """Call a model with the arguments that it has parameters for."""
    have = {**given, **changes}
    if "window_left" in given:
        have["window_size"] = (given["window_left"], given["window_right"])
    for name, absent in _NOT_GIVEN.items():
        if have.get(name) == absent and name in given:
            have[name] = None
    parameters = inspect.signature(function).parameters
    return function(**{name: value for name, value in have.items() if name in parameters})


def _result(results: Results, *names: str) -> tuple[str, Array]:
    """The one of several results that was written: a new tensor, or the one that was given."""
    for name in names:
        if name in results:
            return name, results[name]
    raise KeyError(names[0])


def _bits(results: Results, wanted: Mapping[str, Any]) -> Verdicts:
    """Compare by bits; a name may list alternatives, ``result|out_out``."""
    verdicts = {}
    for names, want in wanted.items():
        try:
            name, got = _result(results, *names.split("|"))
        except KeyError:
            continue  # not asked for
        want = np.asarray(want)
        if got.size == want.size:
            want = want.reshape(got.shape)
        if got.dtype.itemsize == want.dtype.itemsize or want.dtype.kind not in "iuf":
            verdicts[name] = compare.same_bits(got, want)
        else:
            verdicts[name] = compare.same_bits(got, want.astype(got.dtype))
    return verdicts


def _tuple_of(model: str, *names: str) -> Callable[..., Verdicts]:
    """A model that returns what the operator does."""

    def check(given: Given, results: Results, on_gpu: bool) -> Verdicts:
        values = _call(getattr(reference, model), given)
        return _bits(results, dict(zip(names, values if isinstance(values, tuple) else (values,))))

    return check


def _in_place(model: str, written: Mapping[str, str]) -> Callable[..., Verdicts]:
    """A model that writes into its arguments, and returns nothing that is compared."""

    def check(given: Given, results: Results, on_gpu: bool) -> Verdicts:
        _call(getattr(reference, model), given)
        return _bits(results, {out: given[name] for out, name in written.items() if out in results})

    return check


_SEQS = ("block_tables", "cu_seqlens_q", "seq_lens_decoder", "seq_lens_this_time")
_CACHES = {
    "key_cache_out": "key_cache",
    "value_cache_out": "value_cache",
    "cache_k_scales_out": "cache_k_scales",
    "cache_v_scales_out": "cache_v_scales",
}


def _rope(given: Given, results: Results, on_gpu: bool) -> Verdicts:
    q, descale = _call(reference.rope_write_cache_kv, given)
    written = {out: given[name] for out, name in _CACHES.items() if out in results}
    return _bits(
        results, {"q": q, **({} if descale is None else {"q_descale": descale}), **written}
    )


def _convert_blocks(given: Given, results: Results, on_gpu: bool) -> Verdicts:
    want = given["cache"].copy()
    blocks = slice(given["begin"], given["end"])
    want[blocks] = _call(reference.convert_cache_layout, given, cache=want[blocks])
    return _bits(results, {"cache_out": want})


def _merge(given: Given, results: Results, on_gpu: bool) -> Verdicts:
    many = "outputs" in given
    scales = given.get("output_scales")
    groups = None if scales is None else scales.shape[1]
    function = reference.merge_many_attn_states if many else reference.merge_attn_states
    values = _call(function, given, groups=groups)
    wanted = {"merged|output_out": values[0]}
    if groups is not None:
        wanted["output_scales_out"] = values[2]
    verdicts = _bits(results, wanted)
    name, lse = _result(results, "merged_lse", "output_lse_out")
    size = np.where(np.isfinite(values[1]), np.abs(values[1].astype(np.float64)), 0)
    # Of two libraries' logarithms each is within one step.
    verdicts[name] = compare.within(lse, values[1], 2 * np.maximum(size, 1) * 2.0**-23)
    return verdicts


def _latent(model: str) -> Callable[..., Verdicts]:
    def check(given: Given, results: Results, on_gpu: bool) -> Verdicts:
        out, lse, *maxima = _call(getattr(reference, model), {**given, "out": None})
        name, got = _result(results, "result", "out_out")
        verdicts = {name: compare.latent_output(got, out)}
        if "softmax_lse" in results and not given.get("flash_mla"):
            verdicts["softmax_lse"] = compare.latent_lse(results["softmax_lse"], lse, on_gpu)
        if "max_logits" in results and not given.get("flash_mla"):
            got = results["max_logits"]
            verdicts["max_logits"] = compare.latent_lse(got, maxima[0], on_gpu)
        return verdicts

    return check


def _logits(model: str) -> Callable[..., Verdicts]:
    def check(given: Given, results: Results, on_gpu: bool) -> Verdicts:
        name, got = _result(results, "logits", "out_out")
        return {name: compare.logits(got, _call(getattr(reference, model), given))}

    return check


def _selection(paged: bool) -> Callable[..., Verdicts]:
    def check(given: Given, results: Results, on_gpu: bool) -> Verdicts:
        name, got = _result(results, "indices", "out_out")
        select = reference.paged_indexer_topk if paged else reference.indexer_topk
        score = reference.paged_mqa_logits if paged else reference.mqa_logits
        # The models of the selection take the logits' arguments as options.
        options = {"q_scales": given["q_scales"], "quant": given["quant"]}
        if paged:
            options["page_size"] = given["page_size"] or None
        else:
            options["k_scales"] = given["k_scales"]
            if given["max_seqlen_k"] >= 0:
                options["max_seqlen_k"] = given["max_seqlen_k"]
        names = [
            name
            for name, parameter in inspect.signature(select).parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        ]
        want = np.asarray(select(*(given[name] for name in names), **options))
        relative = paged or given["max_seqlen_k"] >= 0
        scores = np.asarray(_call(score, given), np.float64)
        starts = None if relative else given["starts"]
        return {name: compare.selection(got, scores, want, starts)}

    return check


def _magnitudes(given: Given) -> Given:
    """A call over the magnitudes of V, whose FP8 codes lose their sign."""
    name = "value_cache" if "value_cache" in given else "v"
    values = given[name]
    if values.dtype.itemsize > 1:
        return {**given, name: np.abs(values)}
    return {**given, name: (values.view(np.uint8) & 0x7F).view(values.dtype)}


def _scale_spread(given: Given) -> float:
    """Largest over smallest scale of V's tokens."""
    kind = given.get("cache_quant_type", "none")
    if not kind.startswith("block_wise"):
        return 1.0
    scales = dynamic_scales(given["cache_v_scales"], kind).astype(np.float64)
    scales = scales[np.isfinite(scales) & (scales > 0)]
    return float(scales.max() / scales.min()) if scales.size else 1.0


def _key_code(given: Given) -> str:
    """``e4m3``, ``int8``, ..; empty for 16-bit keys."""
    if "key_cache" in given:
        kind = given["cache_quant_type"]
        return "" if kind == "none" else code_of(kind, given["fp8_format"])
    k = given["k"]
    if k.dtype == np.int8:
        return "int8"
    return "" if k.dtype.itemsize > 1 else "e5m2" if "e5m2" in k.dtype.name else "e4m3"


def _as_modelled(given: Given) -> Given:
    """Contiguous 8-bit keys and values in the types by which the model tells their codes."""
    kind = {"int8": np.int8, "e5m2": ml_dtypes.float8_e5m2}.get(given.get("kv_dtype", "auto"))
    if kind is None or given["k"].dtype != np.uint8:
        return given
    return {**given, "k": given["k"].view(kind), "v": given["v"].view(kind)}


def _owned(given: Given) -> Array:
    """Mask [T] of the tokens that belong to a sequence."""
    owned = np.zeros(len(given["q"]), bool)
    starts = given["cu_seqlens_q"]
    for b, (begin, end) in enumerate(zip(starts, starts[1:])):
        new = given["seq_lens_this_time"][b] if "seq_lens_this_time" in given else end - begin
        owned[int(begin) : int(min(begin + max(new, 0), end))] = True
    return owned


def _attention(model: str) -> Callable[..., Verdicts]:
    function = getattr(reference, model)

    def check(given: Given, results: Results, on_gpu: bool) -> Verdicts:
        given = _as_modelled(given)
        plain = {**given, "out_scale": None}
        exact, exact_lse = _call(function, plain)
        precision = "bfloat16" if on_gpu else "float32"
        naive, naive_lse = _call(function, plain, precision=precision)
        name, got = _result(results, "result", "out_out")
        # Others have no defined LSE, and keep what a given `out` held.
        owned = _owned(given)
        got, exact, naive = got.reshape(exact.shape)[owned], exact[owned], naive[owned]
        fp8_query = given["q"].dtype == np.uint8 or given.get("quantize_q")
        fp8 = on_gpu and fp8_query and _key_code(given) in ("e4m3", "e5m2")
        dtype = got.dtype.name
        wide: Any = None
        if fp8 or (on_gpu and given["out_scale"] is not None):
            wide = _call(function, _magnitudes(plain))[0][owned]
        if given["out_scale"] is not None:
            extra = 0.0 if wide is None else (2.0**-4 + 0.03 if fp8 else 2.0**-8) * wide
            scale = float(given["out_scale"].reshape(-1)[0])
            verdicts = {name: compare.attention_codes(got, exact, naive, scale, extra)}
        elif fp8:
            twin = {**_magnitudes(plain), "q": np.zeros_like(given["q"]), "sinks": None}
            mean, keys = _call(function, twin)
            total = (mean * np.exp(keys).T[..., None])[owned]
            small = 2.0**-10 / 64 * _scale_spread(given) * total
            verdicts = {name: compare.fp8_output(got, exact, wide, small, dtype)}
        else:
            verdicts = {name: compare.attention_output(got, exact, naive, dtype)}
        if "softmax_lse" in results:
            extra = 0.03 if fp8 else 0.0
            lse = results["softmax_lse"][:, owned]
            verdicts["softmax_lse"] = compare.attention_lse(
                lse, exact_lse[:, owned], naive_lse[:, owned], extra
            )
        return verdicts

    return check


#: Arguments of ``attention_step`` that belong to its writer alone, or to the cache.
_OF_WRITER = frozenset(inspect.signature(reference.rope_write_cache_kv).parameters) - frozenset(
    {"qkv", "key_cache", "value_cache", "rotary_embs", *_SEQS, "q_rotation"}
)


def _step(given: Given, results: Results, on_gpu: bool) -> Verdicts:
    options = {name: given[name] for name in _OF_WRITER}
    if options["rotary_dim"] == _NOT_GIVEN["rotary_dim"]:
        options["rotary_dim"] = None
    caches, seqs = (given["key_cache"], given["value_cache"]), tuple(given[name] for name in _SEQS)
    scores = given["sinks"] is not None or given["return_softmax_lse"]
    written = write_step(given["qkv"], caches, given["rotary_embs"], seqs, scores=scores, **options)
    verdicts = _bits(results, {out: given[name] for out, name in _CACHES.items() if out in results})
    attended = {**given, **written, "quantize_q": False}
    return verdicts | _attention("paged_attention")(attended, results, on_gpu)


def _mxfp4_values(given: Given, results: Results, on_gpu: bool) -> Verdicts:
    dtype = numerics.bfloat16 if given["dtype"] == "bfloat16" else np.dtype(given["dtype"])
    want = reference.mxfp4_dequantize(given["codes"], given["scales"], dtype)
    return _bits(results, {"x": want})


def _save_states(given: Given, results: Results, on_gpu: bool) -> Verdicts:
    return _bits(results, {"state_cache_out": _call(reference.save_partial_states, given)})


MODELS: dict[str, Callable[[Given, Results, bool], Verdicts]] = {
    "attention_step": _step,
    "append_cache_kv_c8": _in_place("append_cache_kv_c8", {"key_out": "key", "value_out": "value"}),
    "flash_attention": _attention("flash_attention"),
    "paged_attention": _attention("paged_attention"),
    "sparse_paged_attention": _attention("sparse_paged_attention"),
    "select_key_blocks": _tuple_of("select_key_blocks", "selected"),
    "update_block_summaries": _tuple_of("update_block_summaries", "summaries_out"),
    "compact_block_tables": _tuple_of("compact_block_tables", "tables", "seq_lens", "masks"),
    "convert_cache_layout": _tuple_of("convert_cache_layout", "out"),
    "convert_cache_blocks": _convert_blocks,
    "topk_to_slots": _tuple_of("topk_to_slots", "slots", "lengths"),
    "window_indices": _tuple_of("window_indices", "indices", "lengths"),
    "short_context_indices": _tuple_of("short_context_indices", "indices", "lengths"),
    "combine_topk_window": _tuple_of("combine_topk_window", "indices", "lengths"),
    "indexer_q_rope_quant": _tuple_of("indexer_q_rope_quant", "codes", "scales", "weights_out"),
    "indexer_q_quant": _tuple_of("indexer_q_quant", "codes", "weights_out"),
    "indexer_kv_compress_insert": _tuple_of("indexer_kv_compress_insert", "kv_cache_out"),
    "indexer_k_write_cache": _tuple_of("indexer_k_write_cache", "cache_out"),
    "indexer_k_gather": _tuple_of("indexer_k_gather", "codes|out_out", "scales|out_scales_out"),
    "indexer_topk": _selection(paged=False),
    "paged_indexer_topk": _selection(paged=True),
    "inverse_rope_quantize_fp8": _tuple_of("inverse_rope_quantize_fp8", "codes", "scales"),
    "merge_attn_states": _merge,
    "merge_many_attn_states": _merge,
    "mla_attention": _latent("mla_attention"),
    "mla_sparse_attention": _latent("mla_sparse_attention"),
    "mla_gather_cache": _tuple_of("mla_gather_cache", "out_out"),
    "mla_qkv_norm_rope_write": _tuple_of("mla_qkv_norm_rope_write", "q_out|out_out", "cache_out"),
    "mla_write_cache": _tuple_of("mla_write_cache", "cache_out"),
    "mqa_logits": _logits("mqa_logits"),
    "paged_mqa_logits": _logits("paged_mqa_logits"),
    "mxfp4_dequantize": _mxfp4_values,
    "mxfp4_quantize": _tuple_of("mxfp4_quantize", "codes", "scales"),
    "quantize_fp8": _tuple_of("quantize_fp8", "codes|output_out", "scales"),
    "query_rows": _tuple_of(
        "query_rows", "lengths", "row_tables", "token_of_query", "query_of_token"
    ),
    "rope_write_cache_kv": _rope,
    "save_partial_states": _save_states,
    "token_maps": _tuple_of("token_maps", "seqs", "positions", "slots"),
    "topk_indices": _tuple_of("topk_indices", "indices|out_out"),
    "write_cache_kv": _in_place("write_cache_kv", _CACHES),
}

#: Products of the models, from which a replay leaves them out: minutes of NumPy, gigabytes.
MOST_WORK = 2e10


#: Operators whose models multiply all queries by all keys. A sparse one masks most of them.
_DENSE = (
    *("paged_attention", "sparse_paged_attention", "flash_attention"),
    *("mla_attention", "mqa_logits"),
)


def work_of(op: str, given: Given) -> float:
    """Products of an attention model, roughly: its fp64 matrices hold all queries by all keys."""
    if op == "attention_step":
        (tokens, width), heads = given["qkv"].shape, given["num_heads"]
        dim = width // (heads + 2 * given["num_kv_heads"])
    elif op in _DENSE:
        tokens, heads, dim = given["q"].shape
    else:
        return 0.0
    keys = given.get("max_seqlen_k", 1)
    if op == "mqa_logits":
        keys = given["keys"].shape[0]
    return 2.0 * tokens * heads * dim * max(int(keys), 1)


def verdicts(op: str, given: Given, results: Results, *, on_gpu: bool) -> Verdicts:
    """Hold results to the model of an operator.

    Parameters
    ----------
    op : str
    given : dict
        Arrays of the inputs as :func:`fastattn.dump.tensors.array_of` makes them (models may write
        into them), None for absent ones, and the attributes.
    results : mapping of arrays
    on_gpu : bool
        Whether a GPU made the results: it multiplies in 16 or 8 bits.

    Returns
    -------
    dict
        A verdict by result. One whose `fits` is None tells why there is no comparison.
    """
    if op not in MODELS:
        return {"-": Verdict(None, f"no NumPy model: {WITHOUT_MODEL.get(op, 'unknown operator')}")}
    try:
        return MODELS[op](given, results, on_gpu)
    except Exception as error:
        why = f"the NumPy model does not take it: {type(error).__name__}: {error}"
        return {"-": Verdict(None, why)}

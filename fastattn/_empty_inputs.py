"""Rules for optional inputs without elements: which operators may be given them.

Paddle's registry passes an empty optional tensor as an absent one, which has another meaning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn._ops import OpSignature

#: Inputs that are never copied: at every call it would copy a pool of gigabytes.
CACHES = frozenset(
    {
        *("cache", "key_cache", "value_cache", "cache_k_scales", "cache_v_scales"),
        *("extra_cache", "kv_cache", "state_cache"),
    }
)

# Optional inputs with one entry per token or sequence, which are empty if the step has none. An
# operator that is called directly sees the empty tensor, and its own shape check decides.
_PER_TOKEN = frozenset(
    {
        "batch_id_per_token",
        "batch_ids",
        "extra_indices",
        "extra_topk_length",
        "k_descale",
        "mask_offsets",
        "out",
        "out_scales",
        "output",
        "output_lse",
        "output_scales",
        "position_ids",
        "q_descale",
        "topk_length",
        "topk_lengths",
        "q_scales",
        "row_ids",
        "selected_lens",
        "starts",
        "token_of_query",
        "v_descale",
        "window_lengths",
    }
)


def may_not_be_empty(sig: OpSignature, index: int) -> bool:
    """Whether an optional input has elements in every step, even in an empty one.

    Paddle passes an empty optional tensor as an absent one.
    """
    name = sig.inputs[index]
    # A cache without blocks has empty scales; the operator checks them.
    return sig.optional[index] and name not in _PER_TOKEN and not name.startswith("cache_")


def is_per_token(sig: OpSignature, index: int) -> bool:
    """Whether an optional input has entries whenever the operator's first input has.

    Descales may have one entry per sequence, and extra indices may have no column. The first input
    may be a cache.
    """
    name, first = sig.inputs[index], sig.inputs[0]
    others = name.endswith("_descale") or name == "extra_indices"
    counts = first not in CACHES and "num_tokens" not in sig.attrs
    return sig.optional[index] and name in _PER_TOKEN and counts and not others


def _has_no_tokens(sig: OpSignature, values: tuple[Any, ...], attrs: tuple[Any, ...]) -> bool:
    if any(n == "num_tokens" and type(x) is int and x == 0 for n, x in zip(sig.attrs, attrs)):
        return True
    return 0 in getattr(values[0], "shape", ())


def may_be_empty(
    sig: OpSignature, index: int, values: tuple[Any, ...], attrs: tuple[Any, ...], registered: bool
) -> bool:
    """Whether an optional tensor without elements may be passed to the operator.

    Paddle's registry passes an absent tensor instead, which may make no difference.
    """
    name, shape = sig.inputs[index], values[index].shape
    if may_not_be_empty(sig, index):
        return not registered and _has_no_tokens(sig, values, attrs)
    if not registered or name.startswith("cache_"):
        return True
    if name.endswith("_descale") and len(shape) == 2 and shape[0] == 0:
        # One entry per sequence: nothing is lost if there are no sequences.
        starts = values[sig.inputs.index("cu_seqlens_q")]
        if list(getattr(starts, "shape", ())) == [1]:
            return True
    return _has_no_tokens(sig, values, attrs)

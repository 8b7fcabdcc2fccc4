"""A layer's step as two operators, for steps that need something between or instead of one.

Signals of a prefill server are sent between the write and the attention. A cascade attends to the
cache in its own way. Trees of drafts and windows of some heads are arguments of the attention only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle

from fastattn import _views, functional
from fastattn.backends.layer_facts import OFFSETS_ALONE

#: Options of ``attention_step`` that only the attention takes, and those that both operators take.
_ATTENDS = frozenset(
    {"batch_invariant", "split_invariant", "causal", "out_scale", "sinks", "window_size"}
)
_BOTH = frozenset({"cache_quant_type", "fp8_format"})


def _left_to_attention(options: dict[str, Any]) -> bool:
    """Whether the attention rotates Q and knows the centre of K.

    Mostly the writer rotates Q along with K, so the attention need not. But a sink needs the scores
    of the original K.
    """
    return options["k_center"] is not None and options["sinks"] is not None


@dataclass
class StepTensors:
    """A step's arguments of ``attention_step``. The methods take the layer's as `options`.

    Attributes
    ----------
    qkv, key, value, rotary_embs, batch_ids : Tensor
    seqs : tuple of Tensor
        Block tables, starts, cached and new lengths.
    lengths : (int, int)
        Upper bounds of the new tokens and of the keys of a sequence.
    scales : tuple of Tensor or None
        Scales of K and V.
    mask : Tensor or None
        Offsets [T, 2], which are then the whole mask.
    trees, windows : Tensor or None
        `tree_mask` and `head_windows` of ``paged_attention``.
    plan : CascadePlan or None
    """

    qkv: Any
    key: Any
    value: Any
    rotary_embs: Any
    seqs: tuple[Any, Any, Any, Any]
    lengths: tuple[int, int]
    batch_ids: Any
    scales: tuple[Any, Any]
    mask: Any
    trees: Any
    windows: Any
    plan: Any

    def write(self, options: dict[str, Any], rotates: bool = True) -> tuple[Any, Any]:
        """Run ``rope_write_cache_kv``. Returns Q and its scales. `rotates`: Q, too, like K."""
        write: dict[str, Any] = {name: x for name, x in options.items() if name not in _ATTENDS}
        if rotates and not _left_to_attention(options):
            write["q_rotation"] = options["k_rotation"]
        tables, starts, cached, new = self.seqs
        return functional.rope_write_cache_kv(
            self.qkv,
            self.key,
            self.value,
            self.rotary_embs,
            tables,
            starts,
            cached,
            new,
            cache_k_scales=self.scales[0],
            cache_v_scales=self.scales[1],
            batch_id_per_token=self.batch_ids,
            **write,
        )

    def attend(self, options: dict[str, Any], query: Any, q_descale: Any) -> Any:
        """Run ``paged_attention`` or a cascade. Returns its output [T, H * D]."""
        attend = {name: x for name, x in options.items() if name in _ATTENDS | _BOTH}
        if _left_to_attention(options):
            attend.update(k_rotation=options["k_rotation"], k_center=options["k_center"])
        if self.mask is not None:
            attend.update(OFFSETS_ALONE, mask_offsets=self.mask)
        if q_descale is not None and attend["out_scale"] is None:
            attend["out_dtype"] = "float16" if self.qkv.dtype == paddle.float16 else "bfloat16"
        attend.update(
            q_descale=q_descale, cache_k_scales=self.scales[0], cache_v_scales=self.scales[1]
        )
        caches = self.key, self.value
        # A cascade requires that every query sees all keys of the prefix.
        whole = self.mask is None and self.trees is None and self.windows is None
        sees_all = whole and attend["window_size"] == (-1, -1)
        if self.plan is None or not sees_all:
            attend.update(tree_mask=self.trees, head_windows=self.windows)
            attended = functional.paged_attention(
                query, *caches, *self.seqs, *self.lengths, **attend
            )
        else:
            _, starts, _, new = self.seqs
            attended = functional.cascade_attention(
                query, *caches, self.plan, starts, new, *self.lengths, **attend
            )
        return _views.flat(attended)

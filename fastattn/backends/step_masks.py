"""Masks of a step that are given as offsets, and the part that a layer with a window sees."""

from __future__ import annotations

from typing import Any

import paddle

from fastattn.backends.forward_meta import optional

#: Number of windowed masks that a step remembers: two micro-batches and two window sizes.
_MOST_WINDOWED = 4


#: Whether SOT is translating; Paddle 2.6 has another SOT, which skips this package's frames.
_simulates = getattr(paddle.base.dygraph.base, "in_sot_simulation_mode", bool)


def mask_offsets(forward_meta: Any, metadata: Any) -> Any:
    """Offsets [T, 2] of the step that was passed to `forward`, or None.

    They may differ from the offsets of the prepared step: two-batch overlap passes its
    micro-batches to `forward`.
    """
    offsets = optional(forward_meta, "attn_mask_offsets")
    if offsets is None or len(offsets.shape) != 1:
        return offsets
    pair = metadata.mask
    if pair is None or pair[0] is not offsets or 2 * pair[1].shape[0] != offsets.shape[0]:
        metadata.mask = pair = offsets, offsets.reshape([-1, 2])
    return pair[1]


def layer_mask(mask: Any, forward_meta: Any, metadata: Any, window: int, layer_id: int) -> Any:
    """Offsets [T, 2] of the keys that a layer sees, for a step with the offsets `mask`.

    The first layer with a window makes the windowed offsets for later layers. This layer, or an
    earlier one, makes them again when it starts again. A server runs the same step once eagerly and
    once more to capture a CUDA graph, which must contain them.
    """
    if not window or mask.shape[0] == 0:  # Paddle 2.6 cannot concatenate empty tensors
        return mask
    if not paddle.in_dynamic_mode():
        return last_keys(mask, window)
    given = optional(forward_meta, "attn_mask_offsets")
    version = getattr(given, "inplace_version", 0)
    known = metadata.windowed
    for index, (offsets, seen, size, maker, made) in enumerate(known):
        if offsets is given and size == window:
            if maker < layer_id and seen == version:
                return made
            del known[index]
            break
    del known[: max(0, len(known) - _MOST_WINDOWED + 1)]
    known.append((given, version, window, layer_id, last_keys(mask, window)))
    return known[-1][-1]


def draft_trees(forward_meta: Any, metadata: Any, layer_id: int) -> Any:
    """Trees [S, N, N] of drafts from ``forward_meta.attn_mask``, for the operator's `tree_mask`.

    FastDeploy's mask has the opposite sense: true hides a token. It hides no first token, and no
    token of a prompt. The layer that comes first makes the trees for later layers, and makes them
    again when it starts again: a CUDA graph must contain that.
    """
    given = metadata.drafts
    known = metadata.trees
    if paddle.in_dynamic_mode() and not in_sot() and known is not None:
        mask, version, maker, made = known
        if mask is given and maker < layer_id and version == getattr(given, "inplace_version", 0):
            return made
    made = visible_drafts(given, optional(forward_meta, "seq_lens_encoder"))
    if paddle.in_dynamic_mode() and not in_sot():
        metadata.trees = given, getattr(given, "inplace_version", 0), layer_id, made
    return made


def visible_drafts(mask: Any, seq_lens_encoder: Any) -> Any:
    """The tokens of a step that each of them sees, [S, N, N] bool, from FastDeploy's mask."""
    hidden = mask if mask.dtype == paddle.bool else mask.astype("bool")
    column = paddle.arange(mask.shape[2], dtype="int32")
    seen = paddle.logical_or(paddle.logical_not(hidden), column == 0)
    if seq_lens_encoder is None:
        return seen
    prompts = seq_lens_encoder.reshape([-1, 1, 1])[: mask.shape[0]] > 0
    return paddle.logical_or(seen, prompts)


def last_keys(mask: Any, window: int) -> Any:
    """Offsets [T, 2] of the last `window` keys of each interval.

    A window counts back from the end of the interval, as in FastDeploy. So queries of one image,
    which see all of it, see the same keys before it.
    """
    start, end = mask[:, :1], mask[:, 1:]
    return paddle.concat([paddle.maximum(start, end - window), end], axis=1)


def in_sot() -> bool:
    """Whether Paddle 3 translates the caller by SOT, which also is dynamic mode."""
    return bool(_simulates())

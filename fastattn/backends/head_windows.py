"""Layers in which only some KV heads have the window, or first tokens stay visible beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from fastattn.backends.config import BackendConfig


def head_windows(
    config: BackendConfig,
    window: int,
    heads: tuple[int, int, int],
    batch_invariant: bool,
    refuse: Callable[[str, str], NoReturn],
) -> list[tuple[int, int]]:
    """(left, first) of each KV head, for the operator's `head_windows`.

    Parameters
    ----------
    config : BackendConfig
    window : int
        Number of keys that a query of the layer sees, its own included; 0 means all.
    heads : (int, int, int)
        Numbers of query heads and of KV heads of this process, and the head dimension.
    batch_invariant : bool
    refuse : callable
        Raises NotImplementedError for what is not supported, and says more.

    Returns
    -------
    list of (int, int)
        Empty if the window is that of all heads, and hides the first tokens, too.
    """
    part, first = config.window_heads, config.first_tokens
    num_heads, kv_heads, head_dim = heads
    if not window or not (part or first):
        return []
    # FastDeploy counts the channels of the heads without a window.
    channels = int((1 - part) * num_heads * head_dim) if part else 0
    of_head = num_heads // kv_heads * head_dim
    if channels % of_head:
        refuse(
            f"model_config.head_wise_swa_ratio = {part!r}",
            f": its limit lies inside of a KV head's {of_head} channels of queries",
        )
    if batch_invariant:
        refuse("a window of some heads, or with model_config.sink_size,", " with batch_invariant")
    whole = channels // of_head
    return [(-1, 0)] * whole + [(window - 1, first)] * (kv_heads - whole)

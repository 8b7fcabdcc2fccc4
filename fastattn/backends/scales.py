"""Static scales of a layer, as FastDeploy keeps them.

``layer.cache_{k,v}_scale`` are quantisation multipliers (``codes = x * scale``).
``layer.cache_{k,v}_out_scale`` are dequantisation multipliers (``x = codes * scale``). All
operators of fastattn take the latter.

FastDeploy makes the FP8 scales for all heads of the model. Under tensor parallelism a rank holds
only some of the heads, so the scales must be cut to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import paddle


@dataclass(frozen=True)
class HeadShard:
    """The KV heads of the model that this process holds.

    Parameters
    ----------
    num_heads : int, optional
        Number of KV heads of the whole model; None if this process holds all of them.
    size, rank : int
        Number of tensor-parallel processes, and the rank of this one. With more processes than
        heads, ``size / num_heads`` processes hold each head.
    """

    num_heads: int | None = None
    size: int = 1
    rank: int = 0

    def holds(self, local_heads: int) -> bool:
        """Whether this process holds that many heads."""
        total = local_heads * self.size if self.num_heads is None else self.num_heads
        larger, smaller = max(total, self.size), min(total, self.size)
        share = max(total // max(self.size, 1), 1)
        divides = smaller > 0 and larger % smaller == 0
        return share == local_heads and divides and 0 <= self.rank < self.size

    def first_head(self, local_heads: int) -> int:
        """Index of this process's first head in the model.

        Raises
        ------
        ValueError
            If `local_heads` is not the number of heads of one process.
        """
        if self.size < 1 or local_heads < 1:
            raise ValueError(f"{local_heads} KV heads on one of {self.size} tensor parallel ranks")
        total = local_heads * self.size if self.num_heads is None else self.num_heads
        if not self.holds(local_heads):
            raise ValueError(
                f"tensor parallel rank {self.rank} of {self.size} cannot hold {local_heads} of "
                f"{total} KV heads"
            )
        return self.rank * total // self.size


def local_scales(
    scales: Any, *, name: str, kv_heads: int, head_dim: int, shard: HeadShard, per_channel: bool
) -> Any:
    """Scales of this process's heads, float32 or bfloat16.

    Parameters
    ----------
    scales : Tensor, shape [1], [heads] or, with `per_channel`, [heads * D]
        For this process's heads or for all heads of the model.
    name : str
        Name for messages.
    kv_heads, head_dim : int
        Number of heads in this process's cache, and their size.

    Raises
    ------
    ValueError
        If the number of scales matches neither.
    """
    count = 1
    for size in scales.shape:
        count *= int(size)
    model_heads = kv_heads if shard.num_heads is None else shard.num_heads
    widths = (1, head_dim) if per_channel else (1,)
    if not scales.stop_gradient and paddle.in_dynamic_mode():
        # A parameter. The operators list scales among the tensors that they write (dynamic types
        # do), and Paddle refuses this for a tensor that requires a gradient. A traced program has
        # no gradients, and cannot run what Paddle traces for this.
        scales = scales.detach()
    if scales.dtype == paddle.float16:
        scales = scales.astype("float32")
    if len(scales.shape) != 1:
        scales = scales.reshape([count])
    if count == 1 or count in [kv_heads * width for width in widths]:
        return scales
    for width in widths:
        if count == model_heads * width:
            first = shard.first_head(kv_heads) * width
            return scales[first : first + kv_heads * width]
    allowed = sorted({1} | {h * w for h in (kv_heads, model_heads) for w in widths})
    raise ValueError(
        f"{name}: expected {' or '.join(map(str, allowed))} scales for {kv_heads} of {model_heads} "
        f"KV heads of {head_dim} channels, got {count}"
    )


def local_heads(name: str, tensor: Any, shape: list[int], shard: HeadShard) -> Any:
    """What this process's KV heads have of a layer's tensor, float32.

    Parameters
    ----------
    name : str
        The layer's attribute.
    tensor : Tensor, shape [heads, ...]
        For this process's heads, or for all heads of the model.
    shape : list of int
        For this process's heads.

    Raises
    ------
    ValueError
        If the shape matches neither.
    """
    if not tensor.stop_gradient and paddle.in_dynamic_mode():
        tensor = tensor.detach()  # as for scales
    if tensor.dtype != paddle.float32:
        tensor = tensor.astype("float32")
    got = [int(size) for size in tensor.shape]
    if got == shape:
        return tensor
    kv_heads = shape[0]
    whole = [kv_heads if shard.num_heads is None else shard.num_heads, *shape[1:]]
    if got == whole:
        first = shard.first_head(kv_heads)
        return tensor[first : first + kv_heads]
    raise ValueError(
        f"layer.{name}: expected shape {shape} or {whole} (KV heads, channels), got {got}"
    )

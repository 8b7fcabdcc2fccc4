"""FastDeploy's operator of latent caches, for :mod:`fastattn.compat.fastdeploy`."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified
from fastattn.functional.mla import mla_write_cache

#: Formats that FastDeploy's operator copies unchanged. It treats any other string but fp8_ds_mla in
#: the same way.
_PLAIN = ("auto", "none", "", "bf16", "bfloat16")


@unified
def dsk_attn_write_cache(
    kv_nope: Tensor,
    kv_pe: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    scale: Tensor | None,
    cache_quant_type_str: str,
) -> Tensor:
    """Write the latent and rotated channels of new tokens into a latent cache, in place.

    This is :func:`fastattn.functional.mla_write_cache` under FastDeploy's name, with scales of
    ``max(amax / 448, 2 ** -126)``. Differences from FastDeploy's operator: there may be fewer slots
    than tokens. A slot past the last block is skipped. A NaN stays a NaN. Blocks may have any
    stride.

    Parameters
    ----------
    kv_nope : Tensor, shape [T, 512], bfloat16
    kv_pe : Tensor, shape [T, 64] or [T, 1, 64], bfloat16
        Any token stride.
    kv_cache : Tensor, shape [num_blocks, 1, block_size, W]
        "fp8_ds_mla": W is 656, uint8. Otherwise W is 576, bfloat16. Written in place.
    slot_mapping : Tensor, shape [S], int64 or int32
        Slots of the first S tokens, S <= T. A token with a negative slot is skipped.
    scale : any
        Not used.
    cache_quant_type_str : {"fp8_ds_mla", "auto", "none", "", "bf16", "bfloat16"}

    Returns
    -------
    Tensor
        `kv_cache`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or an argument is not a tensor.
    ValueError
        If shapes do not match.
    NotImplementedError
        If `cache_quant_type_str` is not one of the listed names.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.fastdeploy import dsk_attn_write_cache
    >>> cache = paddle.zeros([1, 1, 64, 656], "uint8")
    >>> _ = dsk_attn_write_cache(
    ...     paddle.full([1, 512], 448.0).astype("bfloat16"),
    ...     paddle.ones([1, 1, 64], "bfloat16"), cache, paddle.to_tensor([1]), None, "fp8_ds_mla",
    ... )
    >>> cache.numpy()[0, 0, 1, [0, 514, 515, 528, 529]].tolist()
    [126, 128, 63, 128, 63]
    """
    op = "dsk_attn_write_cache"
    quantised = cache_quant_type_str == "fp8_ds_mla"
    if not quantised and cache_quant_type_str not in _PLAIN:
        raise NotImplementedError(
            f"{op}: cache_quant_type_str: expected 'fp8_ds_mla' or 'auto', got "
            f"{cache_quant_type_str!r}"
        )
    if _ops.is_tensor(kv_pe) and len(kv_pe.shape) == 3 and kv_pe.shape[1] == 1:
        kv_pe = kv_pe.squeeze(1)
    if _ops.is_tensor(kv_cache) and (len(kv_cache.shape) != 4 or kv_cache.shape[1] != 1):
        raise ValueError(
            f"{op}: kv_cache: expected shape [num_blocks, 1, block_size, "
            f"{656 if quantised else 576}], got {list(kv_cache.shape)}"
        )
    return mla_write_cache(
        kv_nope,
        kv_pe,
        kv_cache,
        slot_mapping,
        cache_format="fp8_656" if quantised else "bf16",
        scale_rule="amax" if quantised else "pow2",
    )

"""What surrounds the latent attention of a DeepSeek-V4 layer."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified


@unified
def inverse_rope_quantize_fp8(
    x: Tensor,
    positions: Tensor,
    cos_sin_cache: Tensor,
    *,
    num_groups: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""Rotate the output of DeepSeek-V4's attention back and quantise it for the output projection.

    V4's keys are its values, rotated channels included, so that the output's last 64 channels are
    rotated back by the query's position, in pairs (GPT-J style):
    :math:`e' = e\,c + o\,s,\ o' = o\,c - e\,s`. All is fp32, without a rounding to bf16 in between.
    Each 128 channels then get a scale

    .. math:: s = 2^{\lceil\log_2(\max(\mathrm{amax}, 10^{-10}) / 448)\rceil}, \qquad
              c = \mathrm{e4m3}(x / s)

    Heads belong to groups, each of which has an output projection of its own. Codes and scales lie
    as a grouped FP8 product with scales of 1 x 128 wants its operand: a group's tokens together,
    and scales with the token fastest.

    Parameters
    ----------
    x : Tensor, shape [T, H, 512], bfloat16
        The attention's output. Tokens and heads may have any stride, so that a view without padded
        heads works.
    positions : Tensor, shape [T], int32 or int64
        Position of each query. Clamped to ``[0, max_positions)``.
    cos_sin_cache : Tensor, shape [max_positions, 64], float32 or bfloat16
        32 cosines, then 32 sines.
    num_groups : int
        Groups G of H / G neighbouring heads.

    Returns
    -------
    codes : Tensor, shape [G, T, H / G * 512], uint8
        e4m3 codes. Infinities saturate.
    scales : Tensor, shape [G, H / G * 4, T rounded up to a multiple of 4], float32
        Dequantisation multiplier of channels 128j .. 128j + 127 of token t at ``[g, j, t]``, a
        power of two; 0 behind the last token. A block with a NaN has a NaN scale and NaN codes.

    Raises
    ------
    TypeError
        If an argument is not a tensor or has another dtype.
    ValueError
        If a shape is wrong, `cos_sin_cache` is empty, or `num_groups` does not divide the number of
        heads. On a GPU tokens and heads of `x` start at multiples of 16 bytes.

    See Also
    --------
    mla_qkv_norm_rope_write : the rotation in front of the attention.
    fastattn.reference.inverse_rope_quantize_fp8 : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import inverse_rope_quantize_fp8
    >>> table = paddle.concat([paddle.zeros([4, 32]), paddle.ones([4, 32])], axis=1)  # 90 degrees
    >>> x = paddle.zeros([1, 2, 512], "bfloat16")
    >>> x[0, 0, 448:450] = paddle.to_tensor([1.0, 2.0], "bfloat16")
    >>> codes, scales = inverse_rope_quantize_fp8(x, paddle.to_tensor([3]), table, num_groups=2)
    >>> list(codes.shape), list(scales.shape), scales.numpy()[0, 3].tolist()
    ([2, 1, 512], [2, 4, 4], [0.0078125, 0.0, 0.0, 0.0])
    >>> codes.numpy()[0, 0, 448:450].tolist()  # 2 and -1
    [120, 240]
    """
    codes, scales = _ops.call(
        "inverse_rope_quantize_fp8", (x, positions, cos_sin_cache), (num_groups,)
    )
    return codes, scales

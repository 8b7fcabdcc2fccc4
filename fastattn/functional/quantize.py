"""FP8 quantisation of activations."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified


@unified
def quantize_fp8(
    x: Tensor,
    scale: Tensor | None = None,
    *,
    granularity: str = "tensor",
    group_size: int = 128,
    output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Quantise a tensor to e4m3, with a given scale or with a scale measured on the device.

    .. math:: s = \max(\mathrm{amax}, 10^{-10}) / 448, \qquad
              c = \mathrm{e4m3}(\mathrm{saturate}(x \cdot (1 / s)))

    Parameters
    ----------
    x : Tensor, shape [..., C], float32, float16 or bfloat16
    scale : Tensor, shape [1], float32, optional
        Static scale: a dequantisation multiplier (``x ~ code * scale``). It is read on the device.
    granularity : {"tensor", "token", "group"}
        Elements that share a dynamic scale if no `scale` is given: the whole tensor, the C elements
        of a token, or groups of `group_size` elements.
    group_size : int
        Number of elements that share a scale for ``"group"``. It divides C.
    output : Tensor, shape of `x`, uint8 or float8_e4m3fn, contiguous, optional
        Written in place and returned as `codes`.

    Returns
    -------
    codes : Tensor, shape of `x`, uint8 (or the dtype of `output`)
        e4m3 codes. Values saturate. NaN becomes 0x7F and makes a dynamic scale NaN.
    scales : Tensor, float32
        `scale` itself, or shape [1], [..., 1] or [..., C / group_size].

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or `x` is not a tensor.
    ValueError
        If the shape of `scale` is not [1], the shape of `output` is not the shape of `x`,
        `granularity` is unknown, or `group_size` does not divide C.

    See Also
    --------
    fastattn.reference.quantize_fp8 : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import quantize_fp8
    >>> codes, scale = quantize_fp8(paddle.to_tensor([[1.0, -2.0, 4.0]]), granularity="token")
    >>> codes.numpy()
    array([[110, 246, 126]], dtype=uint8)
    """
    # `codes` shares its memory with a given `output`.
    codes, scales, _ = _ops.call("quantize_fp8", (x, scale, output), (granularity, group_size))
    return codes, scales

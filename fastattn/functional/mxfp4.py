"""MXFP4: E2M1 codes, two per byte, with one UE8M0 exponent for 32 elements."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified


@unified
def mxfp4_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    r"""Quantise to MXFP4 (the OCP microscaling format, [1]_).

    For each block of 32 elements of the last dimension:

    .. math:: e = \lceil \log_2(\max(\mathrm{amax}, 6 \cdot 2^{-126}) / 6) \rceil, \qquad
              c = \mathrm{e2m1}(x \cdot 2^{-e})

    The exponent is computed from the bits of amax, without a rounded logarithm. E2M1 rounds to
    nearest, ties to even, and keeps the sign of zero (-0 is code 8). It has no NaN: a NaN becomes
    code 7 and does not count for amax, so the rest of its block keeps its values. An infinite amax
    counts as the largest finite fp32 value.

    Parameters
    ----------
    x : Tensor, shape [..., C], float32, float16 or bfloat16
        C is a multiple of 32.

    Returns
    -------
    codes : Tensor, shape [..., C / 2], uint8
        Elements 2i (low nibble) and 2i + 1 (high nibble) in byte i.
    scales : Tensor, shape [..., C / 32], uint8
        UE8M0: ``e + 127``.

    Raises
    ------
    TypeError
        If `x` is not a tensor of one of the listed dtypes.
    ValueError
        If C is not a multiple of 32.

    See Also
    --------
    mxfp4_dequantize : the inverse.
    fastattn.reference.mxfp4_quantize : the same in NumPy, bit by bit.

    References
    ----------
    .. [1] "OCP Microscaling Formats (MX) Specification", version 1.0, sections 5.3.3 and 6.3

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mxfp4_quantize
    >>> codes, scales = mxfp4_quantize(paddle.full([1, 32], -6.0))
    >>> codes.numpy()[0, :3].tolist(), scales.numpy().tolist()
    ([255, 255, 255], [[127]])
    """
    codes, scales = _ops.call("mxfp4_quantize", (x,))
    return codes, scales


@unified
def mxfp4_dequantize(codes: Tensor, scales: Tensor, *, dtype: str = "float32") -> Tensor:
    r"""Values of MXFP4 codes: ``e2m1(code) * 2 ** (scale - 127)``.

    The product is exact in fp32 (infinite where it overflows) and is then rounded to `dtype`. A
    scale byte of 255 is NaN.

    Parameters
    ----------
    codes : Tensor, shape [..., C / 2], uint8
        As :func:`mxfp4_quantize` returns them. C is a multiple of 32.
    scales : Tensor, shape [..., C / 32], uint8
    dtype : {"float32", "float16", "bfloat16"}

    Returns
    -------
    Tensor, shape [..., C], `dtype`

    Raises
    ------
    TypeError
        If an input is not a uint8 tensor.
    ValueError
        If the shapes do not match, or `dtype` is not one of those above.

    See Also
    --------
    fastattn.reference.mxfp4_dequantize : the same in NumPy, bit by bit.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import mxfp4_dequantize, mxfp4_quantize
    >>> x = paddle.full([1, 32], 3.0)
    >>> bool((mxfp4_dequantize(*mxfp4_quantize(x)) == x).all())
    True
    """
    # A traced program needs the dtype before the operator runs.
    if dtype not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            f"mxfp4_dequantize: dtype: expected float32, float16 or bfloat16, got {dtype!r}"
        )
    (x,) = _ops.call("mxfp4_dequantize", (codes, scales), (dtype,))
    return x

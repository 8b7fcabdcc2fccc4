"""A readable NumPy model of every operator. It imports no Paddle and is slow on purpose."""

from fastattn.reference.quantize import quantize_fp8

__all__ = ["quantize_fp8"]

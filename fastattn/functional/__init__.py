"""The operators, as typed and validating Python functions."""

from fastattn.functional.quantize import quantize_fp8

__all__ = ["quantize_fp8"]

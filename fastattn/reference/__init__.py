"""A readable NumPy model of every operator. It imports no Paddle and is slow on purpose."""

from fastattn.reference.attention import attention_mask, flash_attention, paged_attention
from fastattn.reference.quantize import quantize_fp8

__all__ = ["attention_mask", "flash_attention", "paged_attention", "quantize_fp8"]

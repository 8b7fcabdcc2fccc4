"""NumPy arrays to Paddle tensors and back, on any place and under any supported Paddle."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import paddle
import pytest

BF16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)

#: Paddle 2.6 refuses a custom operator's output of size 0 (in-place outputs apart).
EMPTY_OUTPUTS = not paddle.__version__.startswith("2.")


#: Paddle 2.6 has no code for a GPU of today: on one it copies, and computes nothing.
ONLY_COPIES_ON_GPU = paddle.__version__.startswith("2.")


def skip_slices_on(place: str) -> None:
    """Skip where a slice is a copy by Paddle's own kernel, which may not run there."""
    if place == "gpu" and ONLY_COPIES_ON_GPU:
        pytest.skip("Paddle 2.6 copies slices with a kernel that this GPU cannot run")


DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": BF16}


def to_paddle(array, place: str = "cpu") -> paddle.Tensor:
    """Tensor with the same bits; only a host-to-device copy happens on a GPU.

    bfloat16 arrays become bfloat16 tensors, FP8 arrays uint8 tensors (Paddle 2.6 has no FP8).
    """
    array = np.ascontiguousarray(array)
    if array.dtype == BF16:
        array = array.view(np.uint16)  # Paddle's NumPy type of bfloat16
    elif array.dtype in (E4M3, E5M2):
        array = array.view(np.uint8)
    return paddle.to_tensor(
        array, place=paddle.CPUPlace() if place == "cpu" else paddle.CUDAPlace(0)
    )


def to_numpy(tensor: paddle.Tensor) -> np.ndarray:
    """Array with the same bits; bfloat16 comes back as ml_dtypes.bfloat16, FP8 as uint8 codes."""
    array = tensor.numpy()
    if tensor.dtype == paddle.bfloat16:
        return array.view(BF16)
    if "float8" in str(tensor.dtype):
        return array.view(np.uint8)
    return array


def value_dim(head_dim: int) -> int:
    """Channels of V, and of attention's output, where Q and K have `head_dim`."""
    return 128 if head_dim == 192 else head_dim


def int32(values, place: str = "cpu") -> paddle.Tensor:
    return to_paddle(np.asarray(values, np.int32), place)


def ue8m0_byte(scale: float) -> int:
    """Exponent byte of the power of two that is nearest to a scale; 255 if it is not finite."""
    return int(np.clip(127 + np.round(np.log2(scale)), 0, 254)) if np.isfinite(scale) else 255

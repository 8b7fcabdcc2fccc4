"""NumPy model of the transformation of K before quantisation: `k_center` and `k_rotation`."""

from __future__ import annotations

import numpy as np

from fastattn.reference.numerics import Array


def hadamard_size(head_dim: int) -> int:
    """Number of channels that a rotation mixes: the largest power of two that divides the head
    dimension.
    """
    return head_dim & -head_dim


def hadamard(x: Array) -> Array:
    """Rotate the last dimension by the normalised Hadamard matrix, in fp32.

    Butterflies (a + b, a - b) combine channels at distances 1, 2, 4, ..; then the result is
    multiplied by 1 / sqrt(size). Every implementation uses this order, so all have the same bits.
    The matrix is symmetric and its own inverse: ``hadamard(hadamard(x))`` is x within rounding.

    Parameters
    ----------
    x : array, shape [..., D]
        If D is not a power of two, each group of ``D & -D`` channels is rotated separately.

    Returns
    -------
    array of float32, shape [..., D]
    """
    y = np.asarray(x).astype(np.float32)
    size = hadamard_size(y.shape[-1])
    step = 1
    with np.errstate(over="ignore", invalid="ignore"):
        while step < size:
            pairs = y.reshape(*y.shape[:-1], -1, 2, step)
            a, b = pairs[..., 0, :], pairs[..., 1, :]
            y = np.stack([a + b, a - b], axis=-2).reshape(y.shape)
            step *= 2
        result: Array = y * np.float32(1 / np.sqrt(size))
    return result


def hadamard_matrix(head_dim: int) -> Array:
    """The matrix, float64 [D, D], in Sylvester's order."""
    size = hadamard_size(head_dim)
    signs = np.array([[bin(i & j).count("1") & 1 for j in range(size)] for i in range(size)])
    block = (1.0 - 2.0 * signs) / np.sqrt(size)
    return np.kron(np.eye(head_dim // size), block)


def rotate_keys(x: Array, rotation: str) -> Array:
    """Return `x` [..., D] as float32, rotated according to `rotation`.

    Raises
    ------
    ValueError
        If `rotation` is neither ``"none"`` nor ``"hadamard"``.
    """
    if rotation == "none":
        return np.asarray(x).astype(np.float32)
    if rotation != "hadamard":
        raise ValueError(f"k_rotation: expected none or hadamard, got {rotation!r}")
    return hadamard(x)


def transform_key(key: Array, k_rotation: str, k_center: Array | None) -> Array:
    """K [T, KV, D] before quantisation: `k_center` [KV, D] is subtracted, then K is rotated;
    float32.
    """
    x = np.asarray(key).astype(np.float32)
    if k_center is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            x = x - np.asarray(k_center, np.float32)
    return rotate_keys(x, k_rotation)


def restore_key(key: Array, k_rotation: str, k_center: Array | None) -> Array:
    """The inverse of :func:`transform_key`, within rounding; float32."""
    x = rotate_keys(key, k_rotation)
    return x if k_center is None else x + np.asarray(k_center, np.float32)

"""NumPy model of `k_feedback`: rounding errors of K that queries see little of."""

from __future__ import annotations

import numpy as np

from fastattn.reference.hadamard import hadamard_matrix
from fastattn.reference.numerics import Array, from_codes, to_codes

#: Channels that are rounded at once.
FEEDBACK_BLOCK = 8


def codes_with_feedback(x: Array, feedback: Array, code: str) -> Array:
    r"""Codes of K. Each block of 8 channels passes its rounding errors on to the channels after it.

    .. math:: c_k = \mathrm{code}(x_k), \qquad e_k = \mathrm{value}(c_k) - x_k, \qquad
              x_j := x_j + \sum_k e_k M_{kj}

    Every operation is one fp32 rounding and the sum has one order, so every implementation has the
    same bits. A channel whose error is not finite passes nothing on.

    Parameters
    ----------
    x : array of float32, shape [..., KV, D]
        In units of the scale.
    feedback : array of float32, shape [KV, D, D]
        M. Only elements to the right of the diagonal's 8 x 8 blocks are read.
    code : str

    Returns
    -------
    array of uint8, shape [..., KV, D]
    """
    x = np.array(x, np.float32)
    matrix = np.asarray(feedback, np.float32)
    codes = np.empty(x.shape, np.uint8)
    with np.errstate(all="ignore"):
        for first in range(0, x.shape[-1], FEEDBACK_BLOCK):
            end = first + FEEDBACK_BLOCK
            own = x[..., first:end]
            codes[..., first:end] = to_codes(own, code)
            error = from_codes(codes[..., first:end], code) - own
            error = np.where(np.isfinite(error), error, np.float32(0))
            parts = [
                error[..., i, None] * matrix[:, first + i, end:] for i in range(FEEDBACK_BLOCK)
            ]
            while len(parts) > 1:  # neighbours first
                parts = [a + b for a, b in zip(parts[::2], parts[1::2])]
            x[..., end:] += parts[0]
    return codes


def _block_factor(matrix: Array) -> Array:
    """U of ``matrix = (I + U) D (I + U)^T``, by elimination from the last block of 8 channels.

    U is above the diagonal's blocks, D has those blocks.
    """
    left, dim = matrix.copy(), len(matrix)
    factor = np.zeros_like(left)
    for first in range(dim - FEEDBACK_BLOCK, 0, -FEEDBACK_BLOCK):
        own, ahead = slice(first, first + FEEDBACK_BLOCK), slice(0, first)
        factor[ahead, own] = np.linalg.solve(left[own, own], left[own, ahead]).T
        left[ahead, ahead] -= factor[ahead, own] @ left[own, ahead]
    return factor


def feedback_of(query_moment: Array, k_rotation: str, *, damping: float = 0.01) -> Array:
    r"""The matrix of `k_feedback` under which scores have the smallest errors.

    A key's rounding errors e change the score of a query by :math:`q \cdot e`, in the mean square
    :math:`e S e^T` with S the second moment of the queries. With
    :math:`S = (I + U) D (I + U)^T` and :math:`M = (I + U)^{-1} - I` that is the sum of
    :math:`\epsilon_b D_b \epsilon_b^T` over blocks, :math:`\epsilon_b` being a block's own rounding
    error: whatever is rounded in a block, the blocks after it take back all that they can. GPTQ
    (Frantar et al., 2022) and LDLQ (Chee et al., 2023) round weights so.

    Parameters
    ----------
    query_moment : array, shape [KV, D, D]
        Mean of :math:`q^T q` over tokens and over the query heads of a KV head, after RoPE.
    k_rotation : {"none", "hadamard"}
        Of the keys that will be quantised.
    damping : float
        Share of the mean diagonal that is added to it.

    Returns
    -------
    array of float32, shape [KV, D, D]
        0 for a head without queries.
    """
    moment = np.asarray(query_moment, np.float64)
    dim = moment.shape[-1]
    if k_rotation == "hadamard":
        rotation = hadamard_matrix(dim)
        moment = rotation @ moment @ rotation
    found = np.zeros(moment.shape, np.float32)
    for head, own in enumerate(moment):
        mean = np.trace(own) / dim
        if mean > 0:
            factor = _block_factor(own / mean + damping * np.eye(dim))
            found[head] = np.linalg.inv(np.eye(dim) + factor) - np.eye(dim)
            for first in range(0, dim, FEEDBACK_BLOCK):  # what the inverse leaves of rounding
                found[head, first : first + FEEDBACK_BLOCK, : first + FEEDBACK_BLOCK] = 0
    return found

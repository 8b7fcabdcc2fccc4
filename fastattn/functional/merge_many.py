"""Merge of any number of partial attentions over disjoint sets of keys."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified


@unified
def merge_many_attn_states(
    outputs: Tensor,
    lses: Tensor,
    *,
    sinks: Tensor | None = None,
    output_scale: Tensor | None = None,
    output: Tensor | None = None,
    sinks_in_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    r"""Merge the partial attentions of the same queries over N disjoint sets of keys.

    This extends :func:`merge_attn_states` to N states, in one kernel and with one rounding.
    :math:`l_n` is the LSE of state n, :math:`s` the sink and :math:`m` the largest of them:

    .. math::

        z = \sum_n e^{l_n - m} + e^{s - m}, \qquad
        o = \sum_n o_n \frac{e^{l_n - m}}{z}, \qquad
        \mathrm{lse} = \ln z + m

    in fp32, in the order of the states (section 2.2 of [1]_). A state is empty for a token and head
    if its LSE is -inf, or +inf, which some kernels use as the mark. The output of an empty state is
    ignored. If all states are empty, the output is 0 and the LSE is -inf, even with a sink. A NaN
    in an LSE, or in the output of a state that is not empty, stays NaN.

    Parameters
    ----------
    outputs : Tensor, shape [N, T, H, D], float32, float16 or bfloat16
        The last dimension must be contiguous; the others may have any strides.
    lses : Tensor, shape [N, H, T], float32
        Natural logarithm. Any strides.
    sinks : Tensor, shape [H], float32 or bfloat16, optional
        A logit for each head. It counts in the denominator, but has no value. -inf and +inf mean no
        sink.
    output_scale : Tensor, shape [1], float32, optional
        Store the output as e4m3: ``code = e4m3(saturate(o * (1 / output_scale)))``, from the fp32
        value. NaN becomes 0x7F. The scale is read on the device. The CPU refuses a scale that is
        not finite and positive; a GPU does not check it.
    output : Tensor, shape [T, H, D], optional
        Written in place and returned. It must not share memory with an input. Its dtype is the
        dtype of the states; for float32 states also float16 or bfloat16 (rounded to nearest even);
        uint8 or float8_e4m3fn for FP8.
    sinks_in_lse : bool
        Whether the returned LSE counts the sinks.

    Returns
    -------
    output : Tensor, shape [T, H, D]
        In the dtype of the states, or uint8 (e4m3 codes).
    output_lse : Tensor, shape [H, T], float32

    Raises
    ------
    TypeError
        If an input is not a tensor, or a dtype is not one of those above.
    ValueError
        If shapes do not match, there is no state, `output` shares memory with an input, or
        `output_scale` is not finite and positive.

    Notes
    -----
    The output has the same bits as the NumPy model, including FP8 codes. For two states it has the
    same bits as :func:`merge_attn_states`. `output_lse` is within 1 ulp, because the logarithm
    depends on the platform.

    See Also
    --------
    merge_attn_states : of two states, in place, with dynamic scales.
    fastattn.reference.merge_many_attn_states : the same in NumPy.

    References
    ----------
    .. [1] Ye et al., "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference
       Serving", https://arxiv.org/abs/2501.01005

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import merge_many_attn_states
    >>> outputs = paddle.to_tensor([1.0, 3.0, 5.0]).reshape([3, 1, 1, 1])
    >>> output, output_lse = merge_many_attn_states(outputs, paddle.zeros([3, 1, 1]))
    >>> round(output.item(), 4), round(output_lse.item(), 4)
    (3.0, 1.0986)
    """
    inputs = (outputs, lses, sinks, output_scale, output)
    # The result shares the memory of a given `output`; see merge_attn_states.
    merged, merged_lse, *_ = _ops.call("merge_many_attn_states", inputs, (sinks_in_lse,))
    return merged, merged_lse

"""Merge of two partial attentions over disjoint sets of keys."""

from __future__ import annotations

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._marker import unified


@unified
def merge_attn_states(
    prefix_output: Tensor,
    prefix_lse: Tensor,
    suffix_output: Tensor,
    suffix_lse: Tensor,
    *,
    output_scale: Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output: Tensor | None = None,
    output_lse: Tensor | None = None,
    output_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Merge two partial attentions of the same queries by their log-sum-exp.

    :math:`p` and :math:`s` are the LSE of the prefix and the suffix, and :math:`m = \max(p, s)`:

    .. math::

        z = e^{p - m} + e^{s - m}, \qquad
        o = o_p \frac{e^{p - m}}{z} + o_s \frac{e^{s - m}}{z}, \qquad
        \mathrm{lse} = \ln z + m

    in fp32, in this order (section 2.2 of [1]_). A side is empty for a token and head if its LSE is
    -inf, or +inf, which some kernels use as the mark. The output of an empty side is ignored. Two
    empty sides give an output of 0 and an LSE of -inf. A NaN in an LSE, or in the output of a side
    that is not empty, stays NaN.

    Parameters
    ----------
    prefix_output, suffix_output : Tensor, shape [T, H, D], float32, float16 or bfloat16
    prefix_lse, suffix_lse : Tensor, shape [H, T], float32
        Natural logarithm.
    output_scale : Tensor, shape [1], float32, optional
        Store the output as e4m3: ``code = e4m3(saturate(o * (1 / output_scale)))``, from the fp32
        value. NaN becomes 0x7F. The scale is read on the device. The CPU refuses a scale that is
        not finite and positive; a GPU does not check it.
    prefill_tokens_with_context : int, optional
        Tokens from this index on (0 to T; default T) have no prefix. Their result is the suffix; it
        is 0 and -inf if the suffix is empty, also if its LSE is +inf.
    output : Tensor, shape [T, H, D], optional
        Written in place and returned. Its dtype is the dtype of the inputs; for float32 inputs also
        float16 or bfloat16 (rounded to nearest even); uint8 or float8_e4m3fn for FP8. It may be
        `prefix_output` or `suffix_output` itself.
    output_lse : Tensor, shape [H, T], float32, optional
        Written in place and returned. It may be `prefix_lse` or `suffix_lse` itself.
    output_scales : Tensor, shape [T, G], float32, contiguous, optional
        Store the output as e4m3 with dynamic scales ``max(amax, 1e-10) / 448``, which are written
        here. Each of the G groups of ``H * D / G`` channels of a token has one scale. G = H gives
        one scale per token and head, ``G = H * D / 128`` one per 128 channels, as in
        :func:`quantize_fp8`.

    Returns
    -------
    output : Tensor, shape [T, H, D]
        In the dtype of the inputs, or uint8 (e4m3 codes).
    output_lse : Tensor, shape [H, T], float32

    Raises
    ------
    TypeError
        If an input is not a tensor, a dtype is not one of those above, or
        `prefill_tokens_with_context` is not an int.
    ValueError
        If shapes do not match, `prefill_tokens_with_context` is not in 0..T, `output_scale`
        is not finite and positive, or both `output_scale` and `output_scales` are given.

    Notes
    -----
    The output has the same bits as the NumPy model, including FP8 codes: exp is a polynomial of
    fixed fp32 steps, within 2 ulp. `output_lse` is within 1 ulp, because the logarithm depends on
    the platform.

    See Also
    --------
    fastattn.reference.merge_attn_states : the same in NumPy.

    References
    ----------
    .. [1] Ye et al., "FlashInfer: Efficient and Customizable Attention Engine for LLM Inference
       Serving", https://arxiv.org/abs/2501.01005

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import merge_attn_states
    >>> one, lse = paddle.ones([1, 1, 2]), paddle.zeros([1, 1])
    >>> output, output_lse = merge_attn_states(one, lse, 3 * one, lse)
    >>> output.numpy().tolist(), round(output_lse.item(), 4)
    ([[[2.0, 2.0]]], 0.6931)
    """
    tokens = -1 if prefill_tokens_with_context is None else prefill_tokens_with_context
    if type(tokens) is not int:
        raise TypeError(
            "merge_attn_states: prefill_tokens_with_context: expected int, got "
            f"{type(tokens).__name__}"
        )
    if tokens < 0 and prefill_tokens_with_context is not None:
        raise ValueError(
            f"merge_attn_states: prefill_tokens_with_context: expected None or 0 to T, got {tokens}"
        )
    inputs = (
        prefix_output,
        prefix_lse,
        suffix_output,
        suffix_lse,
        output_scale,
        output,
        output_lse,
        output_scales,
    )
    # `merged` shares its memory with a given `output`. It is returned anyway, because Paddle 2.6
    # does not save an operator whose results are all inputs of the program.
    merged, merged_lse, *_ = _ops.call("merge_attn_states", inputs, (tokens,))
    return merged, merged_lse

"""A layer's step in one operator: rotation, qk-norm, cache write and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from paddle import Tensor

from fastattn import _ops
from fastattn.functional._attributes import as_float, scale_of
from fastattn.functional._cache_types import operator_cache_type
from fastattn.functional._marker import unified
from fastattn.functional.attention import as_window

_OP = "attention_step"


#: Arguments that belong to a step; the others belong to a layer.
_OF_STEP = [
    "qkv",
    "key_cache",
    "value_cache",
    "rotary_embs",
    "block_tables",
    "cu_seqlens_q",
    "seq_lens_decoder",
    "seq_lens_this_time",
    "max_seqlen_q",
    "max_seqlen_k",
    "batch_id_per_token",
    "cache_k_scales",
    "cache_v_scales",
    "mask_offsets",
]


class StepOptions(NamedTuple):
    """A layer's tensors and attributes of the operator, in its order.

    A server calls a layer in every step, and to name and convert two dozen options takes a third of
    the operator's time. So this is made once.
    """

    tensors: tuple[Any, ...]
    attrs: tuple[Any, ...]

    def bound(self) -> Callable[..., Any] | None:
        """The operator as a function of a step's arguments (:func:`fastattn._ops.bound`)."""
        sig = _ops.signature(_OP)
        names = [name for name in (*sig.inputs, *sig.attr_names) if name not in _OF_STEP]
        return _ops.bound(_OP, dict(zip(names, (*self.tensors, None, *self.attrs))), _OF_STEP)


def step_options(
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool = False,
    rotary_dim: int | None = None,
    qk_norm_before_rope: bool = False,
    qkv_bias: Tensor | None = None,
    q_quant: str = "none",
    q_scale: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out_dtype: str = "auto",
    batch_invariant: bool = False,
    split_invariant: bool = False,
) -> StepOptions:
    """Options for :func:`run_step`. Names and meanings are as for :func:`attention_step`."""
    return StepOptions(
        (
            q_norm_weight,
            k_norm_weight,
            qkv_bias,
            q_scale,
            k_center,
            k_feedback,
            sinks,
            out_scale,
        ),
        (
            causal,
            *as_window(_OP, window_size),
            num_heads,
            num_kv_heads,
            as_float(_OP, "rms_norm_eps", rms_norm_eps),
            use_neox_rotary_style,
            -1 if rotary_dim is None else rotary_dim,
            qk_norm_before_rope,
            q_quant,
            operator_cache_type(_OP, cache_quant_type),
            fp8_format,
            k_rotation,
            scale_of(_OP, softmax_scale),
            as_float(_OP, "softcap", softcap),
            return_softmax_lse,
            out_dtype,
            batch_invariant,
            split_invariant,
        ),
    )


@unified
def run_step(
    options: StepOptions,
    bound: Callable[..., Any] | None,
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rotary_embs: Tensor | None,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    batch_id_per_token: Tensor | None,
    cache_k_scales: Tensor | None,
    cache_v_scales: Tensor | None,
    mask_offsets: Tensor | None,
) -> Any:
    """Run a step with options that were made before.

    Parameters
    ----------
    options, bound
        The layer's options, and what their `bound` returned; None for calls that it does not take.

    Returns
    -------
    Tensor, shape [T, H * D]
    """
    if bound is not None and _ops.is_direct():
        try:
            result = bound(
                qkv,
                key_cache,
                value_cache,
                rotary_embs,
                block_tables,
                cu_seqlens_q,
                seq_lens_decoder,
                seq_lens_this_time,
                max_seqlen_q,
                max_seqlen_k,
                batch_id_per_token,
                cache_k_scales,
                cache_v_scales,
                mask_offsets,
            )
        except RuntimeError as error:
            _ops.reraise_of(_ops.signature(_OP), error)
        if result is not None:
            return result
    tensors, attrs = options  # SOT passes a plain tuple
    inputs = (
        qkv,
        key_cache,
        value_cache,
        rotary_embs,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        batch_id_per_token,
        cache_k_scales,
        cache_v_scales,
        mask_offsets,
        *tensors,
        None,
    )
    return _ops.call(_OP, inputs, (max_seqlen_q, max_seqlen_k, *attrs))[0]


@unified
def attention_step(
    qkv: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    rotary_embs: Tensor | None,
    block_tables: Tensor,
    cu_seqlens_q: Tensor,
    seq_lens_decoder: Tensor,
    seq_lens_this_time: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    rms_norm_eps: float = 1e-6,
    use_neox_rotary_style: bool = False,
    rotary_dim: int | None = None,
    qk_norm_before_rope: bool = False,
    qkv_bias: Tensor | None = None,
    q_quant: str = "none",
    q_scale: Tensor | None = None,
    cache_k_scales: Tensor | None = None,
    cache_v_scales: Tensor | None = None,
    cache_quant_type: str = "none",
    fp8_format: str = "e4m3",
    batch_id_per_token: Tensor | None = None,
    k_rotation: str = "none",
    k_center: Tensor | None = None,
    k_feedback: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    mask_offsets: Tensor | None = None,
    out_scale: Tensor | None = None,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    out_dtype: str = "auto",
    batch_invariant: bool = False,
    split_invariant: bool = False,
) -> Any:
    r"""Write a layer's new tokens into the paged cache, then attend to the whole cache.

    The results equal :func:`rope_write_cache_kv` followed by :func:`paged_attention`. One call
    costs less host time, and on a GPU the writer prepares the attention where that saves a kernel.
    It serves prefill, chunked prefill, decoding and inactive sequences in any order. The
    input is what the projection of Q, K and V gives, and the output is what the output projection
    takes.

    Parameters
    ----------
    qkv : Tensor, shape [T, (H + 2 KV) * D], bfloat16 or float16
        Query heads, then key heads, then value heads. The first dimension may have any stride. Not
        changed. D is 64, 96, 128 or 256.
    key_cache, value_cache : Tensor
        Written in place. Shapes, dtypes and strides as for :func:`paged_attention`; the dtype of
        `qkv` for type ``"none"``.
    rotary_embs : Tensor, shape [2, 1, max_seq, 1, R / 2] or [..., R], float32, optional
        Cosines, then sines, of R = `rotary_dim` channels, as for :func:`rope_write_cache_kv`. None
        means no rotation.
    block_tables : Tensor, shape [B, max_blocks], int32
        Physical block of each group of 64 tokens of a sequence. `block_tables` and
        `seq_lens_decoder` may have more than B rows, for slots of a server that do not run.
    cu_seqlens_q : Tensor, shape [B + 1], int32
        Index of the first token of each sequence in `qkv`.
    seq_lens_decoder, seq_lens_this_time : Tensor, shape [B], int32
        Number of tokens cached before this step, and of new tokens (0 for an inactive sequence).
    max_seqlen_q, max_seqlen_k : int
        Upper bounds of the new tokens and of the keys of a sequence. They mask nothing.
    num_heads, num_kv_heads : int
        Numbers H of query heads and KV of KV heads.
    q_norm_weight, k_norm_weight : Tensor, shape [D], float32, bfloat16 or float16, optional
        Weights of an RMSNorm over each head of Q and of K.
    rms_norm_eps : float
    use_neox_rotary_style : bool
    rotary_dim : int, optional
    qk_norm_before_rope : bool
    qkv_bias : Tensor, shape [(H + 2 KV) * D], float32, bfloat16 or float16, optional
        These five as for :func:`rope_write_cache_kv`.
    q_quant : {"none", "per_tensor", "per_token_head"}
        Attend with e4m3 queries: with the given `q_scale`, or with a scale ``max(amax, 1e-6) /
        448`` for each token and head. Long sequences over e4m3 caches then run on the FP8 tensor
        cores of a Hopper GPU. The output keeps the dtype of `qkv`.
    q_scale : Tensor, shape [1], float32, optional
        Dequantisation multiplier for ``"per_tensor"``.
    cache_k_scales, cache_v_scales : Tensor, float32, bfloat16 or uint8, optional
        As for :func:`paged_attention`. Dynamic types write the scales of the new tokens.
    cache_quant_type : str
        ``none``, ``cache_int8`` (or ``int8``), ``cache_fp8`` (or ``float8_e4m3fn``),
        ``block_wise_int8``, ``block_wise_fp8``, ``block_wise_int4``, ``block_wise_mxfp4``,
        ``block_wise_k8v4`` or ``block_wise_kfp8v4``.
    fp8_format : {"e4m3", "e5m2"}
        Format of the codes of ``cache_fp8``.
    batch_id_per_token : Tensor, shape [T], int32, optional
        Sequence of each token. A token whose id is out of range (such as -1, the padding of a CUDA
        graph) is not written, and its query is 0.
    k_rotation : {"none", "hadamard"}
        Rotation of K before it is quantised. Q is rotated alike: there is no option for it.
        :func:`make_cache` gives each type's value.
    k_center : Tensor, shape [KV, D], float32, optional
        A constant that is subtracted from K before it is quantised. LSE and sinks count the scores
        of the original K; with them, e4m3 queries are not supported, and with `sinks`, no `out`.
        `softcap` is never supported.
    k_feedback : Tensor, shape [KV, D, D], float32, optional
        As for :func:`write_cache_kv`.
    softmax_scale : float, optional
        Default: ``D ** -0.5``.
    causal : bool
        Mask the keys after a query's position.
    window_size : (int, int)
        Number of keys before and after a query's position that stay visible; -1 means unlimited.
    softcap : float
        Bound of the logits, ``cap * tanh(s / cap)``; 0 means none.
    sinks : Tensor, shape [H], float32 or bfloat16, optional
        A logit for each head. It counts in the denominator and in the LSE, but has no value.
    mask_offsets : Tensor, shape [T, 2], int32, optional
        Query t sees at most keys ``[start, end)`` of its sequence. The other masks apply as well.
    out_scale : Tensor, shape [1], float32, optional
        Return the output as e4m3 codes of ``out * (1 / out_scale)``.
    return_softmax_lse : bool
        Also return the LSE, the logarithm of the softmax's denominator.
    out : Tensor, shape [T, H * D], optional
        Written in place and returned. It shares no memory with another argument. Tokens that belong
        to no sequence (padding) keep their contents in a given `out`, and are 0 in a new one.
    out_dtype : {"auto", "float32", "float16", "bfloat16"}
        Dtype of the output: by default the dtype of `qkv`; float32 is for partial results.
    batch_invariant, split_invariant : bool
        As for :func:`paged_attention`.

    Returns
    -------
    out : Tensor, shape [T, H * D]
        The dtype of `qkv`, or uint8 (e4m3 codes) if `out_scale` is given.
    softmax_lse : Tensor, shape [H, T], float32
        Natural logarithm, -inf for tokens of no sequence. Only with `return_softmax_lse`.

    Raises
    ------
    TypeError
        If a dtype is not one of the listed dtypes, or a required argument is not a tensor.
    ValueError
        If shapes, places or options do not match, scales are missing or superfluous, or tensors
        that are written share memory with others.
    NotImplementedError
        If `cache_quant_type` or the head dimension is not supported, or another argument does not
        go with `k_rotation`, `k_center` or `k_feedback`.

    Notes
    -----
    Every argument is checked before the cache is written.

    The results have the bits of the two operators. On a GPU there is one exception: where CTAs join
    partial results of split keys without another kernel, they add them in another order. That
    happens in short steps of few sequences with a large `max_seqlen_k`, and never with
    `batch_invariant` or `split_invariant`.

    See Also
    --------
    rope_write_cache_kv, paged_attention : the two halves.
    fastattn.reference.attention_step : the same in NumPy.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.functional import attention_step
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> caches = [paddle.zeros([1, 1, 64, 64], "float16") for _ in range(2)]
    >>> seqs = int32([[0]]), int32([0, 2]), int32([0]), int32([2])  # one of two new tokens
    >>> q, k, v = paddle.ones([2, 64]), paddle.ones([2, 64]), 3 * paddle.ones([2, 64])
    >>> qkv = paddle.concat([q, k, v], axis=1).cast("float16")
    >>> out = attention_step(qkv, *caches, None, *seqs, 2, 2, num_heads=1, num_kv_heads=1)
    >>> out[:, 0].numpy().tolist(), caches[1][0, 0, :3, 0].numpy().tolist()
    ([3.0, 3.0], [3.0, 3.0, 0.0])
    """
    options = step_options(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_norm_weight=q_norm_weight,
        k_norm_weight=k_norm_weight,
        rms_norm_eps=rms_norm_eps,
        use_neox_rotary_style=use_neox_rotary_style,
        rotary_dim=rotary_dim,
        qk_norm_before_rope=qk_norm_before_rope,
        qkv_bias=qkv_bias,
        q_quant=q_quant,
        q_scale=q_scale,
        cache_quant_type=cache_quant_type,
        fp8_format=fp8_format,
        k_rotation=k_rotation,
        k_center=k_center,
        k_feedback=k_feedback,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        sinks=sinks,
        out_scale=out_scale,
        return_softmax_lse=return_softmax_lse,
        out_dtype=out_dtype,
        batch_invariant=batch_invariant,
        split_invariant=split_invariant,
    )
    inputs = (
        qkv,
        key_cache,
        value_cache,
        rotary_embs,
        block_tables,
        cu_seqlens_q,
        seq_lens_decoder,
        seq_lens_this_time,
        batch_id_per_token,
        cache_k_scales,
        cache_v_scales,
        mask_offsets,
        *options.tensors,
        out,
    )
    result, lse, *_ = _ops.call(_OP, inputs, (max_seqlen_q, max_seqlen_k, *options.attrs))
    return (result, lse) if return_softmax_lse else result

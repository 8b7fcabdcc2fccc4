"""FlashInfer's paged attention wrappers, with its page tables, plans, layouts and conventions.

A program that uses them changes one line::

    # from flashinfer import BatchDecodeWithPagedKVCacheWrapper, merge_state
    from fastattn.compat.flashinfer import BatchDecodeWithPagedKVCacheWrapper, merge_state

LSEs have FlashInfer's form: ``[T, H]``, base 2. Caches are read in place. They are tuples (k, v),
or pools with K and V in one tensor:

==========  ===========================================  ==========================================
layout      tuple, each                                  pool
==========  ===========================================  ==========================================
``NHD``     ``[pages, P, KV, D]``                        ``[pages, 2, P, KV, D]``
``HND``     ``[pages, KV, 64, D]``                       ``[pages, 2, KV, 64, D]``
==========  ===========================================  ==========================================

The table shows 16-bit caches. P is 64, or a multiple of 64 if the tensor is contiguous. 8-bit
caches (uint8 is e4m3, float8_e4m3fn, float8_e5m2, int8) are tuples with pages of 64 tokens, and V
has this package's layout ``[pages, KV, D, 64]`` (docs/formats.md). Every other cache is refused.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from paddle import Tensor

from fastattn.compat._flashinfer_pages import (
    append_paged_kv_cache,
    get_batch_indices_positions,
    get_seq_lens,
    merge_state,
    merge_state_in_place,
    merge_states,
)
from fastattn.compat._flashinfer_plan import (
    dense_block_tables,
    explicit_offsets,
    intervals_of_mask,
    plan_step,
    query_starts,
)
from fastattn.compat._flashinfer_wrapper import PagedWrapper, check_position
from fastattn.compat._paged import check_page_size, refuse, refuse_given

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "BatchPrefillWithPagedKVCacheWrapper",
    "append_paged_kv_cache",
    "dense_block_tables",
    "get_batch_indices_positions",
    "get_seq_lens",
    "merge_state",
    "merge_state_in_place",
    "merge_states",
]


class BatchDecodeWithPagedKVCacheWrapper(PagedWrapper):
    """Decode attention of a batch over a paged cache, planned once per step.

    Parameters
    ----------
    float_workspace_buffer : Tensor
        Tells the place. Operators allocate what they need.
    kv_layout : {"NHD", "HND"}
    use_cuda_graph : bool
        :meth:`plan` then writes into the same memory in every step. The sizes of
        `paged_kv_last_page_len_buffer` and `paged_kv_indices_buffer` limit the numbers of sequences
        and of pages. Only the sizes of the three buffers are used.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : Tensor
        Required with `use_cuda_graph`.
    use_tensor_cores, backend
        Not used. The shape of the call determines the kernels.
    jit_args : None

    Raises
    ------
    NotImplementedError
        For `jit_args`.
    TypeError, ValueError
        If a buffer is missing, or `kv_layout` is unknown.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import BatchDecodeWithPagedKVCacheWrapper
    >>> pool = paddle.ones([3, 2, 64, 1, 64], "float16")  # three pages of 64 tokens
    >>> wrapper = BatchDecodeWithPagedKVCacheWrapper(paddle.zeros([1], "uint8"), "NHD")
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> wrapper.plan(int32([0, 2, 3]), int32([2, 0, 1]), int32([7, 64]), 4, 1, 64, 64)
    >>> out, lse = wrapper.run(paddle.zeros([2, 4, 64], "float16"), pool, return_lse=True)
    >>> out[:, 0, 0].tolist(), [round(x, 3) for x in lse[:, 0].tolist()]  # of 71 and 64 keys
    ([1.0, 1.0], [6.15, 6.0])
    """

    _name = "BatchDecodeWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Tensor | None = None,
        paged_kv_indices_buffer: Tensor | None = None,
        paged_kv_last_page_len_buffer: Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
    ) -> None:
        buffers = {
            "paged_kv_indptr_buffer": paged_kv_indptr_buffer,
            "paged_kv_indices_buffer": paged_kv_indices_buffer,
            "paged_kv_last_page_len_buffer": paged_kv_last_page_len_buffer,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers, jit_args)

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Tensor | None = None,
        seq_lens: Tensor | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
    ) -> None:
        """Read the page table of a step on the host. Do not call this in a CUDA graph.

        Parameters
        ----------
        indptr : Tensor, shape [B + 1], int32
            Sequence b has pages ``indices[indptr[b] : indptr[b + 1]]``.
        indices : Tensor, shape [>= indptr[-1]], int32
        last_page_len : Tensor, shape [B], int32
            Number of keys in the last page of each sequence, 1 to `page_size`.
        num_qo_heads, num_kv_heads, head_dim : int
        page_size : int
            64, or a multiple of 64 for contiguous NHD caches.
        pos_encoding_mode : "NONE"
        window_left : int
            Number of keys before a query that stay visible; -1 means unlimited.
        logits_soft_cap : float, optional
        o_data_type : optional
            Dtype of the output. Default: the dtype of `q`.
        sm_scale : float, optional
            Default: ``head_dim ** -0.5``.
        fixed_split_size : int, optional
            Any value requests results that do not depend on the batch (``batch_invariant``).
        q_len_per_req : int
            Number of queries of each sequence. They are the last keys of the sequence. If there is
            more than one, the mask is causal. With CUDA graphs, at most as many as in the first
            plan.
        window_right : 0
        q_data_type, kv_data_type, data_type, rope_scale, rope_theta, non_blocking
            Not used.
        block_tables, seq_lens, disable_split_kv
            Not used, because the page table has the same information.

        Raises
        ------
        NotImplementedError
            For rotation in the attention, `window_right`, and other page sizes.
        ValueError
            If the page table is inconsistent or does not fit the buffers, or a sequence has fewer
            keys than queries. A sequence without pages is inactive: its output is 0 and its LSE is
            -inf.
        """
        op = f"{self._name}.plan"
        check_position(op, pos_encoding_mode)
        if window_right != 0:
            refuse(op, "window_right", "not supported")
        check_page_size(op, "page_size", page_size)
        names = ("indptr", "indices", "last_page_len")
        starts = np.arange(int(indptr.shape[0])) * q_len_per_req
        step = plan_step(op, names, indptr, indices, last_page_len, page_size, starts)
        if ((step.keys > 0) & (step.keys < q_len_per_req)).any():
            raise ValueError(f"{op}: q_len_per_req: a sequence has fewer than {q_len_per_req} keys")
        sizes = (num_qo_heads, num_kv_heads, head_dim, page_size)
        invariant = fixed_split_size is not None
        self._plan(
            step,
            sizes,
            sm_scale,
            window_left,
            logits_soft_cap,
            True,
            o_data_type,
            invariant,
            decoded=q_len_per_req,
        )

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Any:
        """Attention of the planned step over a layer's cache.

        Parameters
        ----------
        q : Tensor, shape [B * q_len_per_req, H, D], bfloat16, float16, or e4m3 codes
        paged_kv_cache : Tensor or (Tensor, Tensor)
            See the table of the module.
        q_scale, k_scale, v_scale : float, optional
            Multipliers of the codes. `v_scale` is only for 8-bit caches.
        out : Tensor, optional
            Written in place and returned.
        return_lse : bool
            Return (out, lse). lse has the shape [T, H] and base 2.
        window_left : int, optional
            Must be the planned value.
        sinks : Tensor, shape [H], float32 or bfloat16, optional
        enable_pdl, q_len_per_req
            Not used.
        lse, skip_softmax_threshold_scale_factor, kv_cache_sf : None

        Raises
        ------
        NotImplementedError
            For unsupported arguments and caches.
        ValueError
            If shapes differ from the plan.
        """
        if window_left is not None and window_left != self._window:
            raise ValueError(
                f"{self._name}.run: window_left: planned with {self._window}, got {window_left}"
            )
        scales = {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale}
        return self._run(
            q,
            paged_kv_cache,
            args,
            scales,
            out,
            return_lse,
            self._window,
            sinks,
            lse=lse,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            kv_cache_sf=kv_cache_sf,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)


class BatchPrefillWithPagedKVCacheWrapper(PagedWrapper):
    """Attention of a batch's new queries over a paged cache, planned once per step.

    Parameters
    ----------
    float_workspace_buffer : Tensor
        Tells the place. Operators allocate what they need.
    kv_layout : {"NHD", "HND"}
    use_cuda_graph : bool
        :meth:`plan` then writes into the same memory in every step. The sizes of
        `paged_kv_last_page_len_buf` and `paged_kv_indices_buf` limit the numbers of sequences and
        of pages; the first plan limits the number of queries. Only the sizes of the buffers are
        used.
    qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf : Tensor
        Required with `use_cuda_graph`.
    backend
        Not used. The shape of the call determines the kernels.
    custom_mask_buf, mask_indptr_buf, jit_args, jit_kwargs : None

    Raises
    ------
    NotImplementedError
        For an argument that must be None.
    TypeError, ValueError
        If a buffer is missing, or `kv_layout` is unknown.

    Examples
    --------
    >>> import paddle
    >>> from fastattn.compat.flashinfer import BatchPrefillWithPagedKVCacheWrapper
    >>> pool = paddle.ones([3, 2, 64, 1, 64], "float16")  # three pages of 64 tokens
    >>> wrapper = BatchPrefillWithPagedKVCacheWrapper(paddle.zeros([1], "uint8"), "NHD")
    >>> int32 = lambda x: paddle.to_tensor(x, dtype="int32")
    >>> queries = int32([0, 2, 5])
    >>> wrapper.plan(
    ...     queries, int32([0, 2, 3]), int32([2, 0, 1]), int32([7, 64]), 4, 1, 64, 64, causal=True
    ... )
    >>> out, lse = wrapper.run(paddle.zeros([5, 4, 64], "float16"), pool, return_lse=True)
    >>> [round(2**x) for x in lse[:, 0].tolist()]  # keys that each query sees
    [70, 71, 62, 63, 64]
    """

    _name = "BatchPrefillWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Tensor | None = None,
        paged_kv_indptr_buf: Tensor | None = None,
        paged_kv_indices_buf: Tensor | None = None,
        paged_kv_last_page_len_buf: Tensor | None = None,
        custom_mask_buf: Tensor | None = None,
        mask_indptr_buf: Tensor | None = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
    ) -> None:
        refuse_given(
            self._name,
            custom_mask_buf=custom_mask_buf,
            mask_indptr_buf=mask_indptr_buf,
            jit_kwargs=jit_kwargs,
        )
        buffers = {
            "qo_indptr_buf": qo_indptr_buf,
            "paged_kv_indptr_buf": paged_kv_indptr_buf,
            "paged_kv_indices_buf": paged_kv_indices_buf,
            "paged_kv_last_page_len_buf": paged_kv_last_page_len_buf,
        }
        super().__init__(float_workspace_buffer, kv_layout, use_cuda_graph, buffers, jit_args)

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Tensor | None = None,
        packed_custom_mask: Tensor | None = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Tensor | None = None,
        token_pos_in_items_ptr: Tensor | None = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Tensor | None = None,
        seq_lens: Tensor | None = None,
        seq_lens_q: Tensor | None = None,
        block_tables: Tensor | None = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Read the page table of a step on the host. Do not call this in a CUDA graph.

        Parameters
        ----------
        qo_indptr : Tensor, shape [B + 1], int32
            Index of the first query of each sequence. The queries are the last keys of the
            sequence.
        paged_kv_indptr : Tensor, shape [B + 1], int32
        paged_kv_indices : Tensor, shape [>= paged_kv_indptr[-1]], int32
        paged_kv_last_page_len : Tensor, shape [B], int32
            As for the decode wrapper.
        num_qo_heads, num_kv_heads, head_dim_qk, page_size : int
        head_dim_vo : int, optional
            Must equal `head_dim_qk`.
        custom_mask : Tensor, bool, optional
            Replaces `causal`: the flattened masks [queries, keys] of all sequences, concatenated.
            Each query must see one interval of keys. It is read on the host.
        causal : bool
        sm_scale, window_left, logits_soft_cap, o_data_type, pos_encoding_mode, fixed_split_size
            As for the decode wrapper.
        packed_custom_mask, prefix_len_ptr, token_pos_in_items_ptr, max_item_len_ptr : None
        use_fp16_qk_reduction, rope_scale, rope_theta, q_data_type, kv_data_type, non_blocking
            Not used.
        token_pos_in_items_len, seq_lens, seq_lens_q, block_tables, max_token_per_sequence
            Not used.
        max_sequence_kv, disable_split_kv
            Not used.

        Raises
        ------
        NotImplementedError
            For an argument that must be None, rotation in the attention, other page sizes, a query
            that sees more than one interval of keys, and masks with `use_cuda_graph`.
        ValueError
            If the page table is inconsistent or does not fit the buffers.
        """
        op = f"{self._name}.plan"
        check_position(op, pos_encoding_mode)
        refuse_given(
            op,
            packed_custom_mask=packed_custom_mask,
            prefix_len_ptr=prefix_len_ptr,
            token_pos_in_items_ptr=token_pos_in_items_ptr,
            max_item_len_ptr=max_item_len_ptr,
        )
        if head_dim_vo is not None and head_dim_vo != head_dim_qk:
            refuse(op, "head_dim_vo", f"{head_dim_vo} with queries of {head_dim_qk} channels")
        check_page_size(op, "page_size", page_size)
        step = plan_step(
            op,
            ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len"),
            paged_kv_indptr,
            paged_kv_indices,
            paged_kv_last_page_len,
            page_size,
            query_starts(op, qo_indptr),
        )
        if custom_mask is not None:
            step = step._replace(offsets=intervals_of_mask(op, step, custom_mask))
            causal = False
        if ((step.keys > 0) & (step.keys < step.queries)).any():
            step = step._replace(offsets=explicit_offsets(step, causal, window_left), explicit=True)
        if step.offsets is not None and self._graph:
            name = "qo_indptr" if custom_mask is None else "custom_mask"
            why = "more queries than keys" if custom_mask is None else "a mask"
            refuse(op, name, f"{why} with use_cuda_graph")
        sizes = (num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        invariant = fixed_split_size is not None
        self._plan(
            step, sizes, sm_scale, window_left, logits_soft_cap, causal, o_data_type, invariant
        )

    begin_forward = plan

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: float | Tensor | None = None,
        k_scale: float | Tensor | None = None,
        v_scale: float | Tensor | None = None,
        out: Tensor | None = None,
        lse: Tensor | None = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Tensor | None = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Any:
        """Attention of the planned step over a layer's cache.

        Parameters
        ----------
        q : Tensor, shape [qo_indptr[-1], H, D], bfloat16, float16, or e4m3 codes
        paged_kv_cache : Tensor or (Tensor, Tensor)
            See the table of the module.
        q_scale, k_scale, v_scale : float or Tensor, shape [1], optional
            Multipliers of the codes. Tensors are only for e4m3 queries and 8-bit caches.
        out : Tensor, optional
            Written in place and returned. Queries of sequences without pages keep its contents.
        return_lse : bool
            Return (out, lse). lse has the shape [T, H] and base 2.
        window_left : int, optional
            Replaces the planned value for this call.
        sinks : Tensor, shape [H], float32 or bfloat16, optional
        enable_pdl
            Not used.
        lse, kv_cache_sf, skip_softmax_threshold_scale_factor : None
        use_fp16_softmax, uses_spcompress : None or False

        Raises
        ------
        NotImplementedError
            For unsupported arguments and caches, and for another `window_left` if a sequence has
            more queries than keys.
        ValueError
            If shapes differ from the plan.
        """
        op = f"{self._name}.run"
        if self._step is not None and window_left not in (None, self._window):
            if self._step.explicit:
                refuse(op, "window_left", "another one than planned, with more queries than keys")
        elif self._step is not None:
            window_left = self._window
        return self._run(
            q,
            paged_kv_cache,
            args,
            {"q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale},
            out,
            return_lse,
            -1 if window_left is None else window_left,
            sinks,
            lse=lse,
            kv_cache_sf=kv_cache_sf,
            skip_softmax_threshold_scale_factor=skip_softmax_threshold_scale_factor,
            use_fp16_softmax=use_fp16_softmax,
            uses_spcompress=uses_spcompress,
        )

    run_return_lse = functools.partialmethod(run, return_lse=True)

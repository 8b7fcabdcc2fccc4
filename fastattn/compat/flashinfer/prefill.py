"""FlashInfer's module of this name: new queries over a paged cache, and of one request."""

from __future__ import annotations

import functools
from typing import Any

from paddle import Tensor

from fastattn.compat._flashinfer_plan import (
    explicit_offsets,
    parts_of_mask,
    plan_step,
    query_starts,
)
from fastattn.compat._flashinfer_single import single_prefill_with_kv_cache
from fastattn.compat._flashinfer_wrapper import PagedWrapper, check_position
from fastattn.compat._paged import check_page_size, refuse, refuse_given

__all__ = ["BatchPrefillWithPagedKVCacheWrapper", "single_prefill_with_kv_cache"]


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
            It is read on the host. Of the keys before the queries, each query must see one
            interval, and one up to the last if it sees keys of queries, too: a tree of drafts.
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
            For an argument that must be None, rotation in the attention, other page sizes, other
            masks, masks with `use_cuda_graph`, and trees with `fixed_split_size`.
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
            offsets, trees = parts_of_mask(op, step, custom_mask)
            step = step._replace(offsets=offsets, trees=trees)
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

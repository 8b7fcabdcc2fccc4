"""FlashInfer's module of this name: decode over a paged cache, and of one request."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from paddle import Tensor

from fastattn.compat._flashinfer_plan import plan_step
from fastattn.compat._flashinfer_single import single_decode_with_kv_cache
from fastattn.compat._flashinfer_wrapper import PagedWrapper, check_position
from fastattn.compat._paged import check_page_size, refuse

__all__ = ["BatchDecodeWithPagedKVCacheWrapper", "single_decode_with_kv_cache"]


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

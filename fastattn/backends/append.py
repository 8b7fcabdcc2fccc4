"""Replacement for FastDeploy's ``APPEND_ATTN`` backend."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class AppendAttentionBackend(PagedAttentionBackend):
    """Replacement for FastDeploy's default backend, for decoding, speculative and prefill
    sequences.

    A speculative sequence has one new token and its draft tokens. All of them are written to the
    cache and attended to. The next step overwrites rejected ones.
    """

"""The backend that takes the place of FastDeploy's ``APPEND_ATTN``."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class AppendAttentionBackend(PagedAttentionBackend):
    """Replaces FastDeploy's default backend, for decoding, speculative and prefill sequences.

    A speculative sequence has one new token and its draft tokens. All of them are written to the
    cache and attended to; the next step overwrites rejected ones.
    """

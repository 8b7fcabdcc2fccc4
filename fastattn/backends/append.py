"""The backend that takes the place of FastDeploy's ``APPEND_ATTN``."""

from __future__ import annotations

from fastattn.backends.paged import PagedAttentionBackend


class AppendAttentionBackend(PagedAttentionBackend):
    """FastDeploy's default backend: decode and speculative rows, prefill rows beside them.

    A speculative row has one new token and its drafts; all of them are written and attended to, and
    a rejected one is overwritten by the next step.
    """

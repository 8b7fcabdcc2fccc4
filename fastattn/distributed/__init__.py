"""Attention over a cache whose blocks are spread over the ranks of a process group."""

from fastattn.distributed.attention import paged_attention_dcp
from fastattn.distributed.blocks import (
    dcp_local_block_tables,
    dcp_num_local_blocks,
    dcp_stripe_block_tables,
)

__all__ = [
    "dcp_local_block_tables",
    "dcp_num_local_blocks",
    "dcp_stripe_block_tables",
    "paged_attention_dcp",
]

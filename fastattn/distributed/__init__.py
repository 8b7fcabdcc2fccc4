"""Attention over a cache whose blocks are spread over the ranks of a process group."""

from fastattn.distributed.attention import paged_attention_dcp
from fastattn.distributed.blocks import (
    dcp_local_block_tables,
    dcp_num_local_blocks,
    dcp_stripe_block_tables,
)
from fastattn.distributed.latent import mla_attention_dcp, mla_sparse_attention_dcp
from fastattn.distributed.local_keys import dcp_local_keys

__all__ = [
    "dcp_local_block_tables",
    "dcp_local_keys",
    "dcp_num_local_blocks",
    "dcp_stripe_block_tables",
    "mla_attention_dcp",
    "mla_sparse_attention_dcp",
    "paged_attention_dcp",
]

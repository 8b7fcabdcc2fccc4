"""Facts about the compiled code (``custom_ops/api/host_module.cc``)."""

LONG_SEQ: int

def block_size() -> int: ...
def head_dims() -> list[int]: ...
def cache_types() -> list[str]: ...
def cache_formats() -> list[tuple[str, str, str, int, str, int, str]]: ...
def token_slots() -> list[int]: ...
def cuda_enabled() -> bool: ...
def archs() -> list[str]: ...
def cpu_isa() -> str: ...
def plan_attention(
    num_tokens: int,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_bytes: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    num_sms: int,
    max_cluster: int = 1,
    long_seq: int = 64,
    num_clusters: int = 0,
) -> list[dict[str, int]]: ...
def decide_attention(
    q_dtype: str,
    k_dtype: str,
    cache_type: str,
    num_tokens: int,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    compute_major: int = 9,
    num_sms: int = 132,
    batch_invariant: bool = False,
    general: bool = False,
) -> tuple[str, int, list[dict[str, int]]]: ...
def invariant_splits(kv_tiles: int, tile_rows: int, num_kv_heads: int) -> tuple[int, int]: ...
def plan_indexer_topk(
    rows: int, columns: int, workspace_bytes: int, makes_lengths: bool = True
) -> tuple[int, int]: ...
def attention_kernels(
    q_dtype: str,
    k_dtype: str,
    cache_type: str,
    num_tokens: int,
    batch: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_seqlen_q: int,
    max_seqlen_k: int,
    compute_major: int = 9,
    num_sms: int = 132,
    window_left: int = -1,
    batch_invariant: bool = False,
    memory: int = ...,
    operations: float = ...,
    general: bool = False,
) -> list[tuple[str, str, str]]: ...
def all_kernels() -> list[tuple[str, str, int, int]]: ...
def mla_attention_kernels(
    cache_format: str,
    heads: int,
    max_seqlen_q: int,
    page_size: int,
    num_pages: int,
    compute_major: int = 9,
) -> list[tuple[str, str]]: ...
def mla_sparse_attention_kernels(
    cache_format: str,
    extra_cache_format: str,
    dim: int,
    heads: int,
    page_size: int,
    num_pages: int,
    fp32_out: bool = False,
    max_logits: bool = False,
    compute_major: int = 9,
) -> list[tuple[str, str]]: ...
def mqa_logits_kernels(
    quant: str,
    head_dim: int,
    heads: int,
    batch: int,
    next_n: int,
    keys: int,
    page_size: int = 0,
    num_pages: int = 0,
    compute_major: int = 9,
) -> list[tuple[str, str]]: ...

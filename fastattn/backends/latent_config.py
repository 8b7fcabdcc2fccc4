"""Options that the backends of latent (MLA) caches read, and options that they refuse."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn import env
from fastattn.backends.config import (
    BLOCK_SIZE,
    cache_kind,
    count_of,
    drafted_tokens,
    read,
    refuse,
    refuse_server_options,
)
from fastattn.functional.topk import MAX_K

#: Channels of a token that all heads share: latent channels and rotated channels.
LATENT_DIM = 512
ROPE_DIM = 64

#: Channels of an index key.
INDEX_DIM = 128

#: Options of windows.
_WINDOWS = (
    "head_wise_swa_ratio",
    "sink_size",
    "swa_num_key_value_heads",
    "swa_rope_theta",
    "window_attn_skip_freq",
    "window_size",
)

#: Maximum number of heads of a process.
MOST_HEADS = 128


@dataclass(frozen=True)
class LatentConfig:
    """Configuration of a backend of latent caches.

    Attributes
    ----------
    max_model_len : int
        Maximum number of tokens of a sequence.
    decode_tokens : int
        Maximum number of new tokens of a decoding sequence in a step.
    block_size : int
        Number of tokens of a cache block.
    softmax_scale : float
        Softmax scale of a head before absorption, including YaRN's factor.
    causal : bool
    cuda_graphs : bool
        Whether the server replays CUDA graphs of its steps.
    """

    max_model_len: int
    decode_tokens: int
    block_size: int
    softmax_scale: float
    causal: bool
    cuda_graphs: bool

    @classmethod
    def of(cls, fd_config: Any, backend: str, num_heads: int) -> LatentConfig:
        """Read a FastDeploy configuration.

        Raises
        ------
        NotImplementedError
            If it requires something that the backends do not support. The message names it.
        ValueError
            If an option is missing or not a number.
        """
        if fd_config is None:
            raise ValueError(f"{backend}: fd_config: expected a configuration, got None")
        _refuse(fd_config, backend, num_heads)
        return cls(
            max_model_len=count_of(fd_config, backend, "model_config.max_model_len", None, 1),
            decode_tokens=1 + drafted_tokens(fd_config, backend),
            block_size=count_of(fd_config, backend, "cache_config.block_size", BLOCK_SIZE, 1),
            softmax_scale=_softmax_scale(fd_config, backend),
            causal=bool(read(fd_config, "model_config.causal", True)),
            cuda_graphs=bool(read(fd_config, "graph_opt_config.use_cudagraph", False)),
        )


@dataclass(frozen=True)
class IndexerConfig:
    """Configuration of an indexer.

    Attributes
    ----------
    heads : int
        Number of heads of its queries, the same on every rank.
    topk : int
        Number of keys that it selects for a query.
    interleaved : bool
        Whether its rotation pairs neighbouring channels, as in GLM. DeepSeek-V3.2 pairs channels
        that are half of the rotated channels apart.
    """

    heads: int
    topk: int
    interleaved: bool

    @classmethod
    def of(cls, fd_config: Any, backend: str) -> IndexerConfig:
        """Read a FastDeploy configuration; raises as :meth:`LatentConfig.of`."""
        dim = count_of(fd_config, backend, "model_config.index_head_dim", None, 1)
        if dim != INDEX_DIM:
            refuse(backend, "model_config.index_head_dim", dim, f"supported: {INDEX_DIM}")
        heads = count_of(fd_config, backend, "model_config.index_n_heads", None, 1)
        if heads % 8 or heads > 256:
            refuse(backend, "model_config.index_n_heads", heads, "supported: multiples of 8 to 256")
        topk = count_of(fd_config, backend, "model_config.index_topk", None, 1)
        if topk > MAX_K:
            refuse(backend, "model_config.index_topk", topk, f"supported: 1 to {MAX_K}")
        interleaved = read(fd_config, "model_config.indexer_rope_interleave")
        if interleaved is None:
            interleaved = str(read(fd_config, "model_config.model_type", "")).startswith("glm")
        return cls(heads, topk, bool(interleaved))


def _softmax_scale(fd_config: Any, backend: str) -> float:
    """Scale of scores: the channels of a head to the power of -0.5, times YaRN's factor squared."""
    nope = count_of(fd_config, backend, "model_config.qk_nope_head_dim", None, 1)
    scale = float((nope + ROPE_DIM) ** -0.5)
    factor = _yarn_number(fd_config, backend, "factor", 1.0)
    if factor > 1:
        mscale = 0.1 * _yarn_number(fd_config, backend, "mscale_all_dim", 0.0) * math.log(factor)
        scale *= (mscale + 1.0) ** 2
    return scale


def _yarn_number(fd_config: Any, backend: str, name: str, default: float) -> float:
    """A number of the model's ``rope_scaling``; `default` if it is absent, None or 0."""
    path = "fd_config.model_config.rope_scaling"
    rope = read(fd_config, "model_config.rope_scaling")
    if rope is None:
        return default
    if not isinstance(rope, Mapping):
        raise ValueError(f"{backend}: {path}: expected a dict, got {rope!r}")
    value = rope.get(name)
    if value is None:
        return default
    known = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not known or not math.isfinite(value) or value < 0:
        raise ValueError(f"{backend}: {path}[{name!r}]: expected a finite number, got {value!r}")
    return float(value) or default


def _refuse(fd_config: Any, backend: str, num_heads: int) -> None:
    for name, channels in (("kv_lora_rank", LATENT_DIM), ("qk_rope_head_dim", ROPE_DIM)):
        value = read(fd_config, f"model_config.{name}")
        if value != channels:
            refuse(backend, f"model_config.{name}", value, f"supported: {channels}")
    if not isinstance(num_heads, numbers.Integral) or isinstance(num_heads, bool):
        raise TypeError(f"{backend}: num_heads: expected int, got {num_heads!r}")
    if not 1 <= num_heads <= MOST_HEADS:
        refuse(backend, "num_heads", num_heads, f"supported: 1 to {MOST_HEADS} in a process")
    kind = cache_kind(fd_config)
    if kind not in (None, "none"):
        own = "the backend chooses the cache's format"
        refuse(backend, "quant_config.kv_cache_quant_type", kind, own)
    for name in _WINDOWS:
        value = read(fd_config, f"model_config.{name}", 0)
        if any(value) if isinstance(value, (list, tuple)) else value:
            refuse(backend, f"model_config.{name}", value, "latent attention has no window")
    level = count_of(fd_config, backend, "graph_opt_config.graph_opt_level", 0, 0)
    if level > 0:
        # In a program, what these models decide by the step's lengths would be a constant.
        supported = "supported for latent attention: 0 (CUDA graphs of dygraph)"
        refuse(backend, "graph_opt_config.graph_opt_level", level, supported)
    if env.deterministic():
        refuse(backend, "FD_DETERMINISTIC_MODE", 1, "bits of a sequence may depend on the batch")
    refuse_server_options(fd_config, backend)

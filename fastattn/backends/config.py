"""Options that the backends read from a FastDeploy configuration, and options that they refuse."""

from __future__ import annotations

import numbers
import sys
from dataclasses import dataclass
from typing import Any, NoReturn

import paddle

from fastattn.backends.known import refuse_unknown_options
from fastattn.backends.layer_cache import cache_type_of
from fastattn.backends.scales import HeadShard
from fastattn.functional._cache_types import FUSED_HEAD_DIMS

#: Number of tokens of a cache block.
BLOCK_SIZE = 64

#: Options that ``model_config.window_attn_skip_freq`` applies to some layers.
_WINDOW_OPTIONS = ("window_size", "swa_num_key_value_heads", "swa_rope_theta")

#: Values of ``parallel_config.pd_disaggregation_mode`` in which a server prefills for others.
PD_MODES = ("per_chunk", "per_query")

#: Maximum number of sequences of a step in FastDeploy's signal of a layer.
MOST_SIGNALLED_SEQS = 512


def read(config: Any, path: str, default: Any = None) -> Any:
    """Value at a dotted path; `default` if a name in it is missing or None."""
    for name in path.split("."):
        config = getattr(config, name, None)
        if config is None:
            return default
    return config


def fastdeploy_flag(name: str) -> bool:
    """Whether a variable of ``fastdeploy.envs`` is on. It is off in releases that lack it."""
    return bool(int(getattr(sys.modules.get("fastdeploy.envs"), name, 0) or 0))


@dataclass(frozen=True)
class BackendConfig:
    """Configuration of a backend.

    Attributes
    ----------
    max_model_len : int
        Maximum number of tokens of a sequence. It bounds the keys if the host has no lengths.
    decode_tokens : int
        Maximum number of new tokens of a decoding sequence in a step: its draft tokens plus one.
    causal : bool
    window_size : int
        Number of keys that a query sees, including its own; 0 leaves it to the layer.
    window_layers : tuple of bool
        Whether each layer has the window of `window_size`; empty means that all have it.
    window_tables : bool
        Whether layers with a window rotate by ``forward_meta.swa_rotary_embs``.
    window_heads : float
        Part of the heads, the last ones, that have a layer's window; 0 means that all have it.
    first_tokens : int
        Number of tokens at the start of a sequence that stay visible beside a window.
    rotary_dim : int or None
        Number of rotated channels of a head; None means all.
    kv_heads : int or None
        Number of KV heads of the model's layers; None means those of one process.
    layer_kv_heads : tuple of int
        The same number for each layer; empty means `kv_heads` for all.
    ranks : (int, int)
        Number of tensor-parallel ranks, and the rank of this process.
    cache_kind : str or None
        FastDeploy's string for the type of the caches.
    cuda_graphs : bool
        Whether the server replays CUDA graphs of its steps.
    """

    max_model_len: int
    decode_tokens: int
    causal: bool
    window_size: int
    window_layers: tuple[bool, ...]
    window_tables: bool
    window_heads: float
    first_tokens: int
    rotary_dim: int | None
    kv_heads: int | None
    layer_kv_heads: tuple[int, ...]
    ranks: tuple[int, int]
    cache_kind: str | None
    cuda_graphs: bool

    @classmethod
    def of(cls, fd_config: Any, backend: str, head_dim: int) -> BackendConfig:
        """Read a FastDeploy configuration.

        Raises
        ------
        NotImplementedError
            If it requires something that the backends do not support. The message names it.
        ValueError
            If ``model_config.max_model_len`` is missing, or an option is not a number.
        """
        if fd_config is None:
            raise ValueError(f"{backend}: fd_config: expected a configuration, got None")
        _refuse(fd_config, backend, head_dim)
        window_layers = _window_layers(fd_config, backend)
        return cls(
            max_model_len=count_of(fd_config, backend, "model_config.max_model_len", None, 1),
            decode_tokens=1 + drafted_tokens(fd_config, backend),
            causal=bool(read(fd_config, "model_config.causal", True)),
            window_size=count_of(fd_config, backend, "model_config.window_size", 0, 0),
            window_layers=window_layers,
            window_tables=bool(read(fd_config, "model_config.swa_rope_theta", 0)),
            window_heads=_window_heads(fd_config, backend),
            first_tokens=count_of(fd_config, backend, "model_config.sink_size", 0, 0),
            rotary_dim=_rotary_dim(fd_config, head_dim),
            kv_heads=read(fd_config, "model_config.num_key_value_heads"),
            layer_kv_heads=_layer_kv_heads(fd_config, window_layers),
            ranks=tensor_parallel(fd_config),
            cache_kind=cache_kind(fd_config),
            cuda_graphs=bool(read(fd_config, "graph_opt_config.use_cudagraph", False)),
        )

    def shard_of(self, local_heads: int, layer_id: int | None = None) -> HeadShard:
        """The KV heads of a layer that a process with `local_heads` of them holds.

        Backends are made without the number of a layer, so None means any layer that fits.
        """
        own = () if layer_id is None else self.layer_kv_heads[layer_id : layer_id + 1]
        counts = (*own, *self.layer_kv_heads, self.kv_heads)
        shards = [HeadShard(count, *self.ranks) for count in counts]
        return next((shard for shard in shards if shard.holds(local_heads)), shards[-1])


def cache_kind(fd_config: Any) -> str | None:
    """FastDeploy's string for the type of the caches; None if they are not quantised."""
    kind = read(fd_config, "quant_config.kv_cache_quant_type")
    return getattr(kind, "value", kind)  # FastDeploy has an enum of strings


def count_of(config: Any, backend: str, path: str, default: int | None, least: int) -> int:
    """An int of the configuration that is at least `least`."""
    value = read(config, path, default)
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{backend}: fd_config.{path}: expected an int >= {least}, got {value!r}")
    return int(value)


def drafted_tokens(fd_config: Any, backend: str) -> int:
    """Number of draft tokens of a sequence that a step verifies. A configuration has a number even
    without a method.
    """
    if read(fd_config, "speculative_config.method") is None:
        return 0
    return count_of(fd_config, backend, "speculative_config.num_speculative_tokens", 0, 0)


def tensor_parallel(fd_config: Any) -> tuple[int, int]:
    """Number of tensor-parallel ranks, and the rank of this process."""
    size = read(fd_config, "parallel_config.tensor_parallel_size", 1)
    return int(size), int(read(fd_config, "parallel_config.tensor_parallel_rank", 0))


def _rotary_dim(fd_config: Any, head_dim: int) -> int | None:
    """Number of rotated channels of a head.

    FastDeploy's tables (``rotary_embedding.get_rope_impl``) rotate a part of a head for GLM only.
    Its ERNIE table divides the positions by ``partial_rotary_factor`` and rotates the whole head.
    Its Qwen table and its rope_3d tables, which draft models do not have, ignore the factor. A
    configuration without architectures does not come from FastDeploy.
    """
    draft = read(fd_config, "speculative_config.model_type", "main") != "main"
    if not draft and read(fd_config, "enable_rope_3d_runtime"):
        return None
    factor = float(read(fd_config, "model_config.partial_rotary_factor", 1.0))
    names = read(fd_config, "model_config.architectures", ())
    whole = bool(names) and not str(names[0]).startswith("Glm")
    return None if factor >= 1.0 or whole else int(head_dim * factor)


def _window_layers(fd_config: Any, backend: str) -> tuple[bool, ...]:
    model = "model_config."
    needs = [name for name in _WINDOW_OPTIONS if read(fd_config, model + name, 0)]
    pattern = read(fd_config, f"{model}window_attn_skip_freq")
    if not needs or (pattern is None and needs == ["window_size"]):
        return ()
    if not isinstance(pattern, (list, tuple)):
        supported = (
            f"for model_config.{needs[-1]} it is a list with one entry a layer, 1 where the layer "
            "has the window"
        )
        refuse(backend, "model_config.window_attn_skip_freq", pattern, supported)
    return tuple(bool(entry) for entry in pattern)


def _window_heads(fd_config: Any, backend: str) -> float:
    """``model_config.head_wise_swa_ratio``, a number from 0 to 1."""
    value = read(fd_config, "model_config.head_wise_swa_ratio", 0) or 0
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ValueError(
            f"{backend}: fd_config.model_config.head_wise_swa_ratio: expected a number from 0 to "
            f"1, got {value!r}"
        )
    return float(value)


def _layer_kv_heads(fd_config: Any, window_layers: tuple[bool, ...]) -> tuple[int, ...]:
    """Number of KV heads of each layer, as FastDeploy's runner finds it; empty: all are alike."""
    listed = read(fd_config, "model_config.num_key_value_heads_list")
    if listed is not None:
        return tuple(int(count) for count in listed)
    in_window = read(fd_config, "model_config.swa_num_key_value_heads", 0)
    if not in_window:
        return ()
    others = read(fd_config, "model_config.num_key_value_heads")
    return tuple(int(in_window if windowed else others) for windowed in window_layers)


def refuse(backend: str, what: str, value: Any, supported: str) -> NoReturn:
    """Refuse an option by its name and value."""
    raise NotImplementedError(f"{backend}: {what} = {value!r} is not supported; {supported}")


def refuse_server_options(fd_config: Any, backend: str) -> None:
    """Refuse options of the server that no backend supports, and options that are not known."""
    mode = read(fd_config, "parallel_config.pd_disaggregation_mode", "None")
    if mode not in ("None", "none", "", *PD_MODES):
        supported = f"supported: None, {', '.join(PD_MODES)}"
        refuse(backend, "parallel_config.pd_disaggregation_mode", mode, supported)
    role = read(fd_config, "scheduler_config.splitwise_role", "mixed")
    if role not in ("mixed", "prefill", "decode"):
        supported = "supported: mixed, prefill, decode"
        refuse(backend, "scheduler_config.splitwise_role", role, supported)
    seqs = count_of(fd_config, backend, "scheduler_config.max_num_seqs", 0, 0)
    if role == "prefill" and seqs > MOST_SIGNALLED_SEQS:
        supported = f"a prefill server's signals have room for {MOST_SIGNALLED_SEQS} sequences"
        refuse(backend, "scheduler_config.max_num_seqs", seqs, supported)
    refuse_unknown_options(fd_config, backend)


def _refuse(fd_config: Any, backend: str, head_dim: int) -> None:
    block_size = read(fd_config, "cache_config.block_size", BLOCK_SIZE)
    if block_size != BLOCK_SIZE:
        refuse(backend, "cache_config.block_size", block_size, f"supported: {BLOCK_SIZE}")
    if head_dim not in FUSED_HEAD_DIMS:
        supported = f"supported: {', '.join(map(str, FUSED_HEAD_DIMS))}"
        refuse(backend, "head_dim", head_dim, supported)
    try:
        cache_type_of(cache_kind(fd_config))
    except NotImplementedError as error:
        raise NotImplementedError(f"{backend}: quant_config.{error}") from None
    refuse_server_options(fd_config, backend)


#: Paddle's list of operators that its CUDA graphs leave out, and the names of a backend's operators
#: in a program. A name ends in an underscore if the operator writes into an input.
_LEFT_OUT = "FLAGS_cuda_graph_blacklist"
_OPERATORS = tuple(
    f"custom_op.fastattn_{name}{end}"
    for name in (
        "attention_step",
        "rope_write_cache_kv",
        "paged_attention",
        "merge_attn_states",
        "mla_write_cache",
        "mla_attention",
        "mla_sparse_attention",
    )
    for end in ("", "_")
)


def keep_out_of_graphs(fd_config: Any) -> None:
    """Make CUDA graphs of parts of a program leave the attention out.

    FastDeploy's own backends do so for ``graph_opt_config.full_cuda_graph = False``, because steps
    with prefill also run in such graphs. A Paddle without CUDA graphs has no such list.
    """
    if read(fd_config, "graph_opt_config.full_cuda_graph", True):
        return
    try:
        given = str(paddle.get_flags(_LEFT_OUT)[_LEFT_OUT])
    except ValueError:
        return
    names = [name for name in given.split(",") if name]
    paddle.set_flags({_LEFT_OUT: ",".join(dict.fromkeys([*names, *_OPERATORS]))})

"""The interface between a FastDeploy-like server and an attention backend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from fastattn.backends.forward_meta import field


@dataclass
class AttentionMetadata:
    """Metadata that a backend prepares once per step for all layers."""


class AttentionBackend(ABC):
    """An attention backend, as FastDeploy's ``AttentionBackend`` and its model runner expect it.

    The constructor does no GPU work and loads no compiled operator, because engine and
    cache-manager processes make a backend only to ask it for shapes.
    """

    @abstractmethod
    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Prepare a step. Called once, before the step's first layer."""

    @abstractmethod
    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Shapes of a layer's key and value cache."""

    def get_attention_meta(self) -> AttentionMetadata | None:
        """Metadata of the current step."""
        return None

    def forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """Run the attention of one layer according to ``forward_meta.forward_mode``."""
        mode = field(forward_meta, "forward_mode")
        if mode.is_native():
            return self.forward_native_backend(q, k, v, qkv, layer, forward_meta)
        arguments = (q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta)
        if mode.is_mixed():
            return self.forward_mixed(*arguments)
        if mode.is_decode():
            return self.forward_decode(*arguments)
        return self.forward_extend(*arguments)

    @abstractmethod
    def forward_mixed(
        self,
        q: Any,
        k: Any,
        v: Any,
        qkv: Any,
        compressed_kv: Any,
        k_pe: Any,
        layer: Any,
        forward_meta: Any,
    ) -> Any:
        """Attention of a step with prefill, decoding and inactive sequences."""

    def forward_decode(self, *args: Any) -> Any:
        """Attention of a step of decoding sequences; by default :meth:`forward_mixed`."""
        return self.forward_mixed(*args)

    def forward_extend(self, *args: Any) -> Any:
        """Attention of a step of prefill sequences; by default :meth:`forward_mixed`."""
        return self.forward_mixed(*args)

    def forward_native_backend(
        self, q: Any, k: Any, v: Any, qkv: Any, layer: Any, forward_meta: Any
    ) -> Any:
        """Attention by the framework's own operators. No backend of fastattn supports it."""
        raise NotImplementedError(f"{type(self).__name__}: forward_mode NATIVE is not supported")

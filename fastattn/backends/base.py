"""The interface between a FastDeploy-like server and an attention backend."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, NoReturn

from fastattn.backends.forward_meta import field
from fastattn.backends.known import SHARED_STEP, refuse_unknown_fields


@dataclass
class AttentionMetadata:
    """Metadata that a backend prepares once per step for all layers."""


class _SharedStep:
    """What a step's `forward_meta` keeps for the backends of other layers.

    It keeps neither the step nor the metadata alive: metadata refer to steps.
    """

    __slots__ = ("kind", "metadata", "step", "takers")

    def __init__(self, backend: Any, forward_meta: Any, metadata: AttentionMetadata) -> None:
        self.kind, self.step = type(backend), id(forward_meta)  # a copy is another step
        self.metadata, self.takers = weakref.ref(metadata), {id(backend)}

    def take(self, backend: Any, forward_meta: Any) -> AttentionMetadata | None:
        """The metadata, if the backend has not begun this step yet; else None."""
        if type(backend) is not self.kind or id(forward_meta) != self.step:
            return None
        new = id(backend) not in self.takers
        self.takers.add(id(backend))
        return self.metadata() if new else None


class AttentionBackend(ABC):
    """An attention backend, as FastDeploy's ``AttentionBackend`` and its model runner expect it.

    The constructor does no GPU work and loads no compiled operator, because engine and
    cache-manager processes make a backend only to ask it for shapes.
    """

    attention_metadata: Any = None

    def init_attention_metadata(self, forward_meta: Any) -> None:
        """Prepare a step, before its first layer. Nothing is copied from the device.

        A server may have a backend for each layer and call this for all of them with the same
        `forward_meta`. The first one prepares the step, and the others share its metadata. A second
        call for the same backend begins a new step.

        Raises
        ------
        NotImplementedError
            If the step has a field that the backend does not support or does not know.
        """
        shared = getattr(forward_meta, SHARED_STEP, None)
        known = shared.take(self, forward_meta) if shared is not None else None
        if known is None:
            refuse_unknown_fields(forward_meta, type(self).__name__)
            known = self._prepare(forward_meta)
            setattr(forward_meta, SHARED_STEP, _SharedStep(self, forward_meta, known))
        self.attention_metadata = known

    @abstractmethod
    def _prepare(self, forward_meta: Any) -> AttentionMetadata:
        """Metadata of a new step."""

    @abstractmethod
    def get_kv_cache_shape(
        self, max_num_blocks: int, kv_cache_quant_type: str | None = None
    ) -> tuple[list[int], list[int]]:
        """Shapes of a layer's key and value cache."""

    def get_attention_meta(self) -> AttentionMetadata | None:
        """Metadata of the current step; None before the first one."""
        metadata: AttentionMetadata | None = self.attention_metadata
        return metadata

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
        """Attention of one layer: :meth:`forward_mixed`, which takes steps of all kinds.

        Raises
        ------
        NotImplementedError
            If ``forward_meta.forward_mode`` asks for the framework's own operators.
        """
        if field(forward_meta, "forward_mode").is_native():
            self._refuse("forward_mode NATIVE")
        return self.forward_mixed(q, k, v, qkv, compressed_kv, k_pe, layer, forward_meta)

    @abstractmethod
    def forward_mixed(self, *args: Any, **kwargs: Any) -> Any:
        """Attention of a step with sequences of any kind, with the arguments of :meth:`forward`."""

    def _metadata(self) -> Any:
        """Metadata of the current step."""
        if self.attention_metadata is None:
            raise ValueError(f"{type(self).__name__}: init_attention_metadata was not called")
        return self.attention_metadata

    def _refuse(self, what: str, more: str = "") -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__}: {what} is not supported{more}")

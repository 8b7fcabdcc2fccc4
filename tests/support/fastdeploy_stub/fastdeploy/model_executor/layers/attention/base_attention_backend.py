"""The base class of backends, of which one method is abstract."""

import abc


class AttentionBackend(abc.ABC):
    @abc.abstractmethod
    def init_attention_metadata(self, forward_meta): ...

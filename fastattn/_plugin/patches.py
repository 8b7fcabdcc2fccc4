"""Everything that the plug-in replaces in FastDeploy: one list, and the only way to apply it.

FastDeploy has no hook for these. Each entry tells what is replaced, why, in which versions, and
what would make it unnecessary. A function is replaced only if it has the parameters that the entry
names. Otherwise the plug-in refuses to serve.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


def parameters_of(function: Any) -> str:
    """Names of a function's parameters, with commas between."""
    return ", ".join(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Patch:
    """A function of FastDeploy that the plug-in replaces.

    Attributes
    ----------
    what : str
        Module and function, ``module:Class.function``.
    why : str
    versions : str
        Releases that need it.
    until : str
        What FastDeploy would have to offer instead.
    parameters : tuple of str
        Parameters of the functions that may be replaced, with commas between.
    """

    what: str
    why: str
    versions: str
    until: str
    parameters: tuple[str, ...]

    def apply(self, make: Callable[[Any], Any]) -> None:
        """Replace the function by ``make(function)``, once, if FastDeploy has imported its module.

        Raises
        ------
        NotImplementedError
            If the module lacks the function, or the function has other parameters.
        """
        module, _, path = self.what.partition(":")
        owner: Any = sys.modules.get(module)
        if owner is None:
            return
        *parents, name = path.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        function = getattr(owner, name, None)
        if getattr(function, "fastattn", False):
            return
        has = parameters_of(function) if callable(function) else None
        if has not in self.parameters:
            found = "is missing" if has is None else f"has the parameters ({has})"
            raise NotImplementedError(
                f"fastattn: FastDeploy's {self.what} {found}, which is not supported; supported: "
                + " or ".join(f"({names})" for names in self.parameters)
            )
        made = make(function)
        made.fastattn = True
        setattr(owner, name, made)


_MODELS = "fastdeploy.model_executor.models.deepseek_v3"
_CONNECTOR = "fastdeploy.splitwise.splitwise_connector:SplitwiseConnector"
_LAYOUT_IN_HANDSHAKE = "an identifier of the cache's layout in the handshake of two servers"

KEY_NORM = Patch(
    f"{_MODELS}:Indexer.__init__",
    "its RMSNorm of keys cannot load the bias that the checkpoints have",
    "2.6",
    "the LayerNorm of the development branch",
    ("self, fd_config, layer_id, prefix",),
)
INDEXER = Patch(
    f"{_MODELS}:Indexer.forward",
    "it selects among the keys of the step only, for one query of a sequence",
    "2.6 and later",
    "a method of the backend that selects keys",
    (
        "self, forward_meta, hidden_states, qr, positions, rotary_emb",
        "self, forward_meta, hidden_states, qr, rotary_emb",
    ),
)
SEND = Patch(
    f"{_CONNECTOR}._serialize_message",
    "a server with another order of a quantised cache's bytes must be told ours",
    "all",
    _LAYOUT_IN_HANDSHAKE,
    ("self, msg_type, payload",),
)
RECEIVE = Patch(
    f"{_CONNECTOR}._deserialize_message",
    "a request from a server with another order of bytes must fail",
    "all",
    _LAYOUT_IN_HANDSHAKE,
    ("self, frames", "self, data"),
)
BLOCK_NAMES = Patch(
    "fastdeploy.cache_manager.prefix_cache_manager:get_hash_str",
    "servers with another order of bytes must not find our blocks in a pool",
    "2.5 and later",
    "an identifier of the cache's layout in the names of blocks",
    ("token_ids, extra_keys",),
)
BACKEND_CLASS = Patch(
    "fastdeploy.platforms.cuda:CUDAPlatform.get_attention_backend_cls",
    "no entry point registers a backend, and the names of backends are fixed",
    "all",
    "register_attention_backend(name, path)",
    ("selected_backend",),
)


#: Every function that the plug-in replaces.
PATCHES = (BACKEND_CLASS, KEY_NORM, INDEXER, SEND, RECEIVE, BLOCK_NAMES)

#: What it sets in steps. FastDeploy's own backends set this field, too, to other values.
LENGTHS = Patch(
    "fastdeploy.model_executor.forward_meta:ForwardMeta.max_len_tensor_cpu",
    "a model of latent attention passes absorbed queries only of sequences that decode",
    "all",
    "a flag of the backend that asks for absorbed queries of all tokens",
    (),
)

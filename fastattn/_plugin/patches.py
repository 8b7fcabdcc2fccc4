"""Everything that the plug-in replaces in FastDeploy: one list, and the only way to apply it.

FastDeploy has no hook for these. Each entry tells what is replaced, why, in which versions, and
what would make it unnecessary. A function is replaced only if its source is one that the entry
knows, by a hash. Otherwise the plug-in refuses to serve, unless the function's name is in
``FASTATTN_IGNORED``.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastattn import env


@functools.lru_cache
def source_hash(function: Any) -> str:
    """First 16 digits of the SHA-256 of a function's source, without comments and indentation."""
    try:
        lines = textwrap.dedent(inspect.getsource(function)).splitlines()
    except (OSError, TypeError):
        return "unknown"  # only bytecode is installed
    code = [line.rstrip() for line in lines if line.strip() and line.strip()[0] != "#"]
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Patch:
    """A function of FastDeploy that the plug-in replaces.

    Attributes
    ----------
    what : str
        Module and function, ``module:Class.function``.
    why : str
    until : str
        What FastDeploy would have to offer instead.
    sources : dict
        Hashes of the sources that are replaced, and the versions that have them.
    parameters : tuple of str
        Parameters of these functions, with commas between.
    right : tuple of str
        Hashes of sources of later versions that need no replacement.
    """

    what: str
    why: str
    until: str
    sources: dict[str, str] = field(default_factory=dict)
    parameters: tuple[str, ...] = ()
    right: tuple[str, ...] = ()

    @property
    def function(self) -> str:
        """Name of the function, with its class."""
        return self.what.partition(":")[2]

    @property
    def versions(self) -> str:
        """Versions that need it."""
        return ", ".join(dict.fromkeys(", ".join(self.sources.values()).split(", "))) or "all"

    def apply(self, make: Callable[[Any], Any]) -> None:
        """Replace the function by ``make(function)``, once, if FastDeploy has imported its module.

        Raises
        ------
        NotImplementedError
            If the module lacks the function, or its source is not known.
        """
        owner: Any = sys.modules.get(self.what.partition(":")[0])
        if owner is None:
            return
        *parents, name = self.function.split(".")
        for parent in parents:
            owner = getattr(owner, parent, None)
        function = getattr(owner, name, None)
        if not getattr(function, "fastattn", False) and self.replaces(function):
            made = make(function)
            made.fastattn = True
            setattr(owner, name, classmethod(made) if inspect.ismethod(function) else made)

    def replaces(self, function: Any) -> bool:
        """Whether a function must be replaced; raises as :meth:`apply`."""
        found = source_hash(function) if callable(function) else "missing"
        if found in self.right or found in self.sources:
            return found in self.sources
        has = ", ".join(inspect.signature(function).parameters) if callable(function) else None
        if has in self.parameters and self.function in env.ignored():
            return True
        state = "is missing" if has is None else f"({has}) has another source, with hash {found}"
        hint = ""
        if has in self.parameters:
            hint = f"; to replace it nevertheless, add {self.function} to FASTATTN_IGNORED"
        known = ", ".join(f"{key} ({versions})" for key, versions in self.sources.items())
        raise NotImplementedError(
            f"fastattn: FastDeploy's {self.what} {state}, which is not supported; supported: "
            f"{known}{hint}"
        )


_MODELS = "fastdeploy.model_executor.models.deepseek_v3"
_CONNECTOR = "fastdeploy.splitwise.splitwise_connector:SplitwiseConnector"
_LAYOUT_IN_HANDSHAKE = "an identifier of the cache's layout in the handshake of two servers"

KEY_NORM = Patch(
    f"{_MODELS}:Indexer.__init__",
    "its RMSNorm of keys cannot load the bias that the checkpoints have",
    "the LayerNorm of the development branch",
    {"08b40ebf0f87d10b": "2.6"},
    ("self, fd_config, layer_id, prefix",),
    right=("a3f021cf2f96caea",),
)
INDEXER = Patch(
    f"{_MODELS}:Indexer.forward",
    "it selects among the keys of the step only, and gives a backend neither queries nor keys",
    "a method of the backend that selects keys",
    {
        "009aea9f65adc851": "2.6 of April 2026",
        "c2240410c9ebfcf3": "2.6",
        "b418793dac804bfc": "develop of May 2026",
    },
    (
        "self, forward_meta, hidden_states, qr, positions, rotary_emb",
        "self, forward_meta, hidden_states, qr, rotary_emb",
    ),
)
SEND = Patch(
    f"{_CONNECTOR}._serialize_message",
    "a server with another order of a quantised cache's bytes must be told ours",
    _LAYOUT_IN_HANDSHAKE,
    {"d81f770d036fa890": "2.6, develop of May 2026"},
    ("self, msg_type, payload",),
)
RECEIVE = Patch(
    f"{_CONNECTOR}._deserialize_message",
    "a request from a server with another order of bytes must fail",
    _LAYOUT_IN_HANDSHAKE,
    {"b79d72f471e08de4": "2.6, develop of May 2026"},
    ("self, frames",),
)
BLOCK_NAMES = Patch(
    "fastdeploy.cache_manager.prefix_cache_manager:get_hash_str",
    "servers with another order of bytes must not find our blocks in a pool",
    "an identifier of the cache's layout in the names of blocks",
    {"e12480872c8a818d": "2.6, develop of May 2026"},
    ("token_ids, extra_keys",),
)
BACKEND_CLASS = Patch(
    "fastdeploy.platforms.cuda:CUDAPlatform.get_attention_backend_cls",
    "no entry point registers a backend, and the names of backends are fixed",
    "register_attention_backend(name, path)",
    {"52b8836d9ebcbf52": "2.6, develop of May 2026", "798edcbcb1e0d4c6": "develop of May 2026"},
    ("selected_backend",),
)


#: Every function that the plug-in replaces.
PATCHES = (BACKEND_CLASS, KEY_NORM, INDEXER, SEND, RECEIVE, BLOCK_NAMES)

#: What it sets in steps. FastDeploy's own backends set this field, too, to other values.
LENGTHS = Patch(
    "fastdeploy.model_executor.forward_meta:ForwardMeta.max_len_tensor_cpu",
    "a model of latent attention passes absorbed queries only of sequences that decode",
    "a flag of the backend that asks for absorbed queries of all tokens",
)

"""Keeps the bytes of this package's quantised caches from servers that order them otherwise.

FastDeploy moves blocks between servers, and into pools that servers share, as bytes: neither its
transfer nor the names in a pool say in which order a block's codes lie. Blocks without quantisation
are the same for both. For quantised ones the order becomes part of what FastDeploy's engines
exchange: the messages in which a prefill and a decode server agree on a request's blocks, and the
names of blocks in a pool. Servers that differ then fail the request, or miss the pool's block.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from fastattn import env
from fastattn.backends.calibrated import digest
from fastattn.backends.config import fastdeploy_flag, read

_LOG = logging.getLogger(__name__)

#: Byte order of the quantised caches; a change of docs/formats.md changes it.
LAYOUT = "fastattn-1"

#: Field of FastDeploy's messages between servers that names it.
FIELD = "kv_cache_layout"

_CONNECTOR = "fastdeploy.splitwise.splitwise_connector"
_HASHES = "fastdeploy.cache_manager.prefix_cache_manager"
_PLAIN = ("bfloat16", "float16", "float32", "bf16", "fp16", "none")


def layout() -> str:
    """Byte order of this process's quantised caches, and what K in them is stored without."""
    return LAYOUT + digest()


def guard(fd_config: Any, backend: str) -> None:
    """Mark this process's messages and names, if its caches are quantised.

    That counts in engines. A worker, which loads the same classes, sends no messages and names no
    blocks.

    Raises
    ------
    NotImplementedError
        If the configuration moves quantised caches in a way that cannot be marked.
    """
    if not _is_quantised(fd_config):
        return
    role = read(fd_config, "scheduler_config.splitwise_role", "mixed")
    pool = read(fd_config, "cache_config.kvcache_storage_backend")
    if role == "mixed" and pool is None:
        return
    if fastdeploy_flag("ENABLE_V1_KVCACHE_MANAGER"):
        _refuse(
            backend,
            "ENABLE_V1_KVCACHE_MANAGER",
            1,
            "for quantised caches that other servers read; it names and moves blocks elsewhere",
        )
    if role != "mixed":
        _guard_messages(fd_config, role, backend)
    if pool is not None:
        _guard_pool(pool, backend)


def _is_quantised(fd_config: Any) -> bool:
    """Whether caches are quantised: workers have a type, engines what it is stored as."""
    kind = read(fd_config, "quant_config.kv_cache_quant_type")
    if kind is None:
        kind = read(fd_config, "cache_config.cache_dtype", "none")
    return str(getattr(kind, "value", kind)).lower() not in _PLAIN


def _refuse(backend: str, what: str, value: Any, why: str) -> NoReturn:
    raise NotImplementedError(f"{backend}: {what} = {value!r} is not supported {why}")


# ---- messages between a prefill and a decode server ----


def _guard_messages(fd_config: Any, role: str, backend: str) -> None:
    module = sys.modules.get(_CONNECTOR)
    if module is None:
        return
    connector = getattr(module, "SplitwiseConnector", None)
    methods = ("_serialize_message", "_deserialize_message", "_send_message")
    if not all(callable(getattr(connector, name, None)) for name in methods):
        _refuse(
            backend,
            "scheduler_config.splitwise_role",
            role,
            "for quantised caches: this FastDeploy's servers exchange no messages that could name "
            "the order of a cache's bytes",
        )
    protocol = str(read(fd_config, "cache_config.cache_transfer_protocol", ""))
    if "ipc" in protocol.split(",") and hasattr(connector, "send_splitwise_tasks_innode"):
        _refuse(
            backend,
            "cache_config.cache_transfer_protocol",
            protocol,
            "for quantised caches: over ipc this FastDeploy's servers exchange no messages that "
            "could name the order of a cache's bytes; supported: rdma",
        )
    if getattr(connector._serialize_message, "fastattn", False):  # type: ignore[union-attr]
        return
    _mark_messages(connector)


def _mark_messages(connector: Any) -> None:
    """Send the layout with every request of one server to another, and refuse requests without.

    A prefill server sends a request ("prefill"); the decode server answers with its blocks, or
    with an error that fails the request ("cache_sync").
    """
    serialize, deserialize = connector._serialize_message, connector._deserialize_message

    def _serialize_message(self: Any, msg_type: str, payload: Any) -> Any:
        if msg_type == "prefill":
            for task in payload:
                if task.disaggregate_info is not None:
                    task.disaggregate_info[FIELD] = layout()
        elif msg_type == "cache_sync":
            payload = [{**info, FIELD: layout()} for info in payload]
        return serialize(self, msg_type, payload)

    def _deserialize_message(self: Any, *frames: Any) -> Any:
        msg_type, payload = deserialize(self, *frames)
        if msg_type == "cache_sync":
            for info in payload:
                if info.get(FIELD) != layout():
                    info.setdefault("error_msg", _difference("decode", info))
        elif msg_type == "prefill":
            payload = [task for task in payload if _accepts(self, task)]
            if not payload:  # FastDeploy looks at the first request of a message
                msg_type = "refused"
        return msg_type, payload

    _serialize_message.fastattn = True  # type: ignore[attr-defined]
    connector._serialize_message = _serialize_message
    connector._deserialize_message = _deserialize_message


def _difference(role: str, info: dict[str, Any]) -> str:
    theirs = info.get(FIELD)
    told = "does not tell the order of its cache's bytes" if theirs is None else f"has {theirs!r}"
    return (
        f"the {role} server {told}, this one has {layout()!r}: quantised caches can be moved only "
        "between servers that both use fastattn"
    )


def _accepts(connector: Any, task: dict[str, Any]) -> bool:
    """Whether a request's cache may come here; otherwise the prefill server is told why not."""
    info = task.get("disaggregate_info")
    if info is None or info.get(FIELD) == layout():
        return True
    text = _difference("prefill", info)
    _LOG.error("fastattn: request %s refused: %s", task.get("request_id"), text)
    if "prefill_ip" in info:
        address = f"{info['prefill_ip']}:{info['prefill_connector_port']}"
    else:  # FastDeploy 2.4
        place = info["cache_info"]["rdma"]
        address = f"{place['ip']}:{place['port']}"
    answer = {"request_id": task.get("request_id"), "error_msg": text}
    connector._send_message(address, "cache_sync", [answer])
    return False


# ---- pools that servers share ----


def _guard_pool(pool: str, backend: str) -> None:
    what = "cache_config.kvcache_storage_backend"
    if pool == "attention_store":
        # It names blocks itself, below the version in the environment.
        version = env.attention_store_version()
        if layout() not in version:
            _refuse(
                backend,
                what,
                pool,
                "for quantised caches unless the environment variable AS_MODEL_VERSION contains "
                f"{layout()!r}, which keeps other servers from reading them; it is {version!r}",
            )
        return
    if pool not in ("mooncake", "file"):
        _refuse(backend, what, pool, "for quantised caches; supported: mooncake, file")
    module: Any = sys.modules.get(_HASHES)
    if module is None:
        return
    original: Callable[..., Any] | None = getattr(module, "get_hash_str", None)
    if original is None:
        _refuse(
            backend,
            what,
            pool,
            "for quantised caches: this FastDeploy names blocks in a way that cannot be marked",
        )
    if getattr(original, "fastattn", False):
        return

    def get_hash_str(token_ids: Any, *extra_keys: Any, **named: Any) -> Any:
        return original((layout(), token_ids), *extra_keys, **named)

    get_hash_str.fastattn = True  # type: ignore[attr-defined]
    module.get_hash_str = get_hash_str

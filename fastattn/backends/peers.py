"""Keeps this package's quantised caches from servers that use another byte order.

FastDeploy moves blocks between servers, and into pools that servers share, as bytes. Neither its
transfer nor the names in a pool tell the order of a block's codes. Unquantised blocks are the same
for both. For quantised blocks this module adds the byte order to two things that FastDeploy's
engines exchange: the messages in which a prefill and a decode server agree on a request's blocks,
and the names of blocks in a pool. Servers with different orders then fail the request, or do not
find the block in the pool.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NoReturn

from fastattn import env
from fastattn._plugin import patches
from fastattn.backends.calibrated import digest
from fastattn.backends.config import cache_kind, fastdeploy_flag, read

_LOG = logging.getLogger(__name__)

#: Byte order of the quantised caches, and the rotation of K that each type has if nothing else is
#: told. A change of docs/formats.md or of `default_rotation` changes this name: 2 rotates K of
#: ``block_wise_int8``.
LAYOUT = "fastattn-2"

#: Field with the byte order in FastDeploy's messages between servers.
FIELD = "kv_cache_layout"

_PLAIN = ("bfloat16", "float16", "float32", "bf16", "fp16", "none")


def layout() -> str:
    """Byte order of this process's quantised caches, and the transformation of the K in them."""
    return LAYOUT + digest()


def guard(fd_config: Any, backend: str) -> None:
    """Mark this process's messages and names if its caches are quantised.

    This matters in engines. A worker loads the same classes, but sends no messages and names no
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
        _guard_messages()
    if pool is not None:
        _guard_pool(pool, backend)


def _is_quantised(fd_config: Any) -> bool:
    """Whether caches are quantised. Workers have a type; engines have the storage type."""
    kind = cache_kind(fd_config) or read(fd_config, "cache_config.cache_dtype", "none")
    return str(kind).lower() not in _PLAIN


def _refuse(backend: str, what: str, value: Any, why: str) -> NoReturn:
    raise NotImplementedError(f"{backend}: {what} = {value!r} is not supported {why}")


# ---- messages between a prefill and a decode server ----


def _guard_messages() -> None:
    """Send the layout with every request from one server to another, and refuse requests without
    it.

    A prefill server sends a request ("prefill"). The decode server answers with its blocks, or with
    an error that fails the request ("cache_sync").
    """
    patches.SEND.apply(_sending_layout)
    patches.RECEIVE.apply(_requiring_layout)


def _sending_layout(serialize: Callable[..., Any]) -> Callable[..., Any]:
    def _serialize_message(self: Any, msg_type: str, payload: Any) -> Any:
        if msg_type == "prefill":
            for task in payload:
                if task.disaggregate_info is not None:
                    task.disaggregate_info[FIELD] = layout()
        elif msg_type == "cache_sync":
            payload = [{**info, FIELD: layout()} for info in payload]
        return serialize(self, msg_type, payload)

    return _serialize_message


def _requiring_layout(deserialize: Callable[..., Any]) -> Callable[..., Any]:
    def _deserialize_message(self: Any, *frames: Any) -> Any:
        msg_type, payload = deserialize(self, *frames)
        if msg_type == "cache_sync":
            for info in payload:
                if info.get(FIELD) != layout():
                    info.setdefault("error_msg", _difference("decode", info))
        elif msg_type == "prefill":
            payload = [task for task in payload if _accepts(self, task)]
            if not payload:  # FastDeploy reads only the first request of a message
                msg_type = "refused"
        return msg_type, payload

    return _deserialize_message


def _difference(role: str, info: dict[str, Any]) -> str:
    theirs = info.get(FIELD)
    told = "does not tell the order of its cache's bytes" if theirs is None else f"has {theirs!r}"
    return (
        f"the {role} server {told}, this one has {layout()!r}: quantised caches can be moved only "
        "between servers that both use fastattn"
    )


def _accepts(connector: Any, task: dict[str, Any]) -> bool:
    """Whether a request's cache may come here. If not, the prefill server receives the reason."""
    info = task.get("disaggregate_info")
    if info is None or info.get(FIELD) == layout():
        return True
    text = _difference("prefill", info)
    _LOG.error("fastattn: request %s refused: %s", task.get("request_id"), text)
    address = f"{info['prefill_ip']}:{info['prefill_connector_port']}"
    answer = {"request_id": task.get("request_id"), "error_msg": text}
    connector._send_message(address, "cache_sync", [answer])
    return False


# ---- pools that servers share ----


def _guard_pool(pool: str, backend: str) -> None:
    what = "cache_config.kvcache_storage_backend"
    if pool == "attention_store":
        # The backend names blocks itself, below the version in the environment.
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
    patches.BLOCK_NAMES.apply(_naming_layout)


def _naming_layout(original: Callable[..., Any]) -> Callable[..., Any]:
    def get_hash_str(token_ids: Any, *extra_keys: Any, **named: Any) -> Any:
        return original((layout(), token_ids), *extra_keys, **named)

    return get_hash_str

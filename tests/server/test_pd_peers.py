"""Peers of a server, and pools of blocks, whose caches have another order of bytes."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import types
from types import SimpleNamespace

import pytest

from fastattn._plugin.patches import PATCHES
from fastattn.backends.peers import FIELD, LAYOUT
from fastattn.env import KV_SIGNAL_SWITCH
from tests.support import ROOT
from tests.support.fastdeploy import make_fd_config, make_model
from tests.support.pd import chosen, configured, fastdeploy, prefill

__all__ = ["fastdeploy", "prefill"]  # fixtures

#: Modules that set attributes: of a step, of the platform, of what the list names.
PATCHING = [
    "backends/base.py",
    "backends/forward_meta.py",
    "_plugin/__init__.py",
    "_plugin/patches.py",
]

#: Functions of this file's stand-ins, whose sources are not FastDeploy's.
STAND_INS = (
    "SplitwiseConnector._serialize_message, SplitwiseConnector._deserialize_message, get_hash_str"
)

# --- peers with another layout -------------------------------------------------------------------


class SplitwiseConnector:
    """The messages of FastDeploy's class of this name: what is serialised, sent and received."""

    def __init__(self):
        self.sent = []

    def _serialize_message(self, msg_type, payload):
        if msg_type == "prefill":
            payload = [vars(task).copy() for task in payload]
        return json.dumps([msg_type, payload])

    def _deserialize_message(self, frames):
        return tuple(json.loads(frames))

    def _send_message(self, address, msg_type, payload):
        self.sent.append((address, self._serialize_message(msg_type, payload)))


@pytest.fixture
def engine(prefill, monkeypatch):
    """An engine's process: it has FastDeploy's connector, and makes a backend for its shapes."""
    monkeypatch.delenv(KV_SIGNAL_SWITCH)
    monkeypatch.setenv("FASTATTN_IGNORED", STAND_INS)

    def load(connector=None, hashes=None):
        plain = type("SplitwiseConnector", (connector or SplitwiseConnector,), {})
        theirs = types.ModuleType("fastdeploy.splitwise.splitwise_connector")
        theirs.SplitwiseConnector = plain
        monkeypatch.setitem(sys.modules, theirs.__name__, theirs)
        names = types.ModuleType("fastdeploy.cache_manager.prefix_cache_manager")
        names.__dict__.update(hashes or {})
        monkeypatch.setitem(sys.modules, names.__name__, names)
        return theirs, names

    return load


def engine_config(role="prefill", dtype="uint8", pool=None, protocol="rdma"):
    config = configured(
        make_fd_config(make_model(None)),
        "None",
        scheduler_config__splitwise_role=role,
        cache_config__cache_dtype=dtype,
        cache_config__kvcache_storage_backend=pool,
        cache_config__cache_transfer_protocol=protocol,
    )
    return config


def request():
    info = {"prefill_ip": "p", "prefill_connector_port": 7, "decode_ip": "d"}
    return SimpleNamespace(request_id="r", disaggregate_info=info)


@pytest.mark.parametrize("ours", [(True, True), (True, False), (False, True)])
def test_only_servers_with_the_same_layout_agree(engine, ours):
    """A quantised cache moves if both ends are this package's; otherwise the request fails."""
    theirs, _ = engine()
    marked = theirs.SplitwiseConnector
    chosen()(engine_config(), 2, 4, 64)
    chosen()(engine_config(), 2, 4, 64)  # again does nothing
    here, there = (marked() if one else SplitwiseConnector() for one in ours)
    kind, payload = there._deserialize_message(here._serialize_message("prefill", [request()]))
    if ours[1] and not ours[0]:
        assert (kind, payload) == ("refused", [])
        ((address, frames),) = there.sent
        assert address == "p:7"
        kind, (answer,) = here._deserialize_message(frames)
        assert kind == "cache_sync" and answer["request_id"] == "r"
        assert "does not tell the order of its cache's bytes" in answer["error_msg"]
        return
    assert kind == "prefill" and payload[0]["request_id"] == "r"
    answer = [{"request_id": "r", "dest_block_ids": [1, 2]}]
    kind, (info,) = here._deserialize_message(there._serialize_message("cache_sync", answer))
    assert kind == "cache_sync" and info["dest_block_ids"] == [1, 2]
    assert ("error_msg" in info) == (not ours[1])
    assert answer == [{"request_id": "r", "dest_block_ids": [1, 2]}]


def test_a_refusal_keeps_its_reason_and_other_messages_their_content(engine):
    theirs, _ = engine()
    chosen()(engine_config("decode"), 2, 4, 64)
    ours, plain = theirs.SplitwiseConnector(), SplitwiseConnector()
    frames = plain._serialize_message("cache_sync", [{"request_id": "r", "error_msg": "full"}])
    assert ours._deserialize_message(frames)[1][0]["error_msg"] == "full"
    frames = ours._serialize_message("decode", [{"a": 1}])
    assert plain._deserialize_message(frames) == ("decode", [{"a": 1}])
    both = [request(), SimpleNamespace(request_id="s", disaggregate_info=None)]
    kind, left = ours._deserialize_message(plain._serialize_message("prefill", both))
    assert kind == "prefill" and [task["request_id"] for task in left] == ["s"]
    for theirs_is in ("fastattn-0", "fastattn-1"):  # 1 does not rotate K of block_wise_int8
        other = request()
        other.disaggregate_info[FIELD] = theirs_is
        ours._deserialize_message(plain._serialize_message("prefill", [other]))
        assert f"has {theirs_is!r}, this one has" in ours.sent[-1][1]


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_caches_without_quantisation_go_anywhere(engine, role, dtype):
    theirs, names = engine(hashes={"get_hash_str": len})
    chosen()(engine_config(role, dtype, "mooncake", "ipc,rdma"), 2, 4, 64)
    for name in ("_serialize_message", "_deserialize_message"):
        assert name not in vars(theirs.SplitwiseConnector)
    assert names.get_hash_str is len


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"pool": "s3"}, "kvcache_storage_backend = 's3'.*supported: mooncake, file"),
        ({"pool": "attention_store"}, "AS_MODEL_VERSION contains 'fastattn-2'"),
    ],
)
def test_what_cannot_be_marked_is_refused(engine, options, text):
    engine()
    with pytest.raises(NotImplementedError, match=f"FlashAttentionBackend: .*{text}"):
        chosen()(engine_config(**options), 2, 4, 64)


class OtherConnector(SplitwiseConnector):
    """One that passes something else."""

    def _deserialize_message(self, frames, peer):
        return super()._deserialize_message(frames)


@pytest.mark.parametrize(
    ("connector", "pool", "text"),
    [
        (
            type("Nothing", (), {"_deserialize_message": len}),
            None,
            r"Connector\._serialize_message is missing, .*supported: d81f770d036fa890",
        ),
        (OtherConnector, None, r"_deserialize_message \(self, frames, peer\) has another"),
        (None, "mooncake", r"prefix_cache_manager:get_hash_str is missing"),
    ],
)
def test_a_function_of_another_shape_is_not_replaced(engine, connector, pool, text):
    theirs, _ = engine(connector)
    with pytest.raises(NotImplementedError, match=f"FastDeploy's fastdeploy.*{text}"):
        chosen()(engine_config(pool=pool), 2, 4, 64)
    if connector is not None:
        assert not getattr(theirs.SplitwiseConnector._deserialize_message, "fastattn", False)


def test_the_list_of_what_is_replaced_is_complete():
    """Nothing else of the package sets an attribute of FastDeploy's objects."""
    assert len({patch.what for patch in PATCHES}) == len(PATCHES)
    for patch in PATCHES:
        assert all((patch.why, patch.versions, patch.until, patch.parameters))
    users = [
        path.relative_to(ROOT / "fastattn").as_posix()
        for folder in ("backends", "_plugin")
        for path in sorted((ROOT / "fastattn" / folder).glob("*.py"))
        if "setattr(" in path.read_text(encoding="utf-8")
    ]
    assert users == PATCHING


def test_the_other_cache_manager(engine, monkeypatch):
    engine()
    envs = importlib.import_module("fastdeploy.envs")
    monkeypatch.setattr(envs, "ENABLE_V1_KVCACHE_MANAGER", 1, raising=False)
    for config in (engine_config(), engine_config("mixed", pool="mooncake")):
        with pytest.raises(NotImplementedError, match="ENABLE_V1_KVCACHE_MANAGER"):
            chosen()(config, 2, 4, 64)
    chosen()(engine_config("mixed"), 2, 4, 64)
    chosen()(engine_config(dtype="bfloat16"), 2, 4, 64)


def get_hash_str(token_ids, extra_keys=()):
    return hashlib.sha256(repr((token_ids, list(extra_keys))).encode()).hexdigest()


@pytest.mark.parametrize("pool", ["mooncake", "file"])
def test_blocks_of_a_pool_have_names_of_their_own(engine, pool):
    _, names = engine(hashes={"get_hash_str": get_hash_str})
    for _ in range(2):  # again does nothing
        chosen()(engine_config("mixed", "block_wise_fp8", pool), 2, 4, 64)
    first = names.get_hash_str([1, 2, 3], [])
    assert first != get_hash_str([1, 2, 3], [])
    assert first == names.get_hash_str([1, 2, 3])
    assert first == get_hash_str((LAYOUT, [1, 2, 3]), [])
    assert names.get_hash_str([4], [first]) != names.get_hash_str([4], ["other"])


def test_a_pool_with_a_version(engine, monkeypatch):
    engine()
    monkeypatch.setenv("AS_MODEL_VERSION", f"v3-{LAYOUT}")
    chosen()(engine_config("mixed", pool="attention_store"), 2, 4, 64)


def test_a_worker_marks_nothing(prefill):
    """It has a quantisation type, but none of the engine's classes."""
    config = configured(make_fd_config(make_model("int8"), "int8"), "per_chunk")
    config.cache_config.kvcache_storage_backend = "mooncake"
    assert chosen()(config, 2, 4, 64)._signals is not None

"""The changes that docs/upstream/ proposes: they apply to the tree, and do what they promise."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fastdeploy_check.cases import NotRun, environment
from fastdeploy_check.serving import Wrong

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "upstream"

Case = tuple[str, Callable[[], float]]


def changed(name: str, *files: str) -> list[Any]:
    """Modules of copies of the tree's files after a proposed change.

    Raises
    ------
    NotRun
        If the change does not apply: the tree is not the one that it was written for.
    """
    tree = Path(importlib.import_module("fastdeploy").__file__ or "").parents[1]
    folder, diff = Path(tempfile.mkdtemp(prefix="upstream_")), FOLDER / f"{name}.diff"
    touched = [line[6:] for line in diff.read_text().splitlines() if line.startswith("+++ b/")]
    for file in touched:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes((tree / file).read_bytes())
    command = ["git", "apply", str(diff)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise NotRun(f"{diff.name} does not apply: {done.stderr.strip()}")
    modules = []
    for file in files:
        path = next(folder / x for x in touched if x.endswith(f"/{file}.py"))
        spec = importlib.util.spec_from_file_location(f"fastdeploy_changed_{file}", path)
        assert spec is not None and spec.loader is not None
        modules.append(importlib.util.module_from_spec(spec))
        spec.loader.exec_module(modules[-1])
    return modules


def register() -> float:
    """A backend is chosen by a name of its own, and by a name of FastDeploy."""
    ours = "fastattn.backends.gqa.FlashAttentionBackend"
    for name in ("FASTATTN", "APPEND_ATTN"):
        (selecter,) = changed("register_attention_backend", "attention_selecter")
        with environment(FD_ATTENTION_BACKEND=name):
            selecter.register_attention_backend(name, ours)
            _raises(ValueError, lambda s=selecter, n=name: s.register_attention_backend(n, "a.B"))
            made = selecter.get_attention_backend()
            if f"{made.__module__}.{made.__name__}" != ours:
                raise Wrong(f"{name} is {made}")
            _raises(RuntimeError, lambda s=selecter: s.register_attention_backend("X", ours))
    return 0.0


def _raises(kind: type[Exception], run: Callable[[], Any]) -> None:
    try:
        run()
    except kind:
        return
    raise Wrong(f"no {kind.__name__} was raised")


class Engine:
    """A server's end of the messages."""

    def __init__(self, module: Any, layout: str) -> None:
        made = self.connector = object.__new__(module.SplitwiseConnector)
        made.kv_cache_layout, made.enable_decode_cache_task = layout, False
        made.logger = SimpleNamespace(info=print_nothing, error=print_nothing)
        made.current_request_ids = {"r": "init"}
        self.accepted: list[Any] = []
        self.answers: list[Any] = []
        made.engine_worker_queue = SimpleNamespace(put_cache_info=self.accepted.append)
        made._handle_prefill = self.accepted.extend
        made._send_message = lambda address, *message: self.answers.append(message)

    def receive(self, frames: list[Any]) -> None:
        """Handle a message as the engine's thread does."""
        self.connector._process_message([b"sender", *frames])


def print_nothing(*_: Any) -> None:
    """A logger's function."""


def handshake() -> float:
    """A request between servers of the same layout, of two layouts, and of an older release."""
    base, module = changed("kv_cache_layout", "base_attention_backend", "splitwise_connector")
    if base.AttentionBackend.get_kv_cache_layout("uint8") != "fastdeploy":
        raise Wrong("FastDeploy's own layout has another name")
    info = {"prefill_ip": "127.0.0.1", "prefill_connector_port": 1}
    fields = {"request_id": "r", "disaggregate_info": info}
    task = SimpleNamespace(to_dict=lambda: fields)
    for layouts in (("fastdeploy", "fastdeploy"), ("x", "x"), ("x", "fastdeploy")):
        prefill, decode = (Engine(module, layout) for layout in layouts)
        decode.receive(prefill.connector._serialize_message("prefill", [task]))
        same = layouts[0] == layouts[1]
        if decode.accepted != ([fields] if same else []):
            raise Wrong(f"{layouts}: the decode server accepted {decode.accepted}")
        if same:
            decode.answers = [("cache_sync", [{"request_id": "r", "dest_block_ids": [3]}])]
        for answer in decode.answers:
            prefill.receive(decode.connector._serialize_message(*answer))
        state = prefill.connector.current_request_ids["r"]
        if state != "finished" if same else not state.startswith("the kv cache layout is x here"):
            raise Wrong(f"{layouts}: the request's state is {state!r}")
    old = pickle.dumps({"type": "prefill", "payload": [fields]})
    for layout in ("fastdeploy", "x"):
        decode = Engine(module, layout)
        decode.receive([old])
        if bool(decode.accepted) != (layout == "fastdeploy"):
            raise Wrong(f"{layout}: a request of an older release: {decode.accepted}")
    return 0.0


def cases() -> Iterator[Case]:
    """Every proposed change."""
    yield "upstream, register_attention_backend", register
    yield "upstream, kv_cache_layout", handshake

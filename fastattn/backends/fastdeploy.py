"""The plug-in that makes FastDeploy 2.x use this package's backends.

FastDeploy calls :func:`register` (by ``fastattn._plugin``, an entry point of
``fastdeploy.model_register_plugins``) in every process that loads its models or its engine, if the
environment variable ``FD_PLUGINS`` names ``fastattn``::

    FD_PLUGINS=fastattn FD_ATTENTION_BACKEND=FLASH_ATTN python -m fastdeploy.entrypoints...

From then on ``APPEND_ATTN``, ``FLASH_ATTN``, ``FLASH_MASK_ATTN``, ``MLA_ATTN`` and ``DSA_ATTN``
mean the classes of :mod:`fastattn.backends`, and so does ``DECODE_UNIFIED_ATTN`` (FastDeploy's
append backend with another decode kernel); every other backend stays FastDeploy's.

FastDeploy's platform class has a method that returns the name of a backend's class; the class is
imported when the first backend is made. :func:`register` replaces that name. Putting the classes
into FastDeploy's own package instead would import it, with all its compiled operators, in processes
that ask a backend only for shapes, and would be undone where the package is still being imported.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import runpy
import sys
from typing import Any

import paddle

from fastattn import _ops
from fastattn._plugin import METHOD, REPLACED, method_of
from fastattn.backends import fastdeploy_models

_LOG = logging.getLogger(__name__)

#: FastDeploy's package of attention backends.
PACKAGE = "fastdeploy.model_executor.layers.attention"


def register() -> None:
    """Make FastDeploy use this package's backends in the current process.

    This uses neither a GPU nor a compiled operator. Options that a backend does not support are
    refused when the backend is made, which every process does before it serves.

    Raises
    ------
    ImportError
        If FastDeploy cannot be imported, or the compiled operators are missing or were built for
        another Paddle.
    NotImplementedError
        If FastDeploy runs on another platform than CUDA, or the operators were built without it.
    RuntimeError
        If FastDeploy has chosen its backend already, or has no such hook.

    Notes
    -----
    Calling it again does nothing. It affects backends that are made later, including those of draft
    models, which FastDeploy makes itself.
    """
    platform = _cuda_platform()
    if getattr(getattr(platform, METHOD, None), "fastattn", False):
        return
    _check_library()
    _check_not_chosen()
    _patch(platform)
    _LOG.info("fastattn: registered %s in FastDeploy", ", ".join(REPLACED))


def _cuda_platform() -> type:
    try:
        current = importlib.import_module("fastdeploy.platforms").current_platform
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"fastattn: FastDeploy 2.x is needed, its fastdeploy.platforms cannot be used: {error}"
        ) from error
    if not current.is_cuda():
        name = getattr(current, "device_name", type(current).__name__)
        raise NotImplementedError(
            f"fastattn: FastDeploy's platform {name!r} is not supported; supported: CUDA"
        )
    return type(current)


def _check_library() -> None:
    path = _ops.library_path()
    if not path.exists():
        raise ImportError(
            f"fastattn: the compiled operators are missing ({path}); build them with `python "
            "setup_ops.py install`"
        )
    _ops._check_build(path)
    record = path.with_name("_build_info.py")
    if paddle.is_compiled_with_cuda() and record.exists():
        built = runpy.run_path(str(record))
        if not built.get("WITH_CUDA", False):
            raise NotImplementedError(
                f"fastattn: {path} was built without CUDA; rebuild it with nvcc installed "
                "(`python setup_ops.py build_ext --cuda=on install`)"
            )


def _check_not_chosen() -> None:
    """Refuse if FastDeploy has chosen a class already: it caches the class and would keep it."""
    selecter = sys.modules.get(f"{PACKAGE}.attention_selecter")
    for name in ("_get_attn_backend", "get_attention_backend"):  # which one differs by version
        info = getattr(getattr(selecter, name, None), "cache_info", None)
        if info is not None and info().currsize > 0:
            raise RuntimeError(
                "fastattn: FastDeploy has chosen its attention backend already; register before "
                "the first get_attention_backend(), which FD_PLUGINS=fastattn does"
            )


def _patch(platform: type) -> None:
    original = method_of(platform)
    if not inspect.ismethod(original):
        raise RuntimeError(
            f"fastattn: FastDeploy's {platform.__name__} has no class method {METHOD}: this "
            "version of FastDeploy is not supported"
        )

    # FastDeploy's own method runs first: it refuses a backend that it does not know.
    def get_attention_backend_cls(cls: type, *args: Any, **kwargs: Any) -> Any:
        return _replacement(original(*args, **kwargs))

    get_attention_backend_cls.fastattn = True  # type: ignore[attr-defined]
    setattr(platform, METHOD, classmethod(get_attention_backend_cls))


def _replacement(path: Any) -> Any:
    """Dotted name of this package's class for one of FastDeploy's; other names are kept."""
    package, _, name = str(path).rpartition(".")
    if package != PACKAGE or name not in REPLACED:
        return path
    ours = REPLACED[name]
    backend = getattr(importlib.import_module("fastattn.backends"), ours)
    base = sys.modules.get(f"{PACKAGE}.base_attention_backend")
    # Its runner makes positions of tokens only for what is an instance of some of its backends.
    theirs = (
        getattr(base, "AttentionBackend", None),
        getattr(sys.modules.get(PACKAGE), name, None),
    )
    for kind in theirs:
        if hasattr(kind, "register"):
            kind.register(backend)  # type: ignore[union-attr]
    if ours == "DSAAttentionBackend":
        fastdeploy_models.take_indexer()  # before models are made
    _LOG.info("fastattn: %s instead of FastDeploy's %s", f"fastattn.backends.{ours}", name)
    return f"fastattn.backends.{ours}"

"""The plug-in that makes FastDeploy 2.6 use the backends of this package.

FastDeploy calls :func:`register` in every process that loads its models or its engine, if the
environment variable ``FD_PLUGINS`` names ``fastattn``. The call goes through ``fastattn._plugin``,
an entry point of ``fastdeploy.model_register_plugins``::

    FD_PLUGINS=fastattn FD_ATTENTION_BACKEND=FLASH_ATTN python -m fastdeploy.entrypoints...

From then on ``APPEND_ATTN``, ``FLASH_ATTN``, ``FLASH_MASK_ATTN``, ``MLA_ATTN`` and ``DSA_ATTN``
mean the classes of :mod:`fastattn.backends`. So do ``DECODE_UNIFIED_ATTN``, FastDeploy's append
backend with another decode kernel, and ``TRITON_MLA_ATTN``. FastDeploy keeps every other backend.

FastDeploy's platform class has a method that returns the name of a backend's class, and imports it
when the first backend is made. :func:`register` replaces that name, which needs no GPU and no
compiled operator in processes that only ask for shapes.
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
from fastattn._plugin import METHOD, REPLACED, change, method_of
from fastattn._plugin.patches import BACKEND_CLASS
from fastattn.backends import fastdeploy_models

_LOG = logging.getLogger(__name__)

#: FastDeploy's package of attention backends.
PACKAGE = "fastdeploy.model_executor.layers.attention"


def register() -> None:
    """Make FastDeploy use the backends of this package in the current process.

    This uses neither a GPU nor a compiled operator. Unsupported options are refused when the
    backend is made; every process does so before it serves.

    Raises
    ------
    ImportError
        If FastDeploy cannot be imported, or the compiled operators are missing or were built for
        another Paddle.
    NotImplementedError
        If FastDeploy runs on a platform other than CUDA, or the operators were built without CUDA.
    RuntimeError
        If FastDeploy has already chosen its backend, or has no such hook.

    Notes
    -----
    A second call does nothing. The call affects backends that are made later, including backends of
    draft models, which FastDeploy makes itself.
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
            f"fastattn: FastDeploy 2.6 is needed, its fastdeploy.platforms cannot be used: {error}"
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
    """Refuse if FastDeploy has already chosen a class, because it would keep the cached class."""
    selecter = sys.modules.get(f"{PACKAGE}.attention_selecter")
    for name in ("_get_attn_backend", "get_attention_backend"):  # the name depends on the version
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
    BACKEND_CLASS.replaces(original)
    change(platform, _replacement, registered=True)


def _replacement(path: Any) -> Any:
    """Dotted name of this package's class for a class of FastDeploy; other names are kept."""
    package, _, name = str(path).rpartition(".")
    if f"{package}.".startswith(f"{PACKAGE}.") and name in REPLACED:
        made = _class_for(package, name)
        _LOG.info("fastattn: fastattn.backends.%s instead of FastDeploy's %s", made.__name__, name)
        path = f"{__name__}.{made.__name__}"
    return path


def _class_for(package: str, name: str) -> type:
    """The class that replaces a class of FastDeploy, as an attribute of this module.

    It is derived from FastDeploy's base class, too, whose later releases have methods that make
    caches. FastDeploy's runner makes token positions only for instances of some of its own classes,
    so it becomes a virtual subclass of the replaced one.
    """
    ours = getattr(importlib.import_module("fastattn.backends"), REPLACED[name])
    base = getattr(sys.modules.get(f"{PACKAGE}.base_attention_backend"), "AttentionBackend", None)
    bases = (ours,) if base is None else (ours, base)
    made = type(ours)(ours.__name__, bases, {"__module__": __name__, "__doc__": ours.__doc__})
    globals()[ours.__name__] = made
    theirs = getattr(sys.modules.get(package), name, None)
    if hasattr(theirs, "register"):
        theirs.register(made)  # type: ignore[union-attr]
    if ours.__name__ == "DSAAttentionBackend":
        fastdeploy_models.take_indexer()  # before models are made
    return made

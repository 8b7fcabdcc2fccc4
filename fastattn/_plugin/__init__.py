"""Entry point for FastDeploy's plug-in loader: the registration, and its failure mode.

FastDeploy only logs an error from the import of a plug-in, and a second request for its models
succeeds without the plug-in. A server that was told to use this package would then serve with
FastDeploy's own backends. So this module imports nothing that can fail. After a failed
registration, FastDeploy's choice of a backend that this package replaces fails again, with the
original reason.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

#: Method of FastDeploy's platform that returns the name of a backend's class.
METHOD = "get_attention_backend_cls"

#: FastDeploy's classes that this package replaces, and their replacements in ``fastattn.backends``.
REPLACED = {
    "AppendAttentionBackend": "AppendAttentionBackend",
    "DecodeUnifiedAttentionBackend": "AppendAttentionBackend",
    "FlashAttentionBackend": "FlashAttentionBackend",
    "FlashMaskAttentionBackend": "FlashMaskAttentionBackend",
    "MLAAttentionBackend": "MLAAttentionBackend",
    "TritonMLAAttentionBackend": "MLAAttentionBackend",
    "DSAAttentionBackend": "DSAAttentionBackend",
}


def register() -> None:
    """Make FastDeploy use the backends of this package.

    Raises
    ------
    Exception
        Any error of :func:`fastattn.backends.fastdeploy.register` or of its import.
    """
    try:
        importlib.import_module("fastattn.backends.fastdeploy").register()
    except Exception as error:
        _fail_when_chosen(error)
        raise


def method_of(platform: type) -> Any:
    """The platform's original method, without the change of a failed registration, or None."""
    method = getattr(platform, METHOD, None)
    return getattr(method, "fastattn_original", method)


def change(platform: type, result: Callable[[Any], Any], *, registered: bool) -> None:
    """Pass what the platform's original method returns through a function.

    The original runs first, because it refuses backends that FastDeploy does not know.
    """
    original = method_of(platform)

    def get_attention_backend_cls(cls: type, *args: Any, **kwargs: Any) -> Any:
        return result(original(*args, **kwargs))

    vars(get_attention_backend_cls).update(fastattn=registered, fastattn_original=original)
    setattr(platform, METHOD, classmethod(get_attention_backend_cls))


def _fail_when_chosen(error: Exception) -> None:
    """Make FastDeploy raise when it chooses a backend that this package replaces."""
    try:
        platform = type(importlib.import_module("fastdeploy.platforms").current_platform)
    except (ImportError, AttributeError):
        return  # without FastDeploy there is no backend to choose
    method = getattr(platform, METHOD, None)
    if not inspect.ismethod(method) or getattr(method, "fastattn", False):
        return
    text = f"fastattn: registering failed, {type(error).__name__}: {error}"

    def refuse(path: Any) -> Any:
        if str(path).rpartition(".")[2] in REPLACED:
            raise RuntimeError(f"{text}; unset FD_PLUGINS to serve without it")
        return path

    change(platform, refuse, registered=False)

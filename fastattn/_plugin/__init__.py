"""What FastDeploy's plug-in loader calls: the registration, and what is left if it fails.

FastDeploy only logs an error of importing a plug-in, and whoever asks for its models a second time
gets them without the plug-in. A server that was told to use this package would then serve with
FastDeploy's own backends. So this module imports nothing that can fail, and a registration that
failed fails again, with its reason, where FastDeploy chooses an attention backend that this package
replaces.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

#: Method of FastDeploy's platform that names a backend's class.
METHOD = "get_attention_backend_cls"

#: Its classes that this package replaces, and by which of ``fastattn.backends``.
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
    """Make FastDeploy use this package's backends.

    Raises
    ------
    Exception
        What :func:`fastattn.backends.fastdeploy.register` raises, and any error of importing it.
    """
    try:
        importlib.import_module("fastattn.backends.fastdeploy").register()
    except Exception as error:
        _fail_when_chosen(error)
        raise


def method_of(platform: type) -> Any:
    """The platform's method, without what a failed registration made of it; None: it has none."""
    method = getattr(platform, METHOD, None)
    return getattr(method, "fastattn_failed", method)


def _fail_when_chosen(error: Exception) -> None:
    """Make FastDeploy's choice of a backend that this package replaces raise."""
    try:
        platform = type(importlib.import_module("fastdeploy.platforms").current_platform)
    except (ImportError, AttributeError):
        return  # no FastDeploy, no backend of its own
    original = method_of(platform)
    if not inspect.ismethod(original) or getattr(original, "fastattn", False):
        return
    text = f"fastattn: registering failed, {type(error).__name__}: {error}"

    def get_attention_backend_cls(cls: type, *args: Any, **kwargs: Any) -> Any:
        path = original(*args, **kwargs)
        if str(path).rpartition(".")[2] in REPLACED:
            raise RuntimeError(f"{text}; unset FD_PLUGINS to serve without it")
        return path

    get_attention_backend_cls.fastattn_failed = original  # type: ignore[attr-defined]
    setattr(platform, METHOD, classmethod(get_attention_backend_cls))

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

_METHOD = "get_attention_backend_cls"
_REPLACED = ("Append", "Flash", "FlashMask", "DecodeUnified")


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


def _fail_when_chosen(error: Exception) -> None:
    """Make FastDeploy's choice of a backend that this package replaces raise."""
    try:
        platform = type(importlib.import_module("fastdeploy.platforms").current_platform)
    except (ImportError, AttributeError):
        return  # no FastDeploy, no backend of its own
    original: Any = getattr(platform, _METHOD, None)
    original = getattr(original, "fastattn_failed", original)  # not twice
    if not inspect.ismethod(original) or getattr(original, "fastattn", False):
        return
    text = f"fastattn: registering failed, {type(error).__name__}: {error}"

    def get_attention_backend_cls(cls: type, *args: Any, **kwargs: Any) -> Any:
        path = original(*args, **kwargs)
        if str(path).rpartition(".")[2] in [f"{name}AttentionBackend" for name in _REPLACED]:
            raise RuntimeError(f"{text}; unset FD_PLUGINS to serve without it")
        return path

    get_attention_backend_cls.fastattn_failed = original  # type: ignore[attr-defined]
    setattr(platform, _METHOD, classmethod(get_attention_backend_cls))

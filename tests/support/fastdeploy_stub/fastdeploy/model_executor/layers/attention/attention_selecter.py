"""The choice of a backend, kept once it was made."""

import functools
import importlib

from fastdeploy import envs
from fastdeploy.platforms import _Backend, current_platform


@functools.cache
def _get_attn_backend(name):
    dotted = current_platform.get_attention_backend_cls(_Backend.__members__.get(name))
    module, _, attribute = dotted.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def get_attention_backend():
    return _get_attn_backend(envs.FD_ATTENTION_BACKEND)

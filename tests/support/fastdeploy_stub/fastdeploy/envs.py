"""FastDeploy's environment variables, read whenever they are asked for."""

import os


def __getattr__(name):
    if name == "FD_PLUGINS":
        value = os.environ.get(name)
        return None if value is None else value.split(",")
    if name == "FD_ATTENTION_BACKEND":
        return os.environ.get(name, "APPEND_ATTN")
    raise AttributeError(name)

"""Loading of plug-ins, once a process, by the names in ``FD_PLUGINS``."""

import importlib.metadata
import logging

from fastdeploy import envs

_loaded = False


def load_model_register_plugins():
    global _loaded
    if _loaded:
        return
    _loaded = True
    if envs.FD_PLUGINS is None:
        return
    everything = importlib.metadata.entry_points()
    if hasattr(everything, "select"):
        entries = everything.select(group="fastdeploy.model_register_plugins")
    else:  # Python 3.9
        entries = everything.get("fastdeploy.model_register_plugins", ())
    functions = []
    for entry in {entry.name: entry for entry in entries}.values():
        if entry.name in envs.FD_PLUGINS:
            try:
                functions.append(entry.load())
            except Exception:  # the server goes on without the plug-in
                logging.getLogger("fastdeploy").exception("Failed to load plugin %s", entry.name)
    for function in functions:
        function()

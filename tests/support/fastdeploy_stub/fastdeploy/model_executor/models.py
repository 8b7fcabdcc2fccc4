"""Importing the models loads the plug-ins, in the engine as in a worker."""

from fastdeploy.plugins import load_model_register_plugins

load_model_register_plugins()

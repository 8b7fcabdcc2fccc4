"""A tiny GPT trained on this machine and served from a quantised KV cache.

``python -m fastattn demo`` is the package's main job on real input. Training takes about a minute
on two cores; then the model is served through the backend classes with every cache type.
"""

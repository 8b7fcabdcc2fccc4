"""A tiny GPT served from a quantised KV cache.

``python -m fastattn demo`` is the package's main job on real input: the model that the package
ships, or one that is trained on the spot, served through the backend classes with every cache type.
``--attention mla-sparse`` serves one with latent attention and an indexer through the operators.
"""

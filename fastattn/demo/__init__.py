"""A tiny GPT served from a quantised KV cache.

``python -m fastattn demo`` runs the package on real input. It serves the model that the package
ships, or one that is trained on the spot, through the backend classes with every cache type.
``--attention mla-sparse`` serves a model with latent attention and an indexer through the
operators.
"""

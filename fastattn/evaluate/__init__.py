"""What cache types cost real models: ``python -m fastattn evaluate``.

Perplexity against a 16-bit cache with its standard error, the divergence of the next token's
distribution, agreement, bytes and speed; needles in long contexts.
"""

"""``FASTATTN_DUMP``: operator calls on disk, and what runs them again (docs/debugging.md).

``record`` writes calls, ``files`` is their format, ``replay`` makes one again and holds its results
to the NumPy model by the bounds of ``compare``. Nothing here is imported where the variable is not
set and no command asks for it.
"""

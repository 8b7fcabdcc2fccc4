"""Timing of the operators: ``python -m fastattn bench``."""

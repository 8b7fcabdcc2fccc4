"""Operators with the names and argument orders of other packages."""

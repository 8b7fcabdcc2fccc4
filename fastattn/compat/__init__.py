"""Operators with the names and argument orders that other packages call."""

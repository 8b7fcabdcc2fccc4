"""Problems, comparators and tools that the tests share."""

from pathlib import Path

#: The source tree.
ROOT = Path(__file__).parents[2]

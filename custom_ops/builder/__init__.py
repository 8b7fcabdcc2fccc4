"""Builds the compiled part of fastattn; ``setup_ops.py`` uses it.

``toolchain`` finds Paddle, compilers and GPU architectures. ``instances`` is the table of kernel
variants. ``project`` describes the compiled parts as extensions of Paddle, and ninja compiles them.
``extension`` has the commands that build and install, and ``backend`` has the hooks for pip. No
module imports Paddle before it is needed.
"""

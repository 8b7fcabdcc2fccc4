"""Builds the compiled part of fastattn: the steps behind ``setup_ops.py``.

``toolchain`` finds compilers, Paddle and GPU architectures, ``sources`` the files to compile,
``compile`` runs the compilers, ``extension`` ties these to setuptools and Paddle, ``backend`` is
what pip calls, ``wheel`` checks what a wheel holds. Only ``extension`` needs setuptools, and no
module imports Paddle before it is needed.
"""

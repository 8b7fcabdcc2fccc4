"""Builds the compiled part of fastattn: the steps behind ``setup_ops.py``.

``toolchain`` finds compilers, Paddle and GPU architectures, ``sources`` the files to compile,
``compile`` runs the compilers, ``ops`` is one build from all of these, ``extension`` ties it to
setuptools and Paddle, ``backend`` is what pip calls, ``wheel`` checks what a wheel holds. Only
``extension`` and ``backend`` need setuptools, and no module imports Paddle before it is needed.
"""

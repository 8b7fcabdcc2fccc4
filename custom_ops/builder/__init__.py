"""Builds the compiled part of fastattn: the steps behind ``setup_ops.py``.

``toolchain`` finds compilers, Paddle and GPU architectures; ``instances`` is the table of the
kernels' variants; ``project`` says what is compiled, as extensions of Paddle; ``compile`` runs
ninja; ``extension`` holds the commands of setuptools, ``backend`` is what pip calls, ``wheel`` what
a wheel is called and asks for. No module imports Paddle before it is needed.
"""

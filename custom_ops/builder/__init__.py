"""Builds the compiled part of fastattn: the steps behind ``setup_ops.py``.

``toolchain`` finds Paddle, compilers and GPU architectures; ``instances`` is the table of the
kernels' variants; ``project`` describes what is compiled as extensions of Paddle and has ninja
compile it; ``extension`` holds the commands that build and install, ``backend`` is what pip calls.
No module imports Paddle before it is needed.
"""

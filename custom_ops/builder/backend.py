"""PEP 517 backend on top of setuptools, for ``setup_ops.py`` and the environment's Paddle.

pip builds in an isolated environment that hides the packages of the target environment. The
operators must be built against exactly the Paddle of the target, so its packages are made
importable again (after the isolated ones). No Paddle is fetched: see ``toolchain.require_paddle``.
"""

from __future__ import annotations

import site
import sys
from typing import Any

from setuptools import build_meta

from .toolchain import NINJA, find_ninja


class Backend(build_meta._BuildMetaBackend):
    """The hooks of setuptools."""

    def run_setup(self, setup_script: str = "setup_ops.py") -> None:
        """Run the command of a hook."""
        paths = site.getsitepackages()
        if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
            paths.append(site.getusersitepackages())
        sys.path.extend(path for path in paths if path not in sys.path)
        super().run_setup(setup_script)

    def get_requires_for_build_wheel(self, config_settings: Any = None) -> list[str]:
        """Ninja, if it is missing."""
        return [] if find_ninja() else [NINJA]


backend = Backend()

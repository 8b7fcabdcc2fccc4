"""PEP 517 backend: setuptools', for ``setup_ops.py`` and the Paddle of the surrounding environment.

pip builds in an isolated environment that hides the packages of the one it installs into. The
operators must be built against exactly the Paddle there, so those packages are made importable
again (after the isolated ones). None is fetched: see ``toolchain.require_paddle``.
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
        """Ninja, where there is none."""
        return [] if find_ninja() else [NINJA]


backend = Backend()

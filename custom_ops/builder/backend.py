"""PEP 517 backend: setuptools, building against the Paddle of the environment that pip serves.

pip builds in an isolated environment that hides the packages of the one it installs into. The
operators must be built against exactly the Paddle there, so this backend makes that environment's
packages importable again (after the isolated ones). It never asks for a Paddle of its own: see
``toolchain.require_paddle``.
"""

from __future__ import annotations

import os
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta

from .project import ROOT
from .toolchain import NINJA, ToolchainError, find_ninja, require_paddle
from .wheel import unpack_compiled

SETUP_SCRIPT = "setup_ops.py"


def surrounding_paths() -> list[str]:
    """Package folders of the environment whose Python runs this build."""
    paths = [sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")]
    paths += site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        paths.append(site.getusersitepackages())
    return list(dict.fromkeys(paths))


class _Backend(build_meta._BuildMetaBackend):
    def run_setup(self, setup_script: str = SETUP_SCRIPT) -> None:
        sys.path.extend(p for p in surrounding_paths() if p not in sys.path)
        super().run_setup(SETUP_SCRIPT)

    def build_wheel(
        self,
        wheel_directory: str | os.PathLike[str],
        config_settings: Any = None,
        metadata_directory: str | os.PathLike[str] | None = None,
    ) -> str:
        name = super().build_wheel(wheel_directory, config_settings, metadata_directory)
        # As after `setup_ops.py install`: whatever runs in the source tree finds its folder first.
        unpack_compiled(Path(wheel_directory) / name, ROOT)
        return name


def _no_requirements(config_settings: Any = None) -> list[str]:
    return []


def _requirements(config_settings: Any = None) -> list[str]:
    """Ninja where there is none; an environment without Paddle is refused before the build."""
    sys.path.extend(p for p in surrounding_paths() if p not in sys.path)
    try:
        require_paddle("pip")  # not of this Python: it may be of a build environment
    except ToolchainError as error:
        sys.exit(
            f"error: {error}\nWhere a Paddle is installed and yet not seen (build environments of "
            "uv or `python -m build`, PYTHONPATH), build with --no-build-isolation."
        )
    return [] if find_ninja() else [NINJA]


_backend = _Backend()
build_wheel = _backend.build_wheel
build_sdist = _backend.build_sdist
build_editable = _backend.build_editable
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable
get_requires_for_build_wheel = _requirements
get_requires_for_build_editable = _requirements
get_requires_for_build_sdist = _no_requirements

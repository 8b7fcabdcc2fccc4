"""PEP 517 backend: setuptools, building against the Paddle of the environment that pip serves.

pip builds in an isolated environment that hides the packages of the one it installs into. The
operators must be built against exactly the Paddle there, so this backend makes that environment's
packages importable again (after the isolated ones), and asks for a Paddle of its own only when that
environment has none; the wheel then depends on that version.
"""

from __future__ import annotations

import importlib.util
import site
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import build_meta

SETUP_SCRIPT = "setup_ops.py"
_OLDEST_PADDLE = "paddlepaddle>=2.6.2"


def surrounding_paths() -> list[str]:
    """Package folders of the environment whose Python runs this build."""
    paths = [sysconfig.get_paths()[kind] for kind in ("purelib", "platlib")]
    paths += site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # a virtual environment does not see the user's packages
        paths.append(site.getusersitepackages())
    return list(dict.fromkeys(paths))


def borrowed_paddle() -> str | None:
    """Requirement on the Paddle that was installed for this build only, or None.

    None means that the surrounding environment has its own, so the package must not ask for one:
    `paddlepaddle` and `paddlepaddle-gpu` are different distributions of the same module.
    """
    spec = importlib.util.find_spec("paddle")
    if spec is None or spec.origin is None:
        return None
    if any(Path(path) in Path(spec.origin).parents for path in surrounding_paths()):
        return None
    import paddle

    return f"paddlepaddle=={paddle.__version__}"


class _Backend(build_meta._BuildMetaBackend):
    def run_setup(self, setup_script: str = SETUP_SCRIPT) -> None:
        sys.path.extend(p for p in surrounding_paths() if p not in sys.path)
        super().run_setup(SETUP_SCRIPT)


def _requirements(config_settings: Any = None) -> list[str]:
    sys.path.extend(p for p in surrounding_paths() if p not in sys.path)
    return [] if importlib.util.find_spec("paddle") else [_OLDEST_PADDLE]


def _no_requirements(config_settings: Any = None) -> list[str]:
    return []


_backend = _Backend()
build_wheel = _backend.build_wheel
build_sdist = _backend.build_sdist
build_editable = _backend.build_editable
prepare_metadata_for_build_wheel = _backend.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _backend.prepare_metadata_for_build_editable
get_requires_for_build_wheel = _requirements
get_requires_for_build_editable = _requirements
get_requires_for_build_sdist = _no_requirements

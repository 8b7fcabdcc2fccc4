"""Build and install fastattn: ``python setup_ops.py install`` (or ``pip install .``).

The work is done by custom_ops/builder; docs/install.md tells the options.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEPENDENCIES = ["numpy>=1.21", "ml_dtypes>=0.4", "rich>=12"]
OLDEST_SETUPTOOLS = (77, 0)  # as in pyproject.toml


def main() -> None:
    """Run setuptools; where it is missing or too old, let pip bring it."""
    try:
        import setuptools

        recent = tuple(map(int, setuptools.__version__.split(".")[:2])) >= OLDEST_SETUPTOOLS
    except ImportError:
        recent = False
    if not recent and sys.argv[1:] == ["install"]:
        print("setuptools is missing or old here: `pip install .` does the same", flush=True)
        sys.exit(subprocess.call([sys.executable, "-m", "pip", "install", "-v", str(ROOT)]))
    if not recent:
        sys.exit("setup_ops.py needs setuptools 77 or newer: `pip install -U setuptools`")

    sys.path.insert(0, str(ROOT / "custom_ops"))
    from builder import extension

    backend = sys.modules.get("builder.backend")  # present when pip builds
    borrowed = backend.borrowed_paddle() if backend else None
    verbose = {"-v", "--verbose"} & set(sys.argv)
    setuptools.setup(
        # The build prints its own progress; setuptools would add a line for every file copied.
        script_args=sys.argv[1:] if verbose else ["--quiet", *sys.argv[1:]],
        distclass=extension.BinaryDistribution,
        ext_modules=extension.extensions(),
        cmdclass={
            "build_ext": extension.build_command(),
            "build_py": extension.BuildPy,
            "egg_info": extension.EggInfo,
            "install": extension.Install,
        },
        install_requires=DEPENDENCIES + ([borrowed] if borrowed else []),
    )


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Make a wheel for several Pythons: scripts/join_wheel.py WHEEL FOLDER... --out DIR.

WHEEL is for one Python. Its library, `_fastattn_ops.so`, has nothing of Python in it. The modules
`_host` and `_direct` fit one version of Python each. A FOLDER has the modules of another Python, as
`setup_ops.py build_ext --modules --build-lib FOLDER` leaves them. scripts/build_wheels.sh calls
this.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import re
import sys
import zipfile
from pathlib import Path

_MODULE = re.compile(r"fastattn/_(host|direct)\.cpython-(\d+)-[\w-]+\.so")


class JoinError(RuntimeError):
    """The wheel and the modules do not belong together."""


def pythons(names: list[str]) -> list[str]:
    """Tags of the Pythons that have both modules, such as ["cp39", "cp310"]."""
    found: dict[str, set[str]] = {}
    for name in names:
        match = _MODULE.fullmatch(name)
        if match is not None:
            found.setdefault(match[2], set()).add(match[1])
    for version, modules in found.items():
        if modules != {"host", "direct"}:
            raise JoinError(f"cp{version} has only _{', _'.join(modules)}")
    return [f"cp{version}" for version in sorted(found, key=lambda v: (int(v[0]), int(v[1:])))]


def record(contents: dict[str, bytes], name: str) -> bytes:
    """Text of the file RECORD, whose path is `name`."""
    lines = []
    for path, data in contents.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(data)}\n")
    return "".join([*lines, f"{name},,\n"]).encode()


def join(wheel: Path, folders: list[Path], out: Path) -> Path:
    """Write the joined wheel into `out`; return its path."""
    name, version, _, _, platform = wheel.name[: -len(".whl")].split("-")
    with zipfile.ZipFile(wheel) as archive:
        infos = {info.filename: info for info in archive.infolist()}
        contents = {path: archive.read(path) for path in infos if not path.endswith("/")}
    modes = {path: infos[path].external_attr for path in contents}
    library = next((p for p in contents if p.endswith("_fastattn_ops.so")), "")
    for folder in folders:
        for path in sorted(folder.glob("fastattn/_*.so")):
            inside = path.relative_to(folder).as_posix()
            if _MODULE.fullmatch(inside) is None or inside in contents:
                raise JoinError(f"{path}: expected a module of another Python than the wheel's")
            contents[inside], modes[inside] = path.read_bytes(), modes.get(library, 0o755 << 16)
    tags = pythons(list(contents))
    if not tags:
        raise JoinError(f"{wheel.name}: it has no modules, so it was built without Python.h")
    info = f"{name}-{version}.dist-info"
    text = contents[f"{info}/WHEEL"].decode()
    text = re.sub(r"^Tag: .*\n", "", text, flags=re.M)
    text = text.rstrip("\n") + "\n" + "".join(f"Tag: {tag}-none-{platform}\n" for tag in tags)
    contents[f"{info}/WHEEL"] = text.encode()
    del contents[f"{info}/RECORD"]
    contents[f"{info}/RECORD"] = record(contents, f"{info}/RECORD")
    target = out / f"{name}-{version}-{'.'.join(tags)}-none-{platform}.whl"
    out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in contents.items():
            entry = zipfile.ZipInfo(path, infos[f"{info}/WHEEL"].date_time)
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, modes[path]
            archive.writestr(entry, data)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folders", type=Path, nargs="*", metavar="FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        print(join(arguments.wheel, arguments.folders, arguments.out))
    except JoinError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

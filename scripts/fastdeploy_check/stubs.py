"""Stand-ins for packages that FastDeploy imports and that are not installed."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from pathlib import Path
from typing import Any

#: FastDeploy's package of compiled operators.
OPS = "fastdeploy.model_executor.ops.gpu"

#: Packages that FastDeploy tries to import and does not need.
ABSENT = {"torch", "use_triton_in_paddle", "deep_gemm", "flash_attn", "flashinfer"}


class _StubType(type):
    """Class of stand-in classes: any attribute, index, call or operator gives another stand-in."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return make_stub(f"{cls.__module__}.{cls.__name__}.{name}")

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __setitem__(cls, key: Any, value: Any) -> None:
        return None

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Any:
        return iter(())


class Stub(metaclass=_StubType):
    """Base of stand-ins. A call with one function returns that function, like a decorator."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is not Stub and Stub not in cls.__bases__:
            return super().__new__(cls)  # a class of FastDeploy that derives from a stand-in
        if len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type)):
            return args[0]
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for name, value in kwargs.items():
            self.__dict__[name] = value

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return make_stub(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], (types.FunctionType, type)):
            return args[0]
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        return None

    def __iter__(self) -> Any:
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: Any) -> None:
        return None

    def __or__(self, other: Any) -> Any:
        return self

    __ror__ = __or__


def make_stub(name: str) -> Any:
    """A new stand-in class."""
    return _StubType(name.rpartition(".")[2], (Stub,), {"__module__": "stub"})


class _StubModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = OWN.get(f"{self.__name__}.{name}")
        if value is None:
            value = make_stub(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value


class PretrainedConfig:
    """The part of PaddleFormers' class that FastDeploy's configuration uses: config.json."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    @classmethod
    def get_config_dict(cls, path: str, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return json.loads((Path(path) / "config.json").read_text(encoding="utf-8")), {}

    @classmethod
    def from_dict(cls, fields: dict[str, Any], **_: Any) -> PretrainedConfig:
        return cls(**fields)

    @classmethod
    def from_pretrained(cls, path: str, **_: Any) -> PretrainedConfig:
        return cls(**cls.get_config_dict(path)[0])

    def get(self, name: str, default: Any = None) -> Any:
        return self.__dict__.get(name, default)


#: Names whose stand-ins need behaviour.
OWN: dict[str, Any] = {
    "paddleformers.transformers.configuration_utils.PretrainedConfig": PretrainedConfig,
    "paddleformers.transformers.PretrainedConfig": PretrainedConfig,
}


class StubFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Last on ``sys.meta_path``: finds modules that no other finder has, but not FastDeploy's."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        root = fullname.partition(".")[0]
        if fullname.startswith(OPS):  # compiled packages in FastDeploy's package
            root = OPS
        if root in ABSENT or root in sys.stdlib_module_names or root in ("fastdeploy", "paddle"):
            return None
        if root not in self.found and not _asked_by_fastdeploy():
            return None
        self.found.add(root)
        spec = importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        spec.submodule_search_locations = [f"<stand-in for {fullname}>"]
        return spec

    def create_module(self, spec: Any) -> types.ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def _asked_by_fastdeploy() -> bool:
    """Whether the running import statement is in a file of FastDeploy."""
    frame = sys._getframe(2)
    while frame is not None and "importlib" in frame.f_code.co_filename:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None and str(frame.f_globals.get("__name__", "")).startswith("fastdeploy")

"""Imports single files of a large package, with stubs for everything else that they import.

A module whose file was extracted is loaded from the file; packages are empty; any other module of the package returns a
Stub for every attribute, which is false and callable, and returns itself. Attributes that the files really need are
given by name.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

Given = dict[str, dict[str, Any]]
"""The attributes that are given by name, for each module name."""


class Stub:
    """Replaces an object of a module that was not extracted."""

    def __bool__(self) -> bool:
        return False

    def __call__(self, *args: Any, **kwargs: Any) -> Stub:
        return self

    def __getattr__(self, name: str) -> Stub:
        if name.startswith("__"):
            raise AttributeError(name)
        return self


class _StubModule(ModuleType):
    """A module with a Stub for every attribute."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Stub()


class _StubLoader(Loader):
    """Creates stub modules with the given attributes."""

    def __init__(self, given: dict[str, Any]) -> None:
        self._given = given

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(self._given)


class StubFinder(MetaPathFinder):
    """Finds the modules of `package` under `root`, and makes stubs of its other modules."""

    def __init__(self, package: str, root: Path, given: Given) -> None:
        self._package, self._root, self._given = package, root, given

    def install(self) -> None:
        """Activates the finder; an installed package of this name is hidden from now on."""
        for name in [name for name in sys.modules if name.split(".")[0] == self._package]:
            del sys.modules[name]
        sys.meta_path.insert(0, self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] != self._package:
            return None
        place = self._root.joinpath(*fullname.split("."))
        file = place.with_suffix(".py")
        if file.is_file() and fullname not in self._given:
            return spec_from_file_location(fullname, file, loader=SourceFileLoader(fullname, str(file)))
        spec = ModuleSpec(fullname, _StubLoader(self._given.get(fullname, {})), is_package=True)
        spec.submodule_search_locations = [str(place)]
        return spec

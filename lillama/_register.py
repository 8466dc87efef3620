"""Registers the checkpoint format with transformers when, and only when, transformers is imported.

transformers has no entry point that would import us, and importing it here would cost every
`lillama --help` several seconds. So we wait for its quantizer registry to be imported. (wrapt's post-import hooks do
nearly this; they import asyncio, half as much again as all of `import lillama`, and forget a hook that failed, so that
the next import of transformers would not know the format.)
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

REGISTRY = "transformers.quantizers.auto"


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds REGISTRY as everybody else would and imports the modules `then` right after it is loaded."""

    def __init__(self) -> None:
        self.then: list[str] = []

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != REGISTRY:
            return None
        for finder in sys.meta_path:
            # A finder of before Python 3.4 has no find_spec; the import system passes it over too.
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find(name, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    """Runs the module's own loader, steps aside, and imports what waited."""

    def __init__(self, loader: importlib.abc.Loader, finder: _AfterImport) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        for then in self.finder.then:
            importlib.import_module(then)
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)


def when_transformers_quantizers_load(then: str) -> None:
    """Import the module `then` now if transformers' quantizers are loaded, else right after they are.

    At that moment `transformers.quantizers` itself is still half loaded: `then` must import from its
    submodules (`.auto`, `.base`).
    """
    if REGISTRY in sys.modules:
        importlib.import_module(then)
        return
    finder = next((finder for finder in sys.meta_path if isinstance(finder, _AfterImport)), None)
    if finder is None:
        finder = _AfterImport()
        sys.meta_path.insert(0, finder)
    if then not in finder.then:
        finder.then.append(then)

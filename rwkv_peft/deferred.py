"""Importing peft without transformers, of which this program uses next to nothing.

peft takes some thirty names from it at its import, nearly all of them to ask whether a
model is one of that library: three quarters of the time to a run's first step would go by with
importing it. While the command line imports peft, each of these names is a stand-in, which becomes
what it stands for when it is first used: it imports transformers then. Asked whether something is
an instance of it, it says no as long as nobody has imported transformers.
"""

import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

LIBRARY, DEFERRED = "peft", "transformers"
_MISSING = (f"{DEFERRED}.distributed",)
# what an import may raise where a stand-in does not do
_FAILURES = (AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)


@contextmanager
def defer_transformers() -> Iterator[None]:
    """Has peft, if it is imported inside, import names of transformers when they are used."""
    finder = _Finder()
    is_wanted = not {LIBRARY, DEFERRED} & sys.modules.keys()
    if is_wanted:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if is_wanted:
            sys.meta_path.remove(finder)


class _Finder(MetaPathFinder, Loader):
    """Finds peft as it is, and gives stand-ins for transformers while peft is imported."""

    def __init__(self) -> None:
        self._loader: Loader | None = None
        self.is_importing = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name == LIBRARY and DEFERRED not in sys.modules:
            spec = PathFinder.find_spec(name, path)
            if spec is not None:
                self._loader, spec.loader = spec.loader, self
            return spec
        # without its tensor parallelism, which no model here has, peft asks for less of it later
        if self.is_importing and name.split(".")[0] == DEFERRED and name not in _MISSING:
            return ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None if spec.name == LIBRARY else _StandInModule(spec.name, self)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ != LIBRARY:
            return
        assert self._loader is not None
        try:
            self.is_importing = True
            try:
                self._loader.exec_module(module)
            finally:
                self.stop()
            # peft looks into it, and has transformers import it
            if importlib.import_module("torch.distributed").is_available():
                importlib.import_module("torch.distributed.tensor")
        except _FAILURES:
            # another version of peft may use more of it than stand-ins give
            for name in [n for n in sys.modules if n.startswith(f"{LIBRARY}.")]:
                del sys.modules[name]
            self._loader.exec_module(module)

    def stop(self) -> None:
        """Who imports transformers from now on gets it."""
        self.is_importing = False
        for name in [n for n, m in sys.modules.items() if isinstance(m, _StandInModule)]:
            del sys.modules[name]


class _StandInModule(ModuleType):
    """A module of transformers, of which every name is a stand-in."""

    def __init__(self, name: str, finder: _Finder) -> None:
        super().__init__(name)
        self._finder = finder

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return metadata.version(DEFERRED)
        if name.startswith("__"):
            raise AttributeError(name)
        return _StandIn(self.__name__, name, self._finder)


class _StandIn:
    """A name of transformers, which is imported when the name is used."""

    def __init__(self, module: str, name: str, finder: _Finder) -> None:
        self._module, self._name, self._finder = module, name, finder

    def _resolve(self) -> Any:
        self._finder.stop()
        return getattr(importlib.import_module(self._module), self._name)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        # a class of peft's that only adds to it what concerns a hub
        return ()

    def __instancecheck__(self, instance: object) -> bool:
        return DEFERRED in sys.modules and isinstance(instance, self._resolve())

    def __subclasscheck__(self, cls: type) -> bool:
        return DEFERRED in sys.modules and issubclass(cls, self._resolve())

    def __or__(self, other: Any) -> Any:
        # in the type of an argument
        return Any

    __ror__ = __or__

    def __getattr__(self, name: str) -> Any:
        # while it is imported, peft asks how one model of transformers keeps its cache
        if name.startswith("__") or (name.startswith("_") and self._finder.is_importing):
            raise AttributeError(name)
        return getattr(self._resolve(), name)

    def __call__(self, *args: Any, **given: Any) -> Any:
        return self._resolve()(*args, **given)

    def __getitem__(self, key: Any) -> Any:
        return self._resolve()[key]

    def __contains__(self, key: Any) -> bool:
        return key in self._resolve()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._resolve())

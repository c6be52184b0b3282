"""A module that is imported when something of it is used, and not when an import statement names it.

The standard library's LazyLoader is not enough: an import statement itself looks at the module's ``__spec__``, and that
counts as using it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from typing import Any


class _LateModule(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        """Called for what is not there yet: import the module, and be as it is from now on."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        found = importlib.import_module(self.__name__)
        self.__class__ = types.ModuleType  # type: ignore[assignment]
        self.__dict__.update(vars(found))
        return getattr(found, name)


def import_late(name: str) -> None:
    """Let import statements of a module, in whatever module, cost nothing until something of it is used."""
    spec = importlib.util.find_spec(name) if name not in sys.modules else None
    if spec is not None:
        module = _LateModule(name)
        module.__spec__, module.__path__ = spec, spec.submodule_search_locations  # type: ignore[assignment]
        sys.modules[name] = module

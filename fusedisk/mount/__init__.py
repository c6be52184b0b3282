"""The FUSE face: the only package that imports pyfuse3, and only in the modules that a daemon loads.

``fusedisk.mount`` is a function of the library, too. Importing this package hides that function behind the package, so
the package can be called in its place.
"""

from __future__ import annotations

import sys
import types
from typing import Any


class _CallablePackage(types.ModuleType):
    def __call__(self, *args: Any, **options: Any) -> Any:
        """See :func:`fusedisk.mounts.mount`."""
        from fusedisk.mounts import mount

        return mount(*args, **options)


sys.modules[__name__].__class__ = _CallablePackage

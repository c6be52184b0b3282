"""Virtual disk images, read and written as flat disks.

>>> async with fusedisk.open("vm.qcow2") as disk:      # in a trio task
...     head = await disk.read(0, 512)
>>> with fusedisk.open_sync("vm.qcow2") as disk:       # anywhere else
...     head = disk.read(0, 512)

Everything here is imported when it is first used. See :mod:`fusedisk.api` and ``docs/python-api.md``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusedisk.api import Disk, amend, create, open
    from fusedisk.block.extent import BlockStatus
    from fusedisk.block.mapping import MapEntry
    from fusedisk.block.snapshot import SnapshotInfo
    from fusedisk.core import errors
    from fusedisk.core.errors import FusediskError
    from fusedisk.sync import DiskFile, SyncDisk, amend_sync, create_sync, open_sync

__version__ = "0.1.0"

_PLACES = {
    "BlockStatus": "fusedisk.block.extent",
    "Disk": "fusedisk.api",
    "DiskFile": "fusedisk.sync",
    "FusediskError": "fusedisk.core.errors",
    "MapEntry": "fusedisk.block.mapping",
    "SnapshotInfo": "fusedisk.block.snapshot",
    "SyncDisk": "fusedisk.sync",
    "amend": "fusedisk.api",
    "amend_sync": "fusedisk.sync",
    "create": "fusedisk.api",
    "create_sync": "fusedisk.sync",
    "open": "fusedisk.api",
    "open_sync": "fusedisk.sync",
}

__all__ = [
    "BlockStatus",
    "Disk",
    "DiskFile",
    "FusediskError",
    "MapEntry",
    "SnapshotInfo",
    "SyncDisk",
    "__version__",
    "amend",
    "amend_sync",
    "create",
    "create_sync",
    "errors",
    "open",
    "open_sync",
]


def __getattr__(name: str) -> Any:
    if name == "errors":
        value = importlib.import_module("fusedisk.core.errors")
    elif name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
    else:
        raise AttributeError(f"module 'fusedisk' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))

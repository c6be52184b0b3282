"""Virtual disk images, read and written as flat disks.

>>> async with fusedisk.open("vm.qcow2") as disk:      # in a trio task
...     head = await disk.read(0, 512)
>>> with fusedisk.open_sync("vm.qcow2") as disk:       # anywhere else
...     head = disk.read(0, 512)

Everything here is imported when it is first used. See :mod:`fusedisk.api` and ``docs/reference/python-api.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusedisk import errors
    from fusedisk.api import Disk, amend, create, open
    from fusedisk.block.image.mapping import MapEntry
    from fusedisk.block.image.measure import Measurement
    from fusedisk.block.model.check_result import CheckResult
    from fusedisk.block.model.extent import BlockStatus
    from fusedisk.block.model.snapshot_info import SnapshotInfo
    from fusedisk.core.errors import FusediskError
    from fusedisk.images import check, map, measure, resize
    from fusedisk.mounts import Attachment, Mount, MountedFile, attach, detach, list, mount, umount
    from fusedisk.sync import (
        DiskFile,
        SyncDisk,
        amend_sync,
        attach_sync,
        check_sync,
        create_sync,
        detach_sync,
        list_sync,
        map_sync,
        measure_sync,
        mount_sync,
        open_sync,
        resize_sync,
        umount_sync,
    )

__version__ = "0.1.0"

_MODULES = {
    "fusedisk.api": ("Disk", "amend", "create", "open"),
    "fusedisk.block.model.check_result": ("CheckResult",),
    "fusedisk.block.model.extent": ("BlockStatus",),
    "fusedisk.block.image.mapping": ("MapEntry",),
    "fusedisk.block.image.measure": ("Measurement",),
    "fusedisk.block.request.snapshot": ("SnapshotInfo",),
    "fusedisk.core.errors": ("FusediskError",),
    "fusedisk.images": ("check", "map", "measure", "resize"),
    "fusedisk.mounts": ("Attachment", "Mount", "MountedFile", "attach", "detach", "list", "mount", "umount"),
    "fusedisk.sync": (
        *("DiskFile", "SyncDisk", "amend_sync", "attach_sync", "check_sync", "create_sync", "detach_sync"),
        *("list_sync", "map_sync", "measure_sync", "mount_sync", "open_sync", "resize_sync", "umount_sync"),
    ),
}
"""Where each name comes from."""

__all__ = [
    "Attachment",
    "BlockStatus",
    "CheckResult",
    "Disk",
    "DiskFile",
    "FusediskError",
    "MapEntry",
    "Measurement",
    "Mount",
    "MountedFile",
    "SnapshotInfo",
    "SyncDisk",
    "__version__",
    "amend",
    "amend_sync",
    "attach",
    "attach_sync",
    "check",
    "check_sync",
    "create",
    "create_sync",
    "detach",
    "detach_sync",
    "errors",
    "list",
    "list_sync",
    "map",
    "map_sync",
    "measure",
    "measure_sync",
    "mount",
    "mount_sync",
    "open",
    "open_sync",
    "resize",
    "resize_sync",
    "umount",
    "umount_sync",
]

if not TYPE_CHECKING:  # a type checker knows the names above, and no others

    def __getattr__(name):
        import importlib

        if name == "errors":
            return importlib.import_module("fusedisk.errors")
        for module, names in _MODULES.items():
            if name in names:
                value = globals()[name] = getattr(importlib.import_module(module), name)
                return value
        raise AttributeError(f"module 'fusedisk' has no attribute '{name}'")

    def __dir__():
        return sorted({*globals(), *__all__})

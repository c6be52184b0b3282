"""The one table of drivers. A new driver is one line here; ``raw`` comes last, it takes whatever nobody else knows."""

from __future__ import annotations

from fusedisk.block.graph.registry import Registry

DRIVERS = Registry(
    {
        "qcow2": "fusedisk.drivers.format.qcow2.driver:Qcow2Driver",
        "raw": "fusedisk.drivers.format.raw:RawDriver",
        "file": "fusedisk.drivers.protocol.file:FileDriver",
        "host_device": "fusedisk.drivers.protocol.host_device:HostDeviceDriver",
        "null-co": "fusedisk.drivers.protocol.null_co:NullDriver",
        "copy-on-read": "fusedisk.drivers.filter.copy_on_read:CopyOnReadDriver",
        "blkdebug": "fusedisk.drivers.filter.blkdebug:BlkdebugDriver",
        "blklogwrites": "fusedisk.drivers.filter.blklogwrites:BlklogwritesDriver",
    },
    prefixes={"file": "file", "host_device": "host_device", "null-co": "null-co", "blkdebug": "blkdebug"},
    probed=("qcow2", "raw"),
)

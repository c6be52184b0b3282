"""Drivers for tests of the engine: the ones of the tests' own, and the smallest real ones."""

from __future__ import annotations

from fusedisk.block.graph.registry import Registry
from fusedisk.drivers.table import DRIVERS

TEST_DRIVERS = Registry(
    {
        "toy": "tests.support.toy:ToyDriver",
        "qcow2": "fusedisk.drivers.format.qcow2.driver:Qcow2Driver",
        "raw": "fusedisk.drivers.format.raw:RawDriver",
        "memory": "tests.support.memory:MemoryDriver",
        "file": "fusedisk.drivers.protocol.file:FileDriver",
        "blkdebug": "fusedisk.drivers.filter.blkdebug:BlkdebugDriver",
        "copy-on-read": "fusedisk.drivers.filter.copy_on_read:CopyOnReadDriver",
    },
    prefixes={"memory": "memory", "file": "file"},
    probed=("toy", "raw"),
)


FORMAT_DRIVERS = Registry(
    {**DRIVERS._table, "tiny": "tests.support.tiny:TinyDriver"}, DRIVERS.prefixes, ("tiny", *DRIVERS._probed)
)
"""All real drivers and the small dynamic format of the tests."""

PROFILE_DRIVERS = Registry(
    {
        **FORMAT_DRIVERS._table,
        "jitter": "tests.support.jitter:JitterDriver",
        "memory": "tests.support.memory:MemoryDriver",
    },
    {**DRIVERS.prefixes, "memory": "memory"},
    FORMAT_DRIVERS._probed,
)
"""The same, with the filter and the storage of the long tests."""

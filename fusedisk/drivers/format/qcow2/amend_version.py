"""From version 2 of the format to version 3, and back."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING

from fusedisk.core.errors import NotSupportedError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.amend_header import put_header
from fusedisk.drivers.format.qcow2.amend_options import Qcow2AmendOptions
from fusedisk.drivers.format.qcow2.amend_switch import changing
from fusedisk.drivers.format.qcow2.amend_zeroes import expand_zero_clusters
from fusedisk.drivers.format.qcow2.snapshot_switch import State, Switch
from fusedisk.drivers.format.qcow2.snapshot_table import encode_snapshots

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

_SMALL_CLUSTER = 4096
"""In clusters up to this size the room is left for the backing file's name, as in new images."""


async def upgrade(driver: Qcow2Driver, progress: Progress) -> None:
    """Make an image of version 2 one of version 3; only the header, and the snapshot table if that lacks what version
    3 asks for, changes."""
    image, old = driver.image, driver.image.header
    async with changing(driver):
        progress(0, 1)
        table = encode_snapshots(driver.snapshots, image.filename)
        if len(table) != image.snapshot_table_size:
            await _move_snapshot_table(driver, table)
        kept = _without_feature_names(old)
        names = [layout.feature_name_table()] if old.cluster_size > _SMALL_CLUSTER else []
        header = dataclasses.replace(
            old,
            version=3,
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            extra=bytes(layout.V3_HEADER_LENGTH - layout.V3_MIN_HEADER_LENGTH),
            extensions=[*kept, *names],
        )
        await put_header(image, header)


async def _move_snapshot_table(driver: Qcow2Driver, table: bytes) -> None:
    """Write the snapshot table anew; entries say how long the disk is then."""
    image, header = driver.image, driver.image.header
    switch = Switch(image, driver.refcounts)
    try:
        offset = await switch.new_table(table)
        switch.lose_table(header.snapshots_offset, image.snapshot_table_size)
        state = State(header.size, image.l1[:], header.l1_table_offset, header.nb_snapshots, offset)
        await switch.commit(state, contextlib.nullcontext, discard=False)
    except BaseException:
        switch.undo()
        raise
    image.snapshot_table_size = len(table)


def check_downgrade(driver: Qcow2Driver, options: Qcow2AmendOptions) -> None:
    """Raise NotSupportedError for what version 2 cannot hold, once everything else in ``options`` is done."""
    header, filename = driver.image.header, driver.image.filename
    bits = driver.image.geometry.refcount_bits if options.refcount_bits is None else options.refcount_bits
    size = header.size if options.size is None else options.size
    otherwise = [shot for shot in driver.snapshots if shot.disk_size != size or shot.vm_state_size >> 32]
    for wrong, reason in (
        (bits != 16, f"has refcounts of {bits} bits, and there they have 16: add refcount_bits=16"),
        (header.has_data_file, "has an external data file"),
        (driver.image.geometry.extended_l2, "has extended L2 entries"),
        (bool(header.compression_type), f"compresses with {layout.COMPRESSION_NAMES[header.compression_type]}"),
        (
            any(kind == layout.EXTENSION_BITMAPS for kind, _ in header.extensions),
            "has persistent bitmaps: remove them first",
        ),
        (bool(options.lazy_refcounts or driver.options.lazy_refcounts), "was asked to have lazy refcounts"),
        (driver.options.discard_no_unref, "was opened with discard-no-unref"),
        (bool(otherwise), f"has {len(otherwise)} snapshots of another disk size, or with more than 4 GiB of VM state"),
    ):
        if wrong:
            raise NotSupportedError(f"'{filename}' cannot become version 2 (compat=0.10), because it {reason}.")


async def downgrade(driver: Qcow2Driver, progress: Progress) -> None:
    """Make an image of version 3, which :func:`check_downgrade` has let through, one of version 2."""
    if driver.image.header.backing_file:
        await driver.require_key()
    image = driver.image
    async with changing(driver):
        await expand_zero_clusters(driver, progress)
        header = dataclasses.replace(
            image.header,
            version=2,
            incompatible_features=0,
            compatible_features=0,
            autoclear_features=0,
            refcount_order=4,
            extra=b"",
            extensions=_without_feature_names(image.header),
        )
        await put_header(image, header)


def _without_feature_names(header: layout.Header) -> list[layout.Extension]:
    return [extension for extension in header.extensions if extension.type != layout.EXTENSION_FEATURE_NAMES]

"""Making new images.

A minimal image (header, refcount table, one refcount block) is written first; everything else is what an open
image does when it grows.
"""

from __future__ import annotations

import os

from fusedisk.block.model.children import Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.files import Files
from fusedisk.block.model.node import Node
from fusedisk.block.request import io, space
from fusedisk.core.errors import OptionError
from fusedisk.drivers.format.qcow2 import layout, resize
from fusedisk.drivers.format.qcow2.commit import Committer
from fusedisk.drivers.format.qcow2.image import Image
from fusedisk.drivers.format.qcow2.layout import EXTENSION_BACKING_FORMAT, Extension, Header
from fusedisk.drivers.format.qcow2.options import Qcow2CreateOptions
from fusedisk.drivers.format.qcow2.refcount import Refcounts
from fusedisk.drivers.format.qcow2.refcount_block import refcount_codec
from fusedisk.drivers.format.qcow2.subcluster_allocation import cluster_map, new_allocator

_FIRST_CLUSTERS = 3
"""Header, refcount table, refcount block."""


def new_header(options: Qcow2CreateOptions) -> Header:
    """The header that the options ask for, of size 0 and without tables. Raises OptionError."""
    version = 2 if options.compat in ("0.10", "v2") else 3
    size, bits = options.cluster_size, options.refcount_bits
    if size & (size - 1) or not 512 <= size <= 2 << 20:
        raise OptionError(f"qcow2 cluster_size is {size}, expected a power of two from 512 to 2097152.")
    if bits not in (1, 2, 4, 8, 16, 32, 64):
        raise OptionError(f"qcow2 refcount_bits is {bits}, expected 1, 2, 4, 8, 16, 32 or 64.")
    if version == 2:
        _check_version_2(options)
    if options.backing_fmt and not options.backing_file:
        raise OptionError("qcow2 backing_fmt is set, but there is no backing_file.")
    if options.extended_l2 and size < layout.MIN_EXTENDED_L2_CLUSTER:
        raise OptionError(
            f"qcow2 cluster_size is {size}, expected at least {layout.MIN_EXTENDED_L2_CLUSTER} with extended_l2."
        )
    if options.data_file_raw and not options.data_file:
        raise OptionError("qcow2 data_file_raw is set, but there is no data_file.")
    if options.data_file_raw and options.backing_file:
        raise OptionError("qcow2 backing_file and data_file_raw are both set, but a raw file cannot show through.")
    if options.backing_file and options.preallocation != "off" and not options.extended_l2:
        raise OptionError(
            f"qcow2 preallocation is '{options.preallocation}', expected 'off' with a backing file, "
            "which it would hide; with extended_l2 it would not."
        )
    header = Header(version=version, cluster_bits=size.bit_length() - 1, backing_file=options.backing_file or "")
    if len(header.backing_file.encode("utf-8", "surrogateescape")) > layout.MAX_BACKING_NAME:
        raise OptionError(
            f"qcow2 backing_file is longer than the {layout.MAX_BACKING_NAME} bytes that the header has room for."
        )
    if options.backing_fmt:
        header.extensions.append(Extension(EXTENSION_BACKING_FORMAT, options.backing_fmt.encode()))
    if options.data_file:
        header.incompatible_features |= layout.EXTERNAL_DATA
        header.autoclear_features = layout.RAW_EXTERNAL_DATA if options.data_file_raw else 0
        header.extensions.append(Extension(layout.EXTENSION_DATA_FILE, os.fsencode(options.data_file)))
    if version == 3:
        zstd = options.compression_type == "zstd"
        header.refcount_order = bits.bit_length() - 1
        header.incompatible_features |= layout.COMPRESSION_TYPE if zstd else 0
        header.incompatible_features |= layout.EXTENDED_L2 if options.extended_l2 else 0
        header.compatible_features = layout.LAZY_REFCOUNTS if options.lazy_refcounts else 0
        header.extra = bytes([zstd, 0, 0, 0, 0, 0, 0, 0])
        if size > layout.SMALL_CLUSTER:
            header.extensions.append(layout.feature_name_table())
    return header


def _check_version_2(options: Qcow2CreateOptions) -> None:
    for name, wrong in (
        ("lazy_refcounts", options.lazy_refcounts),
        ("refcount_bits", options.refcount_bits != 16),
        ("compression_type", options.compression_type != "zlib"),
        ("extended_l2", options.extended_l2),
        ("data_file", options.data_file is not None),
    ):
        if wrong:
            raise OptionError(f"qcow2 {name} is '{getattr(options, name)}', which needs compat=1.1 (version 3).")


async def check(options: Qcow2CreateOptions, filename: str) -> None:
    """Raise what :func:`create` would raise because of the options."""
    header = new_header(options)
    resize.check_l1(filename, header, _length(options))
    if _encrypts(options):
        from fusedisk.drivers.format.qcow2.encryption import check_new

        await check_new(options)


def _length(options: Qcow2CreateOptions) -> int:
    return -(-options.size // layout.SECTOR) * layout.SECTOR


def _encrypts(options: Qcow2CreateOptions) -> bool:
    return any(name.startswith("encrypt.") and value is not None for name, value in options.given().items())


async def create(files: Files, options: Qcow2CreateOptions) -> None:
    """Write an empty image, with its data in a file of its own if the options name one. The size is rounded up to 512
    bytes.

    Raises OptionError for options that do not fit together, ImageError for sizes that the cluster size does
    not allow.
    """
    header = new_header(options)
    length = _length(options)
    file, *others = await files.create(*([options.data_file] if options.data_file else []))
    data_file = others[0] if others else None
    image = await _write_minimal(file, header)
    image.writable = True
    image.barriers = False
    refcounts = Refcounts(image)
    committer = Committer(image, refcounts)
    edge = None
    if data_file is not None:
        edge = image.data_file = Child("data-file", Role.DATA_FILE, None, data_file, f"'{data_file.filename}'")
    allocator = new_allocator(cluster_map(image, edge), refcounts, committer, edge)
    resize.check_size(allocator, length, "off", zero_new=False)
    await refcounts.load()
    if _encrypts(options):
        from fusedisk.drivers.format.qcow2.encryption import encrypt_new

        await encrypt_new(image, refcounts, options)
    await resize.grow_l1(allocator, resize.l1_entries(allocator, length))
    preallocation = options.preallocation
    if data_file is not None:
        await space.truncate(data_file, length)
        if options.data_file_raw and preallocation == "off":
            # A program that reads the raw file also sees the unallocated ranges.
            preallocation = "metadata"
    if preallocation != "off":
        await resize.preallocate(allocator, 0, length, preallocation)
    await resize.set_size(allocator, length)
    await committer.finish()


async def _write_minimal(file: Node, header: Header) -> Image:
    size = header.cluster_size
    header.refcount_table_offset, header.refcount_table_clusters = size, 1
    area = layout.encode_header_area(header, file.filename)
    block = bytearray(size)
    position, ones = refcount_codec(1 << header.refcount_order, size * 8 >> header.refcount_order).encoded(
        block, 0, [1] * _FIRST_CLUSTERS
    )
    block[position : position + len(ones)] = ones
    table = (2 * size).to_bytes(8, "big").ljust(size, b"\0")
    for offset, data in ((2 * size, block), (size, table), (0, area.ljust(size, b"\0"))):
        await io.write(file, offset, (memoryview(data),))
    edge = Child("file", Role.FILE, None, file, f"'{file.filename}'")
    return Image(edge, header, file.filename, fence=lambda reason: None, mapping_changed=lambda: None)

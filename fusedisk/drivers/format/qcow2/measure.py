"""How long the file of a new qcow2 image would be. The sums are QEMU's, so that both tell the same.

Source: docs/interop/qcow2.txt, and what qemu-img measure answers.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from fusedisk.block.graph.backend import Backend
from fusedisk.block.image.measure import Measurement, clusters_with_data, round_up
from fusedisk.core.errors import OptionError
from fusedisk.core.options import option
from fusedisk.core.progress import Progress, no_progress
from fusedisk.crypto.luks_layout import area_size
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.format.qcow2.bitmaps import Bitmap
from fusedisk.drivers.format.qcow2.check.image import open_image
from fusedisk.drivers.format.qcow2.check.walk import bitmap_directory
from fusedisk.drivers.format.qcow2.options import Qcow2CreateOptions

_REFCOUNT_BITS = (1, 2, 4, 8, 16, 32, 64)
_KEY_BYTES = {"128": 16, "192": 24, "256": 32}
_DIRECTORY_ENTRY = 24


@dataclasses.dataclass(slots=True)
class MeasureOptions(Qcow2CreateOptions):
    """The creation options of qcow2, with ciphers of LUKS as QEMU measures them."""

    encrypt_key_secret: str | None = option(None, name="encrypt.key-secret", help="not needed to measure")

    def check(self) -> None:
        """Raises OptionError for values that QEMU refuses, too."""
        size = self.cluster_size
        if size & size - 1 or not 1 << layout.MIN_CLUSTER_BITS <= size <= 1 << layout.MAX_CLUSTER_BITS:
            raise OptionError(f"qcow2 option 'cluster_size' is {size}, expected a power of two from 512 to 2M.")
        if self.extended_l2 and size < 16384:
            raise OptionError(f"qcow2 option 'cluster_size' is {size}, but extended_l2 needs at least 16384.")
        if self.refcount_bits not in _REFCOUNT_BITS:
            wanted = ", ".join(map(str, _REFCOUNT_BITS))
            raise OptionError(f"qcow2 option 'refcount_bits' is {self.refcount_bits}, expected one of {wanted}.")
        if self.version == 2 and self.refcount_bits != 16:
            raise OptionError(f"qcow2 option 'refcount_bits' is {self.refcount_bits}, but version 2 has only 16.")

    @property
    def version(self) -> int:
        """Of the format."""
        return 2 if self.compat in ("0.10", "v2") else 3

    @property
    def entry_size(self) -> int:
        """Bytes in an L2 entry."""
        return 16 if self.extended_l2 else 8

    @property
    def luks_size(self) -> int:
        """Bytes of the LUKS header, in whole clusters."""
        if self.encrypt_format != "luks":
            return 0
        key = _KEY_BYTES[(self.encrypt_cipher_alg or "aes-256").rpartition("-")[2]]
        if self.encrypt_cipher_mode in (None, "xts"):
            key *= 2
        return round_up(area_size(key), self.cluster_size)


class _Source(NamedTuple):
    """The source of the new image."""

    data: int
    """Bytes of the clusters with data."""
    bitmaps: int | None


def measure_size(options: MeasureOptions, size: int) -> Measurement:
    """A new, empty image with a disk of ``size`` bytes. Raises OptionError for options that make no image."""
    return _measure(options, size, _Source(0, None))


async def measure_copy(options: MeasureOptions, backend: Backend, progress: Progress = no_progress) -> Measurement:
    """An image that holds what ``backend`` does; all of it, where it is to have a backing file, since which of it is
    in there is not looked at. Raises OptionError, or whatever reading the disk's metadata raises."""
    options.check()
    size = round_up(backend.length, options.cluster_size)
    if options.backing_file is not None:
        data = size
    else:
        data = await clusters_with_data(backend, options.cluster_size, progress)
    bitmaps = await _bitmaps_size(backend, options.cluster_size) if options.version == 3 else None
    return _measure(options, backend.length, _Source(data, bitmaps))


def _measure(options: MeasureOptions, size: int, source: _Source) -> Measurement:
    options.check()
    cluster = options.cluster_size
    size = round_up(size, cluster)
    tables = -(-size // (cluster // options.entry_size * cluster))
    if tables * 8 > layout.MAX_L1_SIZE:
        raise OptionError(f"a qcow2 disk of {size} bytes is too large for clusters of {cluster} bytes.")
    everything = _full_size(options, size) + options.luks_size
    data = size if options.preallocation in ("falloc", "full") else source.data
    return Measurement(everything - size + data, everything, source.bitmaps)


def _full_size(options: MeasureOptions, size: int) -> int:
    """The file's length once all of the disk was written; whole L1 and L2 tables' clusters are counted."""
    cluster = options.cluster_size
    header = cluster
    l2 = round_up(size // cluster, cluster // options.entry_size) * options.entry_size
    l1 = round_up(l2 // cluster, cluster // 8) * 8
    clusters = (header + l1 + l2 + size) // cluster
    return (clusters + _refcount_clusters(clusters, cluster, options.refcount_bits)) * cluster


def _refcount_clusters(clusters: int, cluster_size: int, refcount_bits: int) -> int:
    """Clusters of refcount table and blocks that count ``clusters`` others and themselves."""
    per_block = cluster_size * 8 // refcount_bits
    found = -1
    blocks = table = 0
    while blocks + table != found:
        found = blocks + table
        blocks = -(-(clusters + found) // per_block)
        table = -(-blocks * 8 // cluster_size)
    return found


# --- bitmaps --------------------------------------------------------------------------------------------


async def _bitmaps_size(backend: Backend, cluster_size: int) -> int | None:
    """Return the size of a disk's persistent bitmaps in clusters of this size; None if its format has none."""
    node = backend.node
    if node.driver.name != "qcow2":
        return None
    image = await open_image(node.children["file"].node)
    if image.header.version < 3:
        return None
    if image.bitmaps is None:
        return 0
    found = [bitmap for bitmap in await bitmap_directory(image, image.bitmaps) if not bitmap.in_use]
    directory = sum(round_up(_DIRECTORY_ENTRY + len(bitmap.name), 8) for bitmap in found)
    tables = (_bitmap_size(bitmap, backend.length, cluster_size) for bitmap in found)
    return round_up(directory, cluster_size) + sum(tables)


def _bitmap_size(bitmap: Bitmap, size: int, cluster_size: int) -> int:
    bits = -(-size // (1 << bitmap.granularity_bits))
    clusters = -(-bits // (8 * cluster_size))
    return clusters * cluster_size + round_up(8 * clusters, cluster_size)

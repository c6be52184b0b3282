"""Walks everything that an image's metadata refers to, counts the references and reports invalid entries.

A table that several L1 entries lead to (snapshots share most of theirs) is read once and counted as often as it is
referred to.
"""

from __future__ import annotations

from array import array
from collections import Counter
from typing import NamedTuple

from fusedisk.block.model.check_result import CheckResult
from fusedisk.core.alone import checkpoint
from fusedisk.core.errors import FusediskError, ImageError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2.bitmaps import (
    TABLE_ENTRY_OFFSET,
    TABLE_ENTRY_ONES,
    TABLE_ENTRY_RESERVED,
    Bitmap,
    InvalidDirectoryError,
    parse_directory,
)
from fusedisk.drivers.format.qcow2.check.image import CheckedImage, Region, l1_of
from fusedisk.drivers.format.qcow2.check.table import TableFindings, TableScanner
from fusedisk.drivers.format.qcow2.counts import (
    REFCOUNT_OFFSET_MASK,
    REFCOUNT_TABLE_RESERVED,
    Counts,
    DiskRefcounts,
)
from fusedisk.drivers.format.qcow2.entries import COPIED, L1_RESERVED, OFFSET_MASK, used_pieces
from fusedisk.drivers.format.qcow2.layout import BitmapDirectory
from fusedisk.drivers.format.qcow2.snapshots.table import SnapshotTable

_TABLES_BETWEEN_CHECKPOINTS = 64


class L1Table(NamedTuple):
    """An L1 table of the image."""

    region: Region
    label: str
    active: bool
    users: int
    """How many of the disk and its snapshots share this table."""


class TableUse:
    """How many L1 entries lead to an L2 table."""

    __slots__ = ("active", "weight")

    def __init__(self) -> None:
        self.weight = 0
        """All of them."""
        self.active = 0
        """Those of the active L1 table."""


class Walk:
    """One walk over an image, and what it found."""

    def __init__(self, image: CheckedImage, snapshots: SnapshotTable, disk: DiskRefcounts, counts: Counts) -> None:
        self.image = image
        self.snapshots = snapshots
        self.disk = disk
        self.counts = counts
        self.phantoms = counts.empty()
        """References through L1 entries that are not cluster-aligned, and those of whatever lies there."""
        self.result = CheckResult()
        """Collects findings, and errors of reading."""
        self.found = TableFindings()
        self.corruptions = 0
        """Corruptions outside of L2 tables and refcount blocks; :class:`.check.Analysis` adds them all up."""
        self.block_corruptions = 0
        """Wrong entries of the refcount table."""
        self.rebuild = False
        """The refcount structure cannot be repaired where it is."""
        self.l1_tables: list[L1Table] = []
        self.active_entries = 0
        """Entries of the active L1 table that are not empty."""
        self.active_wrong = 0
        """How many of them are invalid."""
        self.uses: dict[int, TableUse] = {}
        """By host offset, the L2 tables."""
        self.broken_tables: list[int] = []
        """L2 tables with invalid entries."""
        self.miscopied_tables: list[int] = []
        self.miscopied_l1 = 0
        self.bitmap_tables: list[Region] = []
        self._scanner = TableScanner(image, disk, counts, self.result.note)

    async def run(self, progress: Progress) -> None:
        """Walk. Raises ImageError, HostError or whatever reading the small tables raises."""
        image = self.image
        self._count("header", Region(0, image.cluster_size))
        await self._read_l1("the L1 table", image.l1_region, 1, active=True)
        await self._read_snapshots()
        await self._scan_tables(progress)
        self._count("snapshot table", Region(image.header.snapshots_offset, self.snapshots.length))
        self._count("refcount table", image.refcount_table_region)
        if image.crypto is not None and not image.crypto.length >> 63:  # QEMU's lengths have a sign
            self._count("LUKS header", image.crypto)
        await self._walk_bitmaps()
        self._walk_blocks()

    def _count(self, what: str, region: Region) -> None:
        for wrong in self._scanner.count_region(*region):
            self._corrupt(f"{what}: {wrong}.")

    def _corrupt(self, sentence: str, weight: int = 1) -> None:
        self.corruptions += weight
        self.result.note(sentence)

    # --- L1 tables --------------------------------------------------------------------------------------

    async def _read_l1(self, label: str, region: Region, users: int, *, active: bool) -> None:
        if not region.length:
            return
        for what in self._scanner.count_region(*region, users):
            self._corrupt(f"{label}: {what}.", users)
        self.l1_tables.append(L1Table(region, label, active, users))
        entries = await self.image.read_table(self.image.inside(region))
        for _, piece in used_pieces(entries):
            await self._read_l1_entries(label, piece, users, active=active)
            await checkpoint()

    async def _read_l1_entries(self, label: str, piece: array[int], users: int, *, active: bool) -> None:
        """Count what some L1 entries lead to, and look at each that is out of the ordinary."""
        bits, ones, clusters = self.image.cluster_bits, self.disk.ones, self.counts.clusters
        bad = L1_RESERVED | OFFSET_MASK & self.image.cluster_mask
        plain: list[int] = []
        for entry, times in Counter(filter(None, piece)).items():
            offset = entry & OFFSET_MASK
            cluster = offset >> bits
            use = self.uses.setdefault(offset, TableUse())
            use.weight += times * users
            if entry & bad or times > 1 or cluster >= clusters:
                await self._read_l1_entry(label, entry, times * users, active=active)
                continue  # the rest of the loop is for plain entries
            plain.append(cluster)
            if active:
                use.active += users
                self.active_entries += users
                if ones is None or ones[cluster] != entry >> 63:
                    await self._check_l1_copied(label, entry, users)  # most are not looked up
        self.counts.add(plain, users)

    async def _read_l1_entry(self, label: str, entry: int, weight: int, *, active: bool) -> None:
        offset = entry & OFFSET_MASK
        wrong = ["reserved bits are set"] if entry & L1_RESERVED else []
        wrong += self._scanner.count_region(offset, self.image.cluster_size, weight)
        if offset & self.image.cluster_mask:
            wrong.append("its offset is not a multiple of the cluster size")
        for what in wrong:
            self._corrupt(f"{label}, entry {entry:#x}: {what}.", weight)
        if active:
            self.uses[offset].active += weight
            self.active_entries += weight
            self.active_wrong += weight if wrong else 0
            await self._check_l1_copied(label, entry, weight)

    async def _check_l1_copied(self, label: str, entry: int, weight: int) -> None:
        offset = entry & OFFSET_MASK
        if not offset:
            return
        refcount = await self.disk.get(offset >> self.image.cluster_bits)
        if refcount is not None and (refcount == 1) != bool(entry & COPIED):
            self.miscopied_l1 += weight
            self.result.note(f"{label}: COPIED is wrong in entry {entry:#x}, whose table has {refcount} users.")

    async def _read_snapshots(self) -> None:
        snapshots = self.snapshots.snapshots
        if self.image.data_file and snapshots:
            self._corrupt(f"there are {len(snapshots)} snapshots with an external data file.")
        labels: dict[Region, str] = {}
        for snapshot in snapshots:
            wrong = self.image.wrong_l1(snapshot)
            if wrong is not None:
                self._corrupt(f"{snapshot.label}: {wrong}.")
            else:
                labels.setdefault(l1_of(snapshot), f"the L1 table of {snapshot.label}")
        users = Counter(map(l1_of, snapshots))
        for region, label in labels.items():
            await self._read_l1(label, region, users[region], active=False)

    # --- L2 tables --------------------------------------------------------------------------------------

    async def _scan_tables(self, progress: Progress) -> None:
        for number, offset in enumerate(sorted(self.uses)):
            if number % _TABLES_BETWEEN_CHECKPOINTS == 0:
                progress(number, len(self.uses))
                await checkpoint()
            if offset >= self.image.length:
                continue  # reads as zeroes
            await self._scan_table(offset, self.uses[offset])

    async def _scan_table(self, offset: int, use: TableUse) -> None:
        try:
            raw = await self.image.read(offset, self.image.cluster_size)
        except FusediskError as exc:
            self.result.check_errors += use.weight
            self.result.note(f"the L2 table at {offset:#x} could not be read: {exc}")
            return
        # QEMU looks at the flags of a table only if it knows the table's own refcount.
        known = offset and await self.disk.is_known(offset >> self.image.cluster_bits)
        found = await self._scanner.scan(offset, raw, use.weight, copied=bool(use.active and known))
        if offset & self.image.cluster_mask or not offset:
            phantom = TableScanner(self.image, self.disk, self.phantoms, _ignore)
            phantom.count_region(offset, self.image.cluster_size, use.weight)
            await phantom.scan(offset, raw, use.weight, copied=False)
        if found.corruptions:
            self.broken_tables.append(offset)
        if found.miscopied:
            self.miscopied_tables.append(offset)
            self.result.note(f"L2 table at {offset:#x}: COPIED is wrong in {found.miscopied} entries.")
        self.found.add(found, use.weight, use.active)

    # --- the rest ---------------------------------------------------------------------------------------

    async def _walk_bitmaps(self) -> None:
        image = self.image
        if image.bitmaps is None:
            return
        self._count("directory of bitmaps", Region(image.bitmaps.offset, image.bitmaps.size))
        found = await bitmap_directory(image, image.bitmaps)
        self.bitmap_tables = [Region(bitmap.table_offset, 8 * bitmap.table_entries) for bitmap in found]
        for region in self.bitmap_tables:
            self._count("table of a bitmap", region)
            entries = await image.read_table(region)
            for entry in entries:
                if wrong_entry(image, entry):
                    raise ImageError(
                        f"'{image.filename}' cannot be checked: the table of a bitmap at {region.offset} has the "
                        f"invalid entry {entry:#x}."
                    )
                if offset := entry & TABLE_ENTRY_OFFSET:
                    self._count("bitmap", Region(offset, image.cluster_size))

    def _walk_blocks(self) -> None:
        """Refcount blocks come last: each must then have one reference, its own."""
        image = self.image
        for number, entry in enumerate(self.disk.table):
            if not entry:
                continue
            offset = entry & REFCOUNT_OFFSET_MASK
            wrong = None
            if entry & REFCOUNT_TABLE_RESERVED:
                wrong = "its entry in the refcount table has reserved bits set"
            elif offset & image.cluster_mask:
                wrong = "it does not start with a cluster"
            elif offset >> image.cluster_bits >= self.counts.end():
                self.block_corruptions += 1
                self.result.note(f"refcount block {number} at {offset:#x}: it lies behind the end of the file.")
                continue
            else:
                self._count(f"refcount block {number}", Region(offset, image.cluster_size))
                users = min(self.counts[offset >> image.cluster_bits], image.refcount_maximum)
                if users != 1:
                    wrong = f"its cluster has {users} users"
            if wrong is not None:
                self.block_corruptions += 1
                self.rebuild = True
                self.result.note(f"refcount block {number} at {offset:#x}: {wrong}.")


def _ignore(sentence: str) -> None:
    """Do not report: the fault was already reported for the table itself."""


# --- persistent bitmaps -------------------------------------------------------------------------------


async def bitmap_directory(image: CheckedImage, directory: BitmapDirectory) -> list[Bitmap]:
    """The bitmaps. Raises ImageError if the directory or an entry of it is invalid."""
    data = await image.read(directory.offset, directory.size)
    try:
        return parse_directory(data, directory.bitmaps, image.header)
    except InvalidDirectoryError as exc:
        raise ImageError(f"'{image.filename}' cannot be checked: its directory of bitmaps {exc}.") from None


def wrong_entry(image: CheckedImage, entry: int) -> bool:
    """Whether an entry of a bitmap's table is invalid."""
    offset = entry & TABLE_ENTRY_OFFSET
    return bool(entry & TABLE_ENTRY_RESERVED or (offset and entry & TABLE_ENTRY_ONES) or offset & image.cluster_mask)

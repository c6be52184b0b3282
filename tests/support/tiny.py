"""``tiny``: a small dynamic format for tests, all of whose work the block table does.

One sector of header, then a table of sectors (0: nothing here, 1: zeroes) and the blocks. Or, with ``levels=2``, two
directories that are kept in step, and tables behind them. Concurrent requests and crashes: see the block table.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.children import BackingReference, Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import UNALLOCATED, ZERO
from fusedisk.block.model.files import Files
from fusedisk.block.model.node import Node
from fusedisk.block.request import io
from fusedisk.core.errors import ImageError, OptionError
from fusedisk.core.options import CreateOptions, option
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.block_checks import check_table, flat_table, two_level_table
from fusedisk.drivers.format.block_entries import Area, Entries
from fusedisk.drivers.format.block_table import BlockTable
from fusedisk.drivers.format.table_driver import TableDriver

SECTOR = 512
PER_TABLE = 128
MAX_NAME = 255
ENTRIES = Entries(4, "big", unit=SECTOR, kinds={0: UNALLOCATED, 1: ZERO})
_HEADER = struct.Struct(">8sQIIII")
_MAGIC = b"TINYDISK"


@dataclasses.dataclass(slots=True)
class Header:
    """The first sector."""

    length: int
    block_size: int
    count: int
    """Entries of the table, or of each directory."""
    levels: int = 1
    backing: str = ""

    @classmethod
    async def read(cls, file: Node) -> Header:
        """Read the header of an image. Raises ImageError."""
        raw = memoryview(bytearray(SECTOR))
        await io.read(file, 0, raw)
        magic, length, block_size, count, levels, named = _HEADER.unpack_from(raw)
        if magic != _MAGIC or levels not in (1, 2) or block_size % SECTOR or not SECTOR <= block_size <= 1 << 25:
            raise ImageError(f"'{file.filename}' is not a tiny image.")
        if named > MAX_NAME or b"\0" in bytes(raw[_HEADER.size :][:named]):
            raise ImageError(f"'{file.filename}' has an invalid name for its backing file.")
        if length > count * block_size * (PER_TABLE if levels == 2 else 1):
            raise ImageError(f"'{file.filename}' has a disk of {length} bytes, which its {count} entries do not cover.")
        return cls(length, block_size, count, levels, bytes(raw[_HEADER.size :][:named]).decode(errors="replace"))

    async def write(self, file: Node) -> None:
        """Write it."""
        name = self.backing.encode()
        fields = (_MAGIC, self.length, self.block_size, self.count, self.levels, len(name))
        await io.write(file, 0, (memoryview((_HEADER.pack(*fields) + name).ljust(SECTOR, b"\0")),))

    @property
    def first(self) -> int:
        """Where the blocks start."""
        return SECTOR + self.levels * self.table_size

    @property
    def table_size(self) -> int:
        """Bytes of the table or of each directory, in whole sectors."""
        return -(-self.count * 4 // SECTOR) * SECTOR

    async def table(self, node: Node, edge: Child, *, strict: bool = True) -> BlockTable:
        """Read the table."""
        align = SECTOR if self.levels == 2 else self.block_size
        area = Area(self.first, edge.node.length, size=self.block_size, align=align)
        if self.levels == 1:
            return await flat_table(node, edge, ENTRIES, area, count=self.count, places=(SECTOR,), strict=strict)
        return await two_level_table(
            node,
            edge,
            ENTRIES,
            ENTRIES,
            area,
            count=self.count,
            places=(SECTOR, SECTOR + self.table_size),
            per_table=PER_TABLE,
            cache_size=4 * PER_TABLE,
            strict=strict,
        )


@dataclasses.dataclass(slots=True)
class TinyCreateOptions(CreateOptions):
    """Creation options of ``tiny``."""

    size: int = option(None, kind="size", help="virtual size")
    block_size: int = option(4096, kind="size", help="bytes of a block")
    levels: int = option(1, kind="int", help="levels of the table, 1 or 2")
    backing_file: str | None = option(None, help="backing file")
    backing_fmt: str | None = option(None, help="its format")


class TinyDriver(TableDriver):
    """See the module."""

    name = "tiny"
    supports_backing = True
    create_options_type = TinyCreateOptions
    header: Header

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        return 100 if head.startswith(_MAGIC) else 0

    def backing_reference(self) -> BackingReference | None:
        return BackingReference(self.header.backing, "raw") if self.header.backing else None

    async def open(self) -> None:
        edge = self.node.children["file"]
        self.header = await Header.read(edge.node)
        self.disk_length = self.header.length
        self.table = await self.header.table(self.node, edge)

    async def write_length(self, length: int) -> None:
        await dataclasses.replace(self.header, length=length).write(self.table.edge.node)
        self.header.length = length

    @classmethod
    async def check(cls, files: Files, repair: Repair, progress: Progress, *, dry_run: bool = False) -> CheckResult:
        file = files.main
        edge = Child("file", Role.FILE, None, file, f"'{file.filename}'")
        table = await (await Header.read(file)).table(file, edge, strict=False)
        return await check_table(table, Repair.NOTHING if dry_run else repair)

    @classmethod
    async def check_create(cls, options: Any, filename: str) -> None:
        if options.block_size % SECTOR or not SECTOR <= options.block_size <= 1 << 25 or options.levels not in (1, 2):
            raise OptionError(f"tiny block_size is {options.block_size}, expected whole sectors up to 32 MiB.")

    @classmethod
    async def create(cls, files: Files, options: Any) -> None:
        (file,) = await files.create()
        # Room to grow to four times the size.
        blocks = max(-(-4 * options.size // options.block_size), 4096)
        count = blocks if options.levels == 1 else -(-blocks // PER_TABLE)
        header = Header(options.size, options.block_size, count, options.levels, options.backing_file or "")
        await io.write(file, SECTOR, (memoryview(bytes(header.first - SECTOR)),))
        await header.write(file)

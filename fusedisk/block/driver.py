"""The driver interface.

A driver says where bytes lie; the core (:mod:`fusedisk.block.io`) moves them. There are three kinds:

* a **protocol** driver reaches bytes outside the process and moves them itself: ``preadv`` and ``pwritev``;
* a **format** driver answers ``map`` and ``map_write`` over its ``file`` child and never moves guest data;
* a **filter** passes everything to its one child and overrides what it changes.

What a driver may rely on: the core has checked range, alignment, read-only and permissions, no request is empty, none
is longer than the driver's limits, requests that free host space are serialised against every overlapping request,
and ``publish``, ``write_zeroes``, ``discard`` and ``truncate`` run shielded from cancellation (``map_write`` does not:
what must not be cut short in it, it shields itself). What it must do: raise only :mod:`fusedisk.core.errors` classes,
keep its state consistent at every ``await``, never hold a lock across a request to another node's door unless it says
why that is safe. What it must not do: check ranges again, call the door of its own node, await in ``finally``.

Everything here runs in the one trio thread. Threads do host I/O and CPU work only (:mod:`fusedisk.core.offload`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from fusedisk.block import permissions
from fusedisk.block.extent import DATA, Extent, WriteExtent
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.options import CreateOptions, Options

if TYPE_CHECKING:
    from fusedisk.block.check import CheckResult, Progress, Repair
    from fusedisk.block.child import Child
    from fusedisk.block.limits import Limits
    from fusedisk.block.node import Node, NodeConfig
    from fusedisk.block.snapshot import SnapshotInfo

Buffer = memoryview
"""A C-contiguous memoryview of unsigned bytes."""

MAY_UNMAP = 1
"""write_zeroes: the space may be given back, as long as the range reads as zeroes."""
NO_FALLBACK = 2
"""write_zeroes: raise NotSupportedError rather than write zeroes out at length."""
FUA = 4
"""The request is on stable storage when it is answered."""
COPY_ON_READ = 8
"""Read: keep in this node what came from its backing file."""
UNCHANGED = 16
"""Write: the range reads the same afterwards; needs only the *write unchanged* permission."""
ZERO_NEW = 32
"""truncate: the space added must read as zeroes, whatever a longer backing file holds there."""
COMPRESSED = 64
"""Write: store whole clusters compressed."""


class Role(enum.Enum):
    """What a child is for its parent."""

    FILE = "file"
    """The protocol-level storage of a format."""
    BACKING = "backing"
    """Read where this layer has nothing."""
    DATA_FILE = "data-file"
    """Guest data of a format whose metadata lies in ``file``."""
    FILTERED = "filtered"
    """The child of a filter: same data, same length."""


class ChildSpec(NamedTuple):
    """A child that the graph opens from the options before the driver's ``open`` runs."""

    name: str
    role: Role
    required: bool = True
    option: str = ""
    """The option that says what it is, where that is not ``name``."""

    @property
    def option_name(self) -> str:
        """The option's name, whatever it is."""
        return self.option or self.name


class BackingReference(NamedTuple):
    """A backing file as an image's header names it."""

    filename: str
    format: str | None


NoReads = Callable[[], AbstractAsyncContextManager[None]]


class Driver:
    """Base of all drivers. One instance serves one node."""

    name: ClassVar[str]
    """The driver's QMP name, such as ``qcow2``."""
    prefixes: ClassVar[tuple[str, ...]] = ()
    """Protocol prefixes of file names it answers to, such as ``file`` in ``file:x``."""
    is_protocol: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    passes_status: ClassVar[bool] = False
    """True where every byte is the ``file`` child's, so that block status is the child's answer as it stands."""
    moves_bytes: ClassVar[bool] = False
    """True where the driver has ``preadv`` and ``pwritev``; otherwise the core asks ``map``."""
    asks_before_waiting: ClassVar[bool] = False
    """True if every place in this driver that can block calls :func:`fusedisk.core.at_once.refuse_to_wait` first. The
    core may then run a request without starting a task. Host I/O in worker threads does call it."""
    supports_backing: ClassVar[bool] = False
    length_unit: ClassVar[int] = 1
    """A new length of the node must be a multiple of this, in bytes."""
    options_type: ClassVar[type[Options]] = Options
    create_options_type: ClassVar[type[CreateOptions] | None] = None
    """None: images of this kind cannot be created."""
    amend_options_type: ClassVar[type[CreateOptions] | None] = None
    """What can be changed later, every default None; None: nothing can."""
    child_specs: ClassVar[tuple[ChildSpec, ...]] = ()

    def __init__(self, node: Node, options: Any) -> None:
        self.node = node
        self.options = options

    # --- recognising and naming -------------------------------------------------------------------------

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Score 0 to 100 for an image that starts with ``head`` (at least 512 bytes where it has them)."""
        return 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """Options from a file name with its prefix taken off. Protocol drivers."""
        return {"filename": filename}

    def exact_filename(self) -> str | None:
        """A plain name that, given to ``open`` with this driver, opens the same thing; None where only
        options can say it. The default is the ``file`` child's."""
        child = self.node.children.get("file")
        return child.node.exact_filename() if child else None

    def may_be_named(self) -> bool:
        """Whether an image may name this driver with these options in a reference: it opens local files at most, and
        has no effects beyond that."""
        return False

    def backing_reference(self) -> BackingReference | None:
        """The backing file that the header names. Format drivers with ``supports_backing``, after ``open``."""
        return None

    # --- life -------------------------------------------------------------------------------------------

    async def backing_opened(self) -> None:
        """Look at the backing file, which was attached as the image was opened. Formats with ``supports_backing``."""

    async def open(self) -> None:
        """Open with ``self.options`` and ``self.node.config``; children of ``child_specs`` are attached.

        On failure everything this method acquired is released before it raises. Nothing may be written
        unless the node is writable.
        """

    async def close(self) -> None:
        """Flush internal caches to the children and release everything. Never fails half-way: what can be
        released is released, then the first error is raised. No request is in flight."""

    async def reopen_prepare(self, config: NodeConfig, options: Any) -> object:
        """Prepare for new settings without changing anything visible; returns state for commit or abort.

        The default accepts a new config and refuses changed driver options.
        """
        if options != self.options:
            raise NotSupportedError(f"node '{self.node.name}': {self.name} options cannot change while open.")
        return None

    def reopen_commit(self, state: object) -> None:
        """Take the prepared settings; must not fail. ``node.config`` is already the new one, ``options``
        is set by the caller after this."""

    def reopen_abort(self, state: object) -> None:
        """Drop the prepared settings; must not fail."""

    # --- size, limits, permissions ----------------------------------------------------------------------

    async def length(self) -> int:
        """Virtual length in bytes."""
        raise NotImplementedError

    def refresh_limits(self, limits: Limits) -> None:
        """Fill in limits, which start as the merged limits of the children."""

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        """What this node needs of ``child`` and lets others do there, when its own parents together need
        ``perm`` and let others do ``shared``. The default follows the child's role."""
        if child.role is Role.FILTERED:
            return perm, shared
        if child.role is Role.BACKING:
            return _backing_permissions(perm, shared)
        need = permissions.CONSISTENT_READ
        if not self.node.config.read_only:
            need |= permissions.WRITE | permissions.RESIZE
        if self.node.config.force_share:
            return need, permissions.ALL
        return need, permissions.CONSISTENT_READ | permissions.WRITE_UNCHANGED

    def check_permissions(self, perm: int, shared: int) -> None:
        """Prepare for the node's new cumulative permissions (the file driver takes image locks).

        Raises LockConflictError or another error; then nothing has changed. Followed by exactly one of
        ``commit_permissions`` and ``abort_permissions``, neither of which may fail. All three are synchronous.
        """

    def commit_permissions(self, perm: int, shared: int) -> None:
        """See ``check_permissions``."""

    def abort_permissions(self) -> None:
        """See ``check_permissions``."""

    # --- data: drivers that move bytes ------------------------------------------------------------------

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fill all buffers from ``offset``; what lies past the end reads as zeroes."""
        raise NotImplementedError

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        """Write all buffers at ``offset``, extending the node where they go past its end. ``flags`` may hold
        UNCHANGED; FUA only if ``supports_fua``."""
        raise NotImplementedError

    supports_fua: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    """True where the driver has ``write_compressed``."""

    # --- data: what is stored otherwise than the guest sees it ------------------------------------------

    encodes = False
    """Whether the core gives what it writes to ``encode`` first. Extents are SPECIAL then, and requests aligned to what
    ``encode`` can take. Set by ``open``."""

    async def require_key(self) -> None:
        """Raise PassphraseError where the data cannot be read for want of the right key."""

    def take_key(self, other: Driver) -> None:
        """Use the key of another node, of the same kind and on the same image."""

    async def encode(self, offset: int, host_offset: int, data: bytes) -> Buffer:
        """What to store at ``host_offset`` of the child for the guest's ``data`` at ``offset``; as long as that."""
        raise NotImplementedError

    # --- data: drivers that say where bytes lie ---------------------------------------------------------

    async def map(self, offset: int, length: int) -> Extent:
        """Status of a prefix of the range, as long a prefix as is cheap to say (neighbouring clusters that
        continue each other count as one). Protocol drivers answer DATA or ZERO for block status only; their
        DATA extents name no child. The default: all data, in the ``file`` child at the same offset."""
        child = self.node.children.get("file")
        return Extent(DATA, length, child, offset, recurse=True)

    async def has_holes(self) -> bool:
        """Whether data extents that say ``recurse`` may be holes of the child after all. Asked by block status only,
        so it may take a long look at the image once; False makes block status take them as data.
        """
        return True

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        """Where to write a prefix of the range, allocating as needed.

        Waits for allocations in flight over the same clusters. Space newly allocated is referenced nowhere
        until ``publish``: a crash in between leaks it and nothing else.
        """
        child = self.node.children.get("file")
        assert child is not None
        return WriteExtent(length, child, offset)

    async def publish(self, allocation: object) -> None:
        """Make the written allocation visible. If it fails, the old mapping stays and the allocation is released
        as by ``abandon``."""
        raise NotImplementedError

    def abandon(self, allocation: object) -> None:
        """The data could not be written: forget the allocation, wake who waited for it. Synchronous; may leak
        host space, or keep it in memory for the next allocation."""
        raise NotImplementedError

    async def read_special(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` with the guest bytes at ``offset`` of a SPECIAL extent."""
        raise NotImplementedError

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Replace whole clusters, or what is left up to the disk's end, by compressed ones. Serialised. Clusters that
        do not get shorter are written as they are, those of zeroes need no space. Raises NotSupportedError, with
        nothing changed, for images that cannot have compressed clusters."""
        raise NotImplementedError

    # --- data, without waiting: what is not answered goes through the door ------------------------------

    def lookup(self, offset: int, length: int) -> Extent | None:
        """The answer of ``map`` if that takes no I/O; otherwise None."""
        return None

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        """The answer of ``map_write`` if that takes no I/O and changes nothing; otherwise None."""
        return None

    def read_now(self, offset: int, buffer: Buffer) -> bool:
        """What ``preadv`` does, if that does not wait. False: ``buffer`` may hold anything."""
        return False

    def write_now(self, offset: int, buffer: Buffer) -> bool:
        """What ``pwritev`` does, if that does not wait. False: a part may be written."""
        return False

    def read_cached(self, offset: int, buffer: Buffer, extent: Extent | None = None) -> bool:
        """Fill ``buffer`` with the guest bytes at ``offset`` of a SPECIAL extent, if that does not wait. ``extent`` is
        what ``lookup`` has just told of that range, if it was asked. False: ``buffer`` may hold anything."""
        return False

    def cached_pieces(self, extent: Extent, offset: int) -> list[memoryview] | None:
        """The guest bytes of the SPECIAL ``extent`` at ``offset``, as they lie in memory; None where some do not."""
        return None

    def cached_source(self, extent: Extent, offset: int) -> tuple[Callable[[int, Buffer], bool], int] | None:
        """What does :meth:`read_cached` for a range that begins where the SPECIAL ``extent`` does, at ``offset``, and
        for how many bytes, until the mapping changes; None where there is no such thing."""
        return None

    def resident_descriptor(self, offset: int, length: int) -> int | None:
        """A descriptor of a host file that is this node byte by byte, if all of the range is in the host's page cache;
        None: it is not, or nobody knows."""
        return None

    def storage_descriptor(self) -> int | None:
        """A descriptor of the host file that ``exact_filename`` names, None where there is none. It stays the driver's,
        who may exchange it when the node is reopened. The default is the ``file`` child's."""
        child = self.node.children.get("file")
        return child.node.driver.storage_descriptor() if child else None

    def host_descriptor(self) -> int | None:
        """A descriptor of a host file that is this node byte by byte, so that others can access it directly; None where
        there is no such file."""
        return None

    # --- other requests ---------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Make an aligned range read as zeroes without writing it out. Where ``zeroes_alignment`` is less than a
        cluster, it is a range of whole clusters (or up to the disk's end) or a part of one. Serialised. Raises
        NotSupportedError, with nothing changed, where it cannot; the core then writes zeroes. ``flags``: MAY_UNMAP, and
        NO_FALLBACK, which asks to refuse rather than to be slow."""
        raise NotSupportedError(f"{self.name} has no write-zeroes operation.")

    async def preallocate(self, offset: int, length: int) -> None:
        """Reserve host space for whole clusters (or up to the disk's end), which read as before. Serialised. Raises
        NotSupportedError, with nothing changed, where it cannot; the core then writes what is not allocated."""
        raise NotSupportedError(f"{self.name} has no preallocation.")

    async def discard(self, offset: int, length: int) -> None:
        """Give an aligned range back; it then reads as zeroes or as before, never as older data from a
        backing file. Serialised. Raises NotSupportedError, with nothing changed, where it cannot."""
        raise NotSupportedError(f"{self.name} has no discard operation.")

    async def flush_to_os(self) -> None:
        """Hand all internal caches to the children, so that they survive the death of this process."""

    async def flush_to_disk(self) -> None:
        """Put everything already handed to the OS on stable storage. Protocol drivers."""

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        """Change the virtual length. No request is in flight on the node. ``preallocation`` is off, metadata,
        falloc or full, and holds for the space added. Raises NotSupportedError where it cannot."""
        raise NotSupportedError(f"{self.name} images cannot be resized.")

    async def debug_event(self, event: str) -> None:
        """A parent is about to do ``event`` (a name of QAPI's BlkdebugEvent) to this node.

        Filters pass it down to where somebody may be interested, everybody else ignores it. It may suspend, and does
        not raise. Plain reads and overwrites have no events.
        """
        if self.is_filter:
            await self.node.children["file"].node.driver.debug_event(event)

    # --- internal snapshots -----------------------------------------------------------------------------

    def list_snapshots(self) -> list[SnapshotInfo]:
        """The snapshots that the image holds, in the order of its table."""
        return []

    async def create_snapshot(self, wanted: SnapshotInfo, progress: Progress) -> SnapshotInfo:
        """Keep what the disk holds, under the name, date and VM data of ``wanted``; its id is chosen where it is empty.
        No request is in flight on the node, for this and all that follow. Returns what was made. An error leaves
        everything as it was, and so does a crash at any instant."""
        raise self._keeps_none("internal snapshots")

    async def apply_snapshot(self, id: str, progress: Progress, no_reads: NoReads) -> None:
        """Let the disk hold what it held when the snapshot was made, which stays; the length may change. Plain reads
        run meanwhile, but not within ``no_reads()``, where the disk changes. Raises SnapshotNotFoundError."""
        raise self._keeps_none("internal snapshots")

    async def delete_snapshot(self, id: str, progress: Progress) -> None:
        """Forget a snapshot. Raises SnapshotNotFoundError."""
        raise self._keeps_none("internal snapshots")

    async def save_vmstate(self, offset: int, data: Buffer) -> None:
        """Write to the state of a virtual machine that the next snapshot shall hold."""
        raise self._keeps_none("the state of a virtual machine")

    async def load_vmstate(self, offset: int, buffer: Buffer) -> None:
        """Read from the VM state that belongs to what the disk holds; zeroes where there is none."""
        raise self._keeps_none("the state of a virtual machine")

    def _keeps_none(self, what: str) -> NotSupportedError:
        return NotSupportedError(f"'{self.node.filename}' is a {self.name} image, which cannot hold {what}.")

    # --- settings ---------------------------------------------------------------------------------------

    async def amend(self, options: Any, progress: Progress, *, force: bool) -> None:
        """Give the image the settings in ``options``, an ``amend_options_type``; the length may change. No request is
        in flight on the node. What can be refused is refused with nothing changed. ``force``: although it may lose
        data."""
        raise NotImplementedError

    # --- information ------------------------------------------------------------------------------------

    async def allocated_size(self) -> int | None:
        """Bytes that the node takes up on its host; the default is the children's sum without backing."""
        sizes = [
            await child.node.driver.allocated_size()
            for child in self.node.children.values()
            if child.role is not Role.BACKING
        ]
        known = [size for size in sizes if size is not None]
        return sum(known) if known else None

    def information(self) -> dict[str, Any]:
        """Top-level keys of ``info --output=json`` that this driver adds, such as ``cluster-size``."""
        return {}

    def specific_information(self) -> dict[str, Any] | None:
        """The ``format-specific`` object's ``data``, as QMP spells its keys."""
        return None

    def cost_of_writing(self) -> str | None:
        """What the first write to the disk will cost apart from its bytes, a sentence without full stop that names the
        image; None where nothing."""
        return None

    def has_zero_init(self) -> bool:
        """Whether space never written reads as zeroes."""
        return False

    # --- checking ---------------------------------------------------------------------------------------

    @classmethod
    async def check(cls, file: Node, repair: Repair, progress: Progress, *, dry_run: bool = False) -> CheckResult:
        """Format drivers: check the image in ``file``, which nobody else writes to, and repair it, for which ``file``
        is writable. What was repaired is looked at once more: the result is what is left. ``dry_run``: change nothing,
        but tell what would be done.

        Raises ImageError where the image cannot be made sense of, or cannot be repaired.
        """
        raise NotSupportedError(f"{cls.name} images cannot be checked.")

    # --- creation ---------------------------------------------------------------------------------------

    @classmethod
    async def check_create(cls, options: Any, filename: str) -> None:
        """Format drivers: raise what :meth:`create` would raise of the options alone, while a file that is to be
        replaced still has its content."""

    @classmethod
    async def create(cls, file: Node, options: Any, data_file: Node | None = None) -> None:
        """Format drivers: write an empty image into the open, writable, empty node ``file``, using
        :mod:`fusedisk.block.io`. ``options`` is an instance of ``create_options_type`` with its size filled in;
        ``data_file`` is an empty node too, where the options have one."""
        raise NotSupportedError(f"{cls.name} images cannot be created.")

    @classmethod
    async def create_file(cls, filename: str, size: int, preallocation: str, nocow: bool) -> None:
        """Protocol drivers: make an empty file of ``size`` bytes, replacing the content of what was there."""
        raise NotSupportedError(f"{cls.name} cannot create files.")


def _backing_permissions(perm: int, shared: int) -> tuple[int, int]:
    share = permissions.CONSISTENT_READ | permissions.WRITE_UNCHANGED
    if shared & permissions.WRITE:
        share |= permissions.WRITE | permissions.RESIZE
    return perm & permissions.CONSISTENT_READ, share


class FilterDriver(Driver):
    """A driver with one child of the same data and length; everything passes through unless overridden."""

    is_filter = True
    passes_status = True
    supports_backing = False

    @property
    def filtered(self) -> Child:
        """The one child."""
        return self.node.children["file"]

    async def length(self) -> int:
        return await self.filtered.node.driver.length()

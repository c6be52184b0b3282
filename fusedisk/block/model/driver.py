"""The driver interface.

A driver says where bytes lie; the core (:mod:`fusedisk.block.request.io`) moves them. There are three kinds:

======================  ============================  ============================  ============================
Kind                    protocol                      format                        filter
======================  ============================  ============================  ============================
What it does            reaches bytes outside the     answers where bytes lie in    passes everything to one
                        process                       its children                  child, with differences
Base class              ``Driver``                    ``Driver``                    ``request.filter``'s
                                                                                    ``FilterDriver``
Sets                    ``is_protocol``,              ``child_specs``               ``child_specs``, with one
                        ``moves_bytes``                                             child of role FILTERED
Must implement          ``length``, ``preadv``,       ``open``, ``length``,         nothing
                        ``pwritev``, ``map`` (for     ``map``; to be writable,
                        block status)                 ``map_write``,
                                                      ``flush_to_os``; if it
                                                      allocates, ``publish`` and
                                                      ``abandon``
Most implement          ``open``, ``close``,          ``probe``, ``close``,         what differs; with
                        ``refresh_limits``,           ``refresh_limits``,           ``moves_bytes``, ``preadv``
                        ``write_zeroes``,             ``write_zeroes``,             and ``pwritev``, too
                        ``discard``, ``truncate``,    ``discard``, ``truncate``,
                        ``flush_to_disk``,            ``create``, ``check``
                        ``exact_filename``
======================  ============================  ============================  ============================

A driver whose children depend on its options overrides ``children_of``. One whose image names more files opens them in
``open``. Nothing but the driver itself may rely on a child's name: use ``node.filtered``, ``node.storage`` and
``node.backing``.

What a driver may rely on: the core has checked range, alignment, read-only and permissions, no request is empty, none
is longer than the driver's limits, requests that free host space are serialised against every overlapping request,
and ``publish``, ``write_zeroes``, ``discard`` and ``truncate`` run shielded from cancellation (``map_write`` does not:
what must not be cut short in it, it shields itself). What it must do: raise only :mod:`fusedisk.core.errors` classes,
keep its state consistent at every ``await``, never hold a lock across a request to another node's door unless it says
why that is safe. What it must not do: check ranges again, call the door of its own node, await in ``finally``.

**Fast path.** A new driver needs nothing for it. An export first asks :mod:`fusedisk.block.request.immediate`, which
answers a request without a task if the drivers can do so without waiting:

* Read: ``lookup`` of the top node, then of the children and backing files that it leads to. It ends at ``read_now`` of
  a driver that moves bytes, or at ``read_cached`` for a SPECIAL extent. Where ranges lead may be remembered, with
  ``cached_source`` for SPECIAL extents; then only the last step is called again.
* Read without a copy: the same lookups, which end at ``resident_descriptor`` or ``cached_pieces``.
* Overwrite: ``lookup_in_place`` from child to child, down to ``write_now``.
* A write that this cannot answer is tried as a coroutine without a task, if all drivers set ``can_run_at_once``.

None of these waits. None or False sends the request through the door, which calls ``map`` and ``map_write``, or
``preadv`` and ``pwritev``. Formats start with ``lookup`` and ``lookup_in_place``, drivers that move bytes with
``read_now`` and ``write_now``.

Everything here runs in the one trio thread. Threads do host I/O and CPU work only (:mod:`fusedisk.core.offload`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from fusedisk.block.model import permissions
from fusedisk.block.model.children import BackingReference, ChildSpec, Role
from fusedisk.block.model.extent import Extent, WriteExtent
from fusedisk.block.model.flags import Buffer
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.options import CreateOptions, Options

if TYPE_CHECKING:
    from fusedisk.block.model.check_result import CheckResult, Repair
    from fusedisk.block.model.edge import Child
    from fusedisk.block.model.files import Files
    from fusedisk.block.model.limits import Limits
    from fusedisk.block.model.node import Node, NodeConfig
    from fusedisk.block.model.snapshot_info import SnapshotInfo
    from fusedisk.core.progress import Progress

HoldBack = Callable[[], AbstractAsyncContextManager[None]]
"""Holds back the requests that a snapshot operation lets pass, around the moment when the mapping changes."""


class Driver:
    """Base of all drivers. One instance serves one node."""

    name: ClassVar[str]
    """The driver's QMP name, such as ``qcow2``."""
    prefixes: ClassVar[tuple[str, ...]] = ()
    """Its protocol prefixes in file names, such as ``file`` in ``file:x``."""
    is_protocol: ClassVar[bool] = False
    is_filter: ClassVar[bool] = False
    passes_status: ClassVar[bool] = False
    """True if every byte is a child's, so that block status is the child's answer unchanged."""
    moves_bytes: ClassVar[bool] = False
    """True if the driver has ``preadv`` and ``pwritev``; otherwise the core calls ``map``."""
    can_run_at_once: ClassVar[bool] = False
    """True if every place in this driver that can block calls :func:`fusedisk.core.at_once.refuse_to_wait` first. The
    core may then run a request without starting a task. Host I/O in worker threads does call it."""
    supports_backing: ClassVar[bool] = False
    takes_children: ClassVar[bool] = False
    """True if children may come and go while the node is open, in addition to the backing file."""
    options_type: ClassVar[type[Options]] = Options
    create_options_type: ClassVar[type[CreateOptions] | None] = None
    """None: images of this kind cannot be created."""
    amend_options_type: ClassVar[type[CreateOptions] | None] = None
    """The settings that can be changed later, each with the default None. None: no setting can be changed."""
    child_specs: ClassVar[tuple[ChildSpec, ...]] = ()
    """The children that the graph opens, the same for all options; see ``children_of``."""

    def __init__(self, node: Node, options: Any) -> None:
        self.node = node
        self.options = options

    @classmethod
    def children_of(cls, options: Mapping[str, Any]) -> tuple[ChildSpec, ...]:
        """Return the children that the graph opens before ``open`` for these nested options; by default
        ``child_specs``. :func:`.children_in_list` helps drivers with a list of children."""
        return cls.child_specs

    # --- recognising and naming -------------------------------------------------------------------------

    @classmethod
    def probe(cls, head: bytes, filename: str) -> int:
        """Return a score from 0 to 100 for an image that starts with ``head`` (512 bytes, fewer if it is shorter)."""
        return 0

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """Return options for a file name without its prefix. Protocol drivers."""
        return {"filename": filename}

    def exact_filename(self) -> str | None:
        """Return a plain name that opens the same thing with this driver; None if only options can describe it. The
        default is the storage's."""
        storage = self.node.storage
        return storage.node.exact_filename() if storage else None

    def may_be_named(self) -> bool:
        """Whether an image's reference may name this driver with these options: it must open local files at most, and
        have no other effects."""
        return False

    def backing_reference(self) -> BackingReference | None:
        """Return the backing file that the header names. Format drivers with ``supports_backing``, after ``open``."""
        return None

    # --- life -------------------------------------------------------------------------------------------

    async def backing_opened(self) -> None:
        """Called after a backing file is attached: when the image is opened, and when another one takes its place.
        Formats with ``supports_backing``."""

    async def open(self) -> None:
        """Open with ``self.options`` and ``self.node.config``; children of ``children_of`` are attached.

        On failure it releases everything it acquired before it raises. It writes nothing unless the node is writable.
        """

    async def close(self) -> None:
        """Flush internal caches to the children and release everything. No request is in flight. An error does not
        stop it half-way: it releases all it can, then raises the first error."""

    async def reopen_prepare(self, config: NodeConfig, options: Any) -> object:
        """Prepare for new settings without changing anything visible; returns state for commit or abort.

        The default accepts a new config and refuses changed driver options.
        """
        if options != self.options:
            raise NotSupportedError(f"node '{self.node.name}': {self.name} options cannot change while open.")
        return None

    def shows_other_bytes(self, options: Any) -> bool:
        """Whether the node shows other bytes once ``options`` are in force."""
        return False

    def reopen_commit(self, state: object) -> None:
        """Put the prepared settings into force; must not fail. ``node.config`` and ``options`` are the new ones."""

    def reopen_abort(self, state: object) -> None:
        """Drop the prepared settings; must not fail."""

    def check_children(self) -> None:
        """Raise OptionError if the driver, as its options are now, cannot work over the children that it has now.
        Called after a change of either, before it comes into force; synchronous."""

    # --- size, limits, permissions ----------------------------------------------------------------------

    async def length(self) -> int:
        """Virtual length in bytes."""
        raise NotImplementedError

    def refresh_limits(self, limits: Limits) -> None:
        """Fill in limits, which start as the defaults: limits of the children are not inherited, because the core goes
        through the children's doors, which keep them. Drivers with ``moves_bytes`` set ``request_alignment`` here."""

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        """Return the permissions that this node needs on ``child`` and those that it shares there, if its own parents
        together need ``perm`` and share ``shared``. The default follows the child's role."""
        if child.role is Role.FILTERED:
            return perm, shared
        if child.role is Role.BACKING:
            return permissions.of_backing(perm, shared)
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
        """Fill all buffers from ``offset``; bytes past the end read as zeroes."""
        raise NotImplementedError

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        """Write all buffers at ``offset``; writing past the end extends the node. ``flags`` may hold UNCHANGED, and FUA
        if ``supports_fua``."""
        raise NotImplementedError

    supports_fua: ClassVar[bool] = False
    compresses: ClassVar[bool] = False
    """True if the driver has ``write_compressed``."""

    # --- data: stored in another form than the guest sees it (encryption) -------------------------------

    encodes = False
    """Whether the core passes all data through ``encode`` before it writes it. Extents are SPECIAL then, and requests
    are aligned as ``encode`` needs it. Set by ``open``."""

    async def require_key(self) -> None:
        """Raise PassphraseError if the key that the data needs is missing or wrong."""

    def take_key(self, other: Driver) -> None:
        """Use the key of ``other``, a driver of the same kind on the same image."""

    async def encode(self, offset: int, host_offset: int, data: bytes) -> Buffer:
        """Encode the guest's ``data`` at ``offset`` for storing at ``host_offset`` of the child, in the same length."""
        raise NotImplementedError

    # --- data: drivers that map guest offsets -----------------------------------------------------------

    async def map(self, offset: int, length: int) -> Extent:
        """Return the status of a prefix of the range, as long as is cheap to find out (adjacent clusters make one
        extent). Protocol drivers answer DATA or ZERO, for block status only, and their DATA extents name no child."""
        raise NotImplementedError

    async def has_holes(self) -> bool:
        """Whether data extents with ``recurse`` may be holes of the child. False: block status takes them as data
        without looking. Only block status calls it, so it may scan the image once.
        """
        return True

    async def map_write(self, offset: int, length: int) -> WriteExtent:
        """Return where to write a prefix of the range; allocate host space if needed.

        The core asks again for the rest. If the answer carries an ``allocation``, the core writes the data and then
        calls ``publish`` once, or ``abandon`` if the write failed. Until ``publish`` nothing on disk refers to the new
        space: a crash leaks it, no more. Waits for allocations in flight over the same clusters. Not called for
        drivers with ``moves_bytes``.
        """
        raise NotImplementedError

    async def publish(self, allocation: object) -> None:
        """Make the written allocation visible. After an error the old mapping stays, and the allocation is released as
        by ``abandon``."""
        raise NotImplementedError

    def abandon(self, allocation: object) -> None:
        """Drop the allocation, whose data could not be written, and wake the requests that waited for it. Synchronous.
        May leak host space, or keep it in memory for the next allocation."""
        raise NotImplementedError

    async def read_special(self, extent: Extent, offset: int, buffer: Buffer) -> None:
        """Fill ``buffer`` with the guest bytes at ``offset`` of a SPECIAL extent."""
        raise NotImplementedError

    async def write_compressed(self, offset: int, data: Buffer) -> None:
        """Replace whole clusters (or up to the disk's end) with compressed ones. Serialised. Clusters that do not get
        shorter are stored uncompressed, clusters of zeroes take no space. Raises NotSupportedError, with nothing
        changed, for images that cannot have compressed clusters."""
        raise NotImplementedError

    # --- data, without waiting: see "Fast path" in the module's head ------------------------------------

    def lookup(self, offset: int, length: int) -> Extent | None:
        """Return the answer of ``map`` if that takes no I/O; otherwise None."""
        return None

    def lookup_in_place(self, offset: int, length: int) -> WriteExtent | None:
        """Return the answer of ``map_write`` if that takes no I/O and changes nothing; otherwise None. It holds until
        :meth:`.Node.change_mapping` is called, also if that is later than the next await."""
        return None

    def map_write_now(self, offset: int, length: int) -> WriteExtent | None:
        """Do as :meth:`map_write` without waiting; None declines. The caller goes on to :meth:`publish_now` or
        :meth:`abandon` before anything else runs."""
        return None

    def publish_now(self, allocation: object) -> None:
        """Do as :meth:`publish` for what :meth:`map_write_now` has allocated. Synchronous."""
        raise NotImplementedError

    def read_now(self, offset: int, buffer: Buffer) -> bool:
        """Read as ``preadv`` does, if that does not wait. False: ``buffer`` may hold anything."""
        return False

    def write_now(self, offset: int, buffer: Buffer) -> bool:
        """Write as ``pwritev`` does, if that does not wait. False: a part may be written, and the driver has told
        :meth:`.Node.changed` of it. The caller tells of a write that is done."""
        return False

    def read_cached(self, offset: int, buffer: Buffer, extent: Extent | None = None) -> bool:
        """Fill ``buffer`` with the guest bytes at ``offset`` of a SPECIAL extent, if that does not wait. ``extent`` is
        the answer of a ``lookup`` just before, if there was one. False: ``buffer`` may hold anything."""
        return False

    def cached_pieces(self, extent: Extent, offset: int) -> list[memoryview] | None:
        """Return the guest bytes of the SPECIAL ``extent`` at ``offset`` without copying them; None unless all of them
        are in memory."""
        return None

    def cached_source(self, extent: Extent, offset: int) -> tuple[Callable[[int, Buffer], bool], int] | None:
        """Return a function that does :meth:`read_cached` for the range that begins with the SPECIAL ``extent`` at
        ``offset``, and the length of that range. Valid until the mapping changes. None: there is no such function."""
        return None

    def resident_descriptor(self, offset: int, length: int) -> int | None:
        """Return a descriptor of a host file with the same bytes as this node, if all of the range is in the host's
        page cache; None if it is not, or if that is unknown."""
        return None

    def storage_descriptor(self) -> int | None:
        """Return a descriptor of the host file that ``exact_filename`` names, None if there is none. It belongs to the
        driver, which may replace it when the node is reopened. The default is the storage's."""
        storage = self.node.storage
        return storage.node.driver.storage_descriptor() if storage else None

    def host_descriptor(self) -> int | None:
        """Return a descriptor of a host file with the same bytes as this node, for direct access; None if there is no
        such file."""
        return None

    # --- other requests ---------------------------------------------------------------------------------

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Make an aligned range read as zeroes without writing them. The range is whole clusters (or up to the disk's
        end), or a part of one cluster if ``zeroes_alignment`` is smaller. Serialised. Raises NotSupportedError, with
        nothing changed, if that is impossible; the core then writes zeroes. ``flags``: MAY_UNMAP, and NO_FALLBACK,
        which asks to refuse rather than to be slow."""
        raise NotSupportedError(f"{self.name} has no write-zeroes operation.")

    async def preallocate(self, offset: int, length: int) -> None:
        """Reserve host space for whole clusters (or up to the disk's end), which read as before. Serialised. Raises
        NotSupportedError, with nothing changed, if that is impossible; the core then writes the unallocated parts."""
        raise NotSupportedError(f"{self.name} has no preallocation.")

    async def discard(self, offset: int, length: int) -> None:
        """Free an aligned range; it then reads as zeroes or as before, never as older data from a backing file.
        Serialised. Raises NotSupportedError, with nothing changed, if that is impossible."""
        raise NotSupportedError(f"{self.name} has no discard operation.")

    async def discard_ranges(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Free several short ranges, each an offset and a length, as :meth:`discard` frees one. Overridden where that
        takes fewer trips to the host."""
        for offset, length in ranges:
            await self.discard(offset, length)

    async def flush(self, flush_layers: Callable[[], Awaitable[None]]) -> None:
        """Put every write answered before this call on stable storage. Called with ``flush_layers``, which does all
        that most drivers need: ``flush_to_os``, then a flush of each child but the backing file, then
        ``flush_to_disk`` for protocols. Override it to do more, or to flush the children in another way."""
        await flush_layers()

    async def flush_to_os(self) -> None:
        """Write all internal caches to the children, so that the data survives the death of this process."""

    async def flush_to_disk(self) -> None:
        """Put everything that the OS already has on stable storage. Protocol drivers."""

    async def truncate(self, length: int, preallocation: str, flags: int) -> None:
        """Change the virtual length. No request is in flight on the node. ``preallocation`` is off, metadata, falloc or
        full, and applies to the space added. Raises NotSupportedError if that is impossible."""
        raise NotSupportedError(f"{self.name} images cannot be resized.")

    def drain_begin(self) -> None:
        """Let go of requests that the driver holds back for a reason of its own (throttling, waiting for a server), and
        hold none back until ``drain_end``: a drain waits for them. Called once, however many users are drained."""

    def drain_end(self) -> None:
        """Requests may be held back again. Also called for a driver that has been closed meanwhile."""

    async def debug_event(self, event: str) -> None:
        """Learn that a parent is about to do ``event`` (a name of QAPI's BlkdebugEvent) to this node.

        Filters pass it down, blkdebug acts on it, all other drivers ignore it. It may suspend, and does not raise.
        Plain reads and overwrites have no events.
        """

    # --- internal snapshots -----------------------------------------------------------------------------

    def list_snapshots(self) -> list[SnapshotInfo]:
        """Return the image's snapshots, in the order of its table."""
        return []

    async def create_snapshot(self, wanted: SnapshotInfo, progress: Progress, no_changes: HoldBack) -> SnapshotInfo:
        """Make a snapshot of the disk with the name, date and VM data of ``wanted`` and return it. An empty id means:
        choose one. An error, or a crash at any instant, leaves everything as it was. All requests for data run
        meanwhile, except within ``no_changes()``, where only plain reads do and the snapshot comes to be. No other
        request of this section is in flight on the node, for the other methods no other request at all."""
        raise self._keeps_none("internal snapshots")

    async def apply_snapshot(self, id: str, progress: Progress, no_reads: HoldBack) -> None:
        """Restore the disk's content from a snapshot, which is kept; the length may change. Plain reads run meanwhile,
        except within ``no_reads()``, where the disk changes. Raises SnapshotNotFoundError."""
        raise self._keeps_none("internal snapshots")

    async def delete_snapshot(self, id: str, progress: Progress, no_changes: HoldBack) -> None:
        """Delete a snapshot, beside the same requests as ``create_snapshot``. Raises SnapshotNotFoundError."""
        raise self._keeps_none("internal snapshots")

    async def save_vmstate(self, offset: int, data: Buffer) -> None:
        """Write to the VM state that goes into the next snapshot."""
        raise self._keeps_none("the state of a virtual machine")

    async def load_vmstate(self, offset: int, buffer: Buffer) -> None:
        """Read from the VM state that belongs to the disk's content; zeroes if there is none."""
        raise self._keeps_none("the state of a virtual machine")

    def _keeps_none(self, what: str) -> NotSupportedError:
        return NotSupportedError(f"'{self.node.filename}' is a {self.name} image, which cannot hold {what}.")

    # --- settings ---------------------------------------------------------------------------------------

    async def amend(self, options: Any, progress: Progress, *, force: bool) -> None:
        """Change the image's settings to ``options``, an ``amend_options_type``; the length may change. No request is
        in flight on the node. Refusals come before any change. ``force`` allows changes that may lose data."""
        raise NotImplementedError

    # --- information ------------------------------------------------------------------------------------

    async def allocated_size(self) -> int | None:
        """Return the bytes that the node takes up on its host; by default the sum of its children except backing."""
        sizes = [
            await child.node.driver.allocated_size()
            for child in self.node.children.values()
            if child.role is not Role.BACKING
        ]
        known = [size for size in sizes if size is not None]
        return sum(known) if known else None

    def information(self) -> dict[str, Any]:
        """Return the top-level keys of ``info --output=json`` that this driver adds, such as ``cluster-size``."""
        return {}

    def specific_information(self) -> dict[str, Any] | None:
        """Return the ``data`` of the ``format-specific`` object, with QMP's keys."""
        return None

    def cost_of_writing(self) -> str | None:
        """Return what the first write to the disk will cost apart from its own bytes: a sentence without its full stop
        that names the image. None: nothing."""
        return None

    def has_zero_init(self) -> bool:
        """Whether space never written reads as zeroes."""
        return False

    # --- checking ---------------------------------------------------------------------------------------

    @classmethod
    async def check(cls, files: Files, repair: Repair, progress: Progress, *, dry_run: bool = False) -> CheckResult:
        """Format drivers: check the image in ``files.main``, which has no other writer, and repair what ``repair``
        allows; the file is writable for that. Other files that the image names come from ``files.open``. A repaired
        image is checked again: the result says what is still wrong.
        ``dry_run``: change nothing, but report what a repair would do.

        Raises ImageError if the image is beyond interpretation or beyond repair.
        """
        raise NotSupportedError(f"{cls.name} images cannot be checked.")

    # --- creation ---------------------------------------------------------------------------------------

    @classmethod
    async def check_create(cls, options: Any, filename: str) -> None:
        """Format drivers: raise what :meth:`create` would raise because of the options, before the content of an
        existing file is replaced."""

    @classmethod
    async def create(cls, files: Files, options: Any) -> None:
        """Format drivers: write an empty image into the file or files that ``files.create`` gives, using
        :mod:`fusedisk.block.request.io`. ``options`` is an instance of ``create_options_type`` with its size filled
        in."""
        raise NotSupportedError(f"{cls.name} images cannot be created.")

    @classmethod
    async def create_file(cls, filename: str, size: int, preallocation: str, nocow: bool) -> None:
        """Protocol drivers: make an empty file of ``size`` bytes, replacing the content of an existing one."""
        raise NotSupportedError(f"{cls.name} cannot create files.")

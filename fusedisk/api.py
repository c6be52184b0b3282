"""The library: open a disk image and use it as one flat disk, in trio.

All offsets and lengths are bytes, ranges are half-open, and every expected failure is a class of
:mod:`fusedisk.core.errors`. For code outside trio see :mod:`fusedisk.sync`.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, NoReturn, TypeAlias, get_args

import trio

from fusedisk.arguments import (
    AnyPath,
    choice,
    fillable,
    flag,
    mapping,
    number_below,
    path,
    paths,
    readable,
    text,
    whole_number,
)
from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.cache_modes import CACHE_MODES
from fusedisk.block.graph.filenames import has_protocol, parse_argument
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.image.amend import amend_image
from fusedisk.block.image.create import create_image
from fusedisk.block.image.information import chain_information, image_information
from fusedisk.block.image.mapping import MapEntry, map_entries
from fusedisk.block.model.extent import BlockStatus
from fusedisk.block.model.node import NodeConfig
from fusedisk.block.model.snapshot_info import SnapshotInfo
from fusedisk.block.request.snapshot import find_snapshot, find_snapshot_by
from fusedisk.core.errors import FusediskError, OptionError
from fusedisk.core.progress import no_progress
from fusedisk.drivers.table import DRIVERS
from fusedisk.forgotten import Forgotten, of_this_run

Image: TypeAlias = AnyPath | Mapping[str, Any]
"""What to open: a path, ``proto:name``, ``json:{…}`` or dotted options (``driver=qcow2,file.filename=x``) as text; a
path-like object or bytes, which are a path and nothing else; or nested options."""

Preallocation: TypeAlias = Literal["off", "metadata", "falloc", "full"]
Data: TypeAlias = bytes | bytearray | memoryview


class Disk:
    """An open image as a flat disk.

    Made by :func:`open`. Several tasks may use it at once; overlapping requests in flight have no order among
    themselves, as on a real disk. A request that is not on the disk raises OutOfRangeError and changes nothing.
    """

    def __init__(self, backend: Backend, forgotten: Forgotten) -> None:
        self._backend = backend
        self._forgotten: Forgotten | None = forgotten

    def __del__(self) -> None:
        self._forget(self)

    def _forget(self, owner: object) -> None:
        """Nobody uses the disk any more. If it is open, ``owner`` should have closed it."""
        forgotten, self._forgotten = self._forgotten, None
        if forgotten is not None and forgotten.add(self._backend):
            message = f"the disk '{self._backend.name}' was forgotten without closing it."
            warnings.warn(message, ResourceWarning, stacklevel=2, source=owner)

    @property
    def size(self) -> int:
        """Length of the disk."""
        return self._backend.length

    @property
    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self._backend.writable

    @property
    def format(self) -> str:
        """The image's format, such as ``qcow2``."""
        return self._backend.node.driver.name

    @property
    def filename(self) -> str:
        """A name that opens the same disk again; plain where that says it all, ``json:{…}`` otherwise."""
        return self._backend.node.printable_name

    async def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``offset``."""
        if type(offset) is not int or offset < 0 or type(length) is not int:
            offset, length = self._range(offset, length)
        return bytes(await self._backend.read(offset, length))

    async def read_into(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Fill the whole of ``buffer`` from ``offset``; saves the copy that :meth:`read` makes."""
        view = memoryview(buffer).cast("B") if type(buffer) is bytearray else fillable("buffer", buffer)
        if type(offset) is not int or offset < 0:
            offset, _ = self._range(offset, len(view))
        await self._backend.read_into(offset, view)

    async def write(self, offset: int, data: Data, *, fua: bool = False) -> None:
        """Write all of ``data`` at ``offset``; ``fua``: it is on stable storage on return.

        Raises ReadOnlyError, and NoSpaceError where the host is full.
        """
        if type(offset) is not int or offset < 0 or type(data) is not bytes:
            data = readable("data", data)
            offset, _ = self._range(offset, len(data))
        await self._backend.write(offset, data, fua=fua)

    async def write_compressed(self, offset: int, data: Data) -> None:
        """Write whole clusters of a qcow2 image, or up to the disk's end, compressed; what they held before is freed.
        Give several clusters at once: they are compressed in parallel.

        Raises NotSupportedError for other formats, for encrypted images and for external data files, OutOfRangeError
        for parts of clusters.
        """
        data = readable("data", data)
        offset, _ = self._range(offset, len(data))
        await self._backend.write_compressed(offset, data)

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool = True) -> None:
        """Make a range read as zeroes, without writing them out where it can; ``may_unmap`` lets its space go."""
        offset, length = self._range(offset, length)
        await self._backend.write_zeroes(offset, length, may_unmap=flag("may_unmap", may_unmap))

    async def discard(self, offset: int, length: int) -> None:
        """Give a range up: its space may go, it then reads as zeroes or as before. What is not aligned to the image's
        clusters stays."""
        offset, length = self._range(offset, length)
        await self._backend.discard(offset, length)

    async def flush(self) -> None:
        """On return all writes answered before are on stable storage."""
        await self._backend.flush()

    async def truncate(self, size: int, *, preallocation: Preallocation = "off") -> None:
        """Resize the disk; what is added reads as zeroes. Raises NotSupportedError where the format or mode cannot."""
        await self._backend.truncate(
            whole_number("size", size), choice("preallocation", preallocation, get_args(Preallocation))
        )

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        """Status of a prefix of the range: its length, whether it holds data or reads as zeroes, which layer of the
        chain holds it, and where on the host."""
        return await self._backend.block_status(*self._range(offset, length))

    def extents(self, start: int = 0, length: int | None = None) -> AsyncGenerator[MapEntry, None]:
        """All of a range, by default of the disk, as the entries of ``qemu-img map``, in order and without gaps.

        Streams: one entry is in memory at a time. Iterate with ``async for``.
        """
        length = None if length is None else whole_number("length", length)
        return map_entries(self._backend, whole_number("start", start), length)

    def snapshots(self) -> list[SnapshotInfo]:
        """The internal snapshots that the image holds, the oldest first."""
        return self._backend.list_snapshots()

    async def create_snapshot(
        self, name: str, *, vm_state_size: int = 0, vm_clock: int = 0, icount: int | None = None
    ) -> SnapshotInfo:
        """Keep what the disk holds now under a name, which need not be unique; requests that come meanwhile wait.

        On return it is durable, with all writes before. ``vm_state_size``: how much was saved by :meth:`save_vmstate`
        for it; ``vm_clock`` in nanoseconds. Raises NotSupportedError where the format has no snapshots, ImageError
        where there are too many, or of too many shared clusters.
        """
        wanted = SnapshotInfo(
            "",
            text("name", name),
            time.time_ns(),
            number_below("vm_clock", vm_clock, 1 << 64),
            number_below("vm_state_size", vm_state_size, 1 << 56),
            icount=None if icount is None else number_below("icount", icount, (1 << 64) - 1),
        )
        return await self._backend.create_snapshot(wanted)

    async def apply_snapshot(self, id_or_name: str) -> None:
        """Let the disk hold what it held when the snapshot of that id, else of that name, was made; its size and VM
        state come back too. What it holds now is lost, unless another snapshot has it. Raises SnapshotNotFoundError."""
        found = find_snapshot(self.snapshots(), text("id_or_name", id_or_name), self._backend.name)
        await self._backend.apply_snapshot(found.id)

    async def delete_snapshot(self, name: str | None = None, *, id: str | None = None) -> None:
        """Delete the first snapshot of that name, or that id, or both. Raises SnapshotNotFoundError."""
        name, id = text_or_none("name", name), text_or_none("id", id)
        found = find_snapshot_by(self.snapshots(), self._backend.name, id=id, name=name)
        await self._backend.delete_snapshot(found.id)

    async def save_vmstate(self, offset: int, data: Data) -> None:
        """Write to the state of a virtual machine, which has an address space of its own; the next snapshot with a
        ``vm_state_size`` holds it, and the disk no longer."""
        await self._backend.save_vmstate(whole_number("offset", offset), readable("data", data))

    async def load_vmstate(self, offset: int, length: int) -> bytes:
        """Read from the VM state that was saved, or that came with the snapshot applied last; zeroes where there is
        none."""
        offset, length = whole_number("offset", offset), whole_number("length", length)
        return bytes(await self._backend.load_vmstate(offset, length))

    async def info(self) -> dict[str, Any]:
        """The keys and values of ``qemu-img info --output=json``."""
        return await image_information(self._backend.node)

    async def info_chain(self) -> list[dict[str, Any]]:
        """:meth:`info` of the image and of each of its backing files, from the top down."""
        chain, _ = await chain_information(self._backend.node)
        return chain

    def _range(self, offset: int, length: int) -> tuple[int, int]:
        """Both as numbers; none of them is negative."""
        offset, length = whole_number("offset", offset), whole_number("length", length)
        if offset < 0 or length < 0:
            raise self._backend.out_of_range(offset, length)
        return offset, length

    async def close(self) -> None:
        """Flush and close, as leaving the ``async with`` block does. Later requests raise NoMediumError."""
        with trio.CancelScope(shield=True):
            await self._backend.graph.close()


def open(
    image: Image,
    *,
    writable: bool = False,
    format: str | None = None,
    cache: Literal["writeback", "writethrough", "none", "directsync", "unsafe"] = "writeback",
    discard: Literal["unmap", "ignore"] = "unmap",
    detect_zeroes: Literal["off", "on", "unmap"] = "off",
    copy_on_read: bool = False,
    force_share: bool = False,
    allow_paths: Iterable[AnyPath] = (),
    allow_any_reference: bool = False,
) -> contextlib.AbstractAsyncContextManager[Disk]:
    """Open an image with its whole backing chain: ``async with fusedisk.open("vm.qcow2") as disk``.

    ``format`` is found out by the image's first bytes if not given; give it for raw images whose content is not yours.
    ``cache`` is one of QEMU's modes. ``discard="ignore"`` drops discards. ``detect_zeroes`` turns writes of zeroes into
    :meth:`Disk.write_zeroes`. ``copy_on_read`` keeps in the image what was read from its backing file; it needs
    ``writable``. ``force_share`` looks at an image that another process writes to; not with ``writable``. Backing files
    may lie in the image's own directory tree and in ``allow_paths``, anywhere with ``allow_any_reference``. Options
    inside ``image`` go before these.

    Entering the block raises HostError (missing, no access), ImageError (broken, unknown feature), LockConflictError
    (another process uses it), GateError (refused reference) or OptionError (wrong options), and RuntimeError outside
    trio. Leaving it flushes; where the flush fails, that raises.
    """
    mode = CACHE_MODES[choice("cache", cache, CACHE_MODES)]
    choice("discard", discard, ("unmap", "ignore"))
    choice("detect_zeroes", detect_zeroes, ("off", "on", "unmap"))
    if flag("copy_on_read", copy_on_read) and not flag("writable", writable):
        raise OptionError("copy_on_read keeps what is read in the image, so it needs writable=True.")
    config = NodeConfig(
        force_share=flag("force_share", force_share),
        cache_direct=mode.direct,
        cache_no_flush=mode.no_flush,
        discard=discard,
        detect_zeroes=detect_zeroes,
        copy_on_read=copy_on_read,
    )
    return _Opening(
        specification(image),
        text_or_none("format", format),
        flag("writable", writable),
        config,
        mode.write_cache,
        gate_for(allow_paths, allow_any_reference),
    )


class _Opening(contextlib.AbstractAsyncContextManager[Disk]):
    """What :func:`open` returns."""

    def __init__(
        self,
        specification: str | dict[str, Any],
        format: str | None,
        writable: bool,
        config: NodeConfig,
        write_cache: bool,
        gate: Gate,
    ) -> None:
        self._specification = specification
        self._format, self._writable, self._config = format, writable, config
        self._write_cache = write_cache
        self._gate = gate
        self._disk: Disk | None = None

    def __enter__(self) -> NoReturn:
        raise TypeError(
            "fusedisk.open(...) needs 'async with', in a trio task; with a plain 'with' use fusedisk.open_sync(...)."
        )

    def __exit__(self, *_: object) -> None:
        """Never called: Python looks for it before it calls ``__enter__``."""

    async def __aenter__(self) -> Disk:
        need_trio("open")
        await (forgotten := of_this_run()).close()  # it may be the same image
        graph = Graph(DRIVERS, self._gate)
        backend = await graph.open_backend(
            self._specification,
            writable=self._writable,
            format=self._format,
            config=self._config,
            write_cache=self._write_cache,
        )
        backend.name = backend.node.filename  # what errors call it
        try:
            await backend.require_keys()
        except BaseException:
            await backend.close()
            raise
        backend.warn_of_writing("open it read-only to avoid that")
        self._disk = Disk(backend, forgotten)
        return self._disk

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._disk is not None
        try:
            await self._disk.close()
        except FusediskError as failure:
            if exc is None:
                raise
            exc.add_note(f"while closing the disk: {failure}")


def need_trio(name: str) -> None:
    """Raise RuntimeError outside of a trio task, for the function ``name``."""
    if not trio.lowlevel.in_trio_task():
        raise RuntimeError(
            f"fusedisk.{name} is for trio (trio.run), and this is no task of it; with asyncio use "
            f"fusedisk.{name}_sync in asyncio.to_thread."
        )


def gate_for(allow_paths: Iterable[AnyPath], allow_any: bool) -> Gate:
    """What the arguments of these names allow images to refer to."""
    return Gate(paths("allow_paths", allow_paths), allow_any=flag("allow_any_reference", allow_any))


def specification(image: Image) -> str | dict[str, Any]:
    """What to open, as the graph takes it."""
    if isinstance(image, str):
        return parse_argument(text("the image", image))
    if isinstance(image, Mapping):
        return mapping("the image", image)
    return _plain_path("the image", image)


def _plain_path(name: str, given: AnyPath) -> str:
    """A path that is nothing else, unless it was given as text."""
    found = path(name, given)
    return f"./{found}" if has_protocol(found) and not isinstance(given, str) else found


def callback(progress: Callable[[int, int], None] | None) -> Callable[[int, int], None]:
    """The argument ``progress``. Raises TypeError."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress is of the type {type(progress).__name__}, expected a function.")
    return progress or no_progress


def text_or_none(name: str, value: str | None) -> str | None:
    """A string that has bytes, or None."""
    return None if value is None else text(name, value)


async def create(
    filename: AnyPath,
    format: str,
    size: int | str | None = None,
    *,
    backing: AnyPath | None = None,
    backing_format: str | None = None,
    options: Mapping[str, Any] | None = None,
    check_backing: bool = True,
    overwrite: bool = False,
    allow_paths: Iterable[AnyPath] = (),
    allow_any_reference: bool = False,
) -> None:
    """Make a new image with a disk of ``size`` bytes (or text such as ``"10G"``), rounded up to whole 512-byte sectors.

    ``overwrite`` allows to replace an existing file that is not empty, or the content of a block device; what another
    process uses is never replaced. ``backing`` is named as seen from the new image, needs
    ``backing_format``, and gives the size where none is given; ``check_backing=False`` does not look at it. ``options``
    are the format's (``cluster_size``, ``compat``, …); ``fusedisk create -f FORMAT -o help`` lists them.

    Raises OptionError, WouldLoseDataError, HostError, NoSpaceError, LockConflictError, and the errors of :func:`open`
    for the backing file; no new file stays behind then.
    """
    need_trio("create")
    given = {} if options is None else mapping("options", options)
    apart = {
        "size": size if size is None or isinstance(size, str) else whole_number("size", size),
        "backing_file": None if backing is None else path("backing", backing),
        "backing_fmt": text_or_none("backing_format", backing_format),
    }
    for key, value in apart.items():
        if value is not None:
            if key in given:
                raise OptionError(f"the option '{key}' of the new image is given twice.")
            given[key] = value
    format, filename = text("format", format), _plain_path("filename", filename)
    await create_image(
        DRIVERS,
        format,
        filename,
        given,
        gate=gate_for(allow_paths, allow_any_reference),
        check_backing=flag("check_backing", check_backing),
        overwrite=flag("overwrite", overwrite),
    )


async def amend(
    image: Image,
    options: Mapping[str, Any],
    *,
    format: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
    allow_paths: Iterable[AnyPath] = (),
    allow_any_reference: bool = False,
) -> None:
    """Give an image that nobody uses other settings; those that ``options`` does not name stay, and so does the data.

    ``image`` is what :func:`open` takes. ``options`` are those of its format (``size``, ``compat``, ``refcount_bits``,
    …); ``fusedisk amend -f FORMAT -o help`` lists them. ``force`` allows what may lose data. ``progress`` is called
    with how much is done and how much there is to do, in units that mean nothing.

    Raises OptionError and NotSupportedError for what cannot be changed, with nothing changed, PassphraseError where
    a key is missing or wrong, and the errors of :func:`open`.
    """
    need_trio("amend")
    await amend_image(
        DRIVERS,
        specification(image),
        mapping("options", options),
        format=text_or_none("format", format),
        force=flag("force", force),
        gate=gate_for(allow_paths, allow_any_reference),
        progress=callback(progress),
    )

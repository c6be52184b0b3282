"""A mount that this process serves itself, and changes while it serves: for programs that use trio.

>>> async with live.serve("vm.qcow2", "/mnt/disk") as mounted:
...     await mounted.add("other.qcow2", read_only=True)      # /mnt/disk/other appears
...     await mounted.change_medium("vm", "next.qcow2")       # open handles go on with the new content
...     await mounted.remove("other")

The process must not use the files in the task that runs trio: that would wait for itself. Do it in a thread
(``trio.to_thread.run_sync``) or in another process. ``fusedisk.mount`` leaves a daemon behind instead.
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal, Unpack, cast

import trio

from fusedisk.access import AccessOptions, ServingOptions, check_access
from fusedisk.api import Image
from fusedisk.arguments import AnyPath, choice, flag, mapping, path, paths, text, whole_number
from fusedisk.block.graph.cache_modes import CACHE_MODES
from fusedisk.block.graph.filenames import parse_argument
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError, NotMountedError, OperationBlockedError, OptionError
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.export import FileSettings
from fusedisk.export.names import check_name
from fusedisk.export.opening import THROW_AWAY, ImageRequest, OpenSettings, take_name
from fusedisk.export.registry import Registry
from fusedisk.mount import mountinfo, mountpoint, own_mount, runtime
from fusedisk.mount.export_records import export_record
from fusedisk.mount.operations import Operations
from fusedisk.mount.session import Session, mount_options
from fusedisk.mount.settings import Passthrough, ServeSettings

log = logging.getLogger(__name__)


_SWITCHES = ("read_only", "overlay", "copy_on_read", "force_share", "growable")


class ImageOptions(AccessOptions, total=False):
    """How to open images and show them; as the options of ``fusedisk mount``."""

    partitions: bool
    snapshots: bool
    growable: bool
    uid: int
    gid: int
    mode: int


class NewOptions(ImageOptions, total=False):
    """The same for new files."""

    name: str
    """Of the file, for one image."""


class ServeOptions(NewOptions, ServingOptions, total=False):
    """Options of :func:`serve`; those beside the ones of images are of the mount as a whole."""

    allow_other: Literal["off", "on", "auto"]


class LiveMount:
    """A mount of this process; made by :func:`serve`. Changes run one after the other.

    All methods raise a FusediskError where they fail; then nothing has changed. OperationBlockedError says what is in
    the way, NotMountedError that the mount is gone, since others may unmount it, too.
    """

    def __init__(self, registry: Registry, session: Session) -> None:
        self._files = registry
        self._session = session

    @property
    def _registry(self) -> Registry:
        """Raises NotMountedError once the mount is gone."""
        if not self._session.serving:
            raise NotMountedError(f"'{self._session.mountpoint}' is no longer mounted.")
        return self._files

    @property
    def mountpoint(self) -> str:
        """Where it is now."""
        return self._session.place()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all files, partitions and snapshots included."""
        return tuple(export.name for export in self._files)

    async def add(self, images: Image | Sequence[Image], **options: Unpack[NewOptions]) -> tuple[str, ...]:
        """Open one image or several, and show their files; returns the names of the files."""
        added = await self._registry.add(_requests(images, options), _open_settings(options))
        return tuple(export.name for export in added)

    async def remove(self, name: str, *, force: bool = False) -> None:
        """Flush a disk, take its files away and close it. Refused while one of them is open, unless ``force``: then the
        next request of an open handle fails with ESTALE."""
        await self._registry.remove(text("name", name), force=flag("force", force))

    async def change_medium(
        self, name: str, image: Image | None, *, force: bool = False, **options: Unpack[ImageOptions]
    ) -> None:
        """Put another image behind a file, None for no image: then reads fail with ENOMEDIUM. Open handles stay.

        Files of partitions and snapshots go with the old image, and come with the new one (``partitions=True``).
        Refused while one of those that go is open, unless ``force``.
        """
        request = None if image is None else _requests(image, options)[0]
        settings = _open_settings(options)
        await self._registry.change_medium(text("name", name), request, settings, force=flag("force", force))

    async def set_writable(self, name: str, writable: bool, *, force: bool = False) -> None:
        """Let a disk and its partitions be written to, or no longer. Taking that away is refused while one is open for
        writing, unless ``force``: then its writes fail with EROFS."""
        await self._registry.set_writable(text("name", name), flag("writable", writable), force=flag("force", force))

    async def resize(self, name: str, size: int) -> None:
        """Give a disk another length in bytes; loop devices on its file have it on return."""
        await self._registry.resize(text("name", name), whole_number("size", size))


@asynccontextmanager
async def serve(
    images: Image | Sequence[Image], place: AnyPath, **options: Unpack[ServeOptions]
) -> AsyncIterator[LiveMount]:
    """Mount images as flat raw files in the directory ``place``, or one image as the file ``place``, and serve them
    until the block ends: ``async with live.serve("vm.qcow2", "/mnt/disk") as mounted``.

    The end of the block flushes everything and unmounts. If something still uses the mount then, its handles fail from
    then on, and OperationBlockedError says who that was. A process serves one mount at a time.
    """
    global _serving
    if _serving:
        raise OperationBlockedError("this process serves a mount already, and can serve one only.")
    where = mountinfo.absolute(os.path.abspath(path("place", place)))
    requests, settings = _requests(images, options), _open_settings(options)
    allow_any = flag("allow_any_reference", options.get("allow_any_reference", False))
    allowed = tuple(os.path.abspath(item) for item in paths("allow_path", options.get("allow_path", ())))
    serving = _serve_settings(options)
    allow_other = mountpoint.allow_other(options.get("allow_other", "auto"))
    mountpoint.check_fuse()
    mountpoint.check_mountpoint(where, len(requests))
    graph = Graph(DRIVERS, Gate(allowed, allow_any=allow_any))
    _serving = True
    try:
        registry = Registry(graph)
        try:
            await registry.add(requests, settings)
            files = [name for export in registry for name in export.chain_files()]
            mountpoint.check_not_hidden(where, files)
            single = not os.path.isdir(where)
            operations = Operations(registry, single=single, kernel_cache=serving.kernel_cache)
            sources = [request.text for request in requests]
            read_only = not any(export.writable for export in registry)
            words = mount_options(sources, read_only=read_only, allow_other=allow_other)
            async with _mounted(registry, Session(where, operations, words, serving)) as mounted:
                yield mounted
        finally:
            with trio.CancelScope(shield=True):
                await graph.close()
    finally:
        _serving = False


_serving = False


@asynccontextmanager
async def _mounted(registry: Registry, session: Session) -> AsyncIterator[LiveMount]:
    """A mount with its record."""
    single = session.operations.single
    record = runtime.new_record(session.mountpoint, [export_record(export) for export in registry], single=single)
    record.write()
    try:
        session.start()
        try:
            record.device = session.device
            record.write()
            session.face.record = record
            async with _served(registry, session) as mounted:
                yield mounted
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(session.close)
    finally:
        record.remove()


@asynccontextmanager
async def _served(registry: Registry, session: Session) -> AsyncIterator[LiveMount]:
    obstacle = ""
    failure: BaseException | None = None
    try:
        async with trio.open_nursery() as nursery:
            ready = trio.Event()
            nursery.start_soon(session.serve, ready.set)
            await ready.wait()
            try:
                yield LiveMount(registry, session)
            except BaseException as exc:
                failure = exc
                raise
            finally:
                with trio.CancelScope(shield=True):
                    obstacle = await trio.to_thread.run_sync(_unmount, session)
                    if obstacle:
                        await _flush(registry)
                        session.stop()
    except BaseExceptionGroup as group:
        # The block's own error as it is, unless serving failed too.
        if len(group.exceptions) > 1:
            raise
        raise (failure or group.exceptions[0]) from None
    if obstacle:
        raise OperationBlockedError(f"'{session.mountpoint}' was {obstacle}: that fails from now on.")


def _unmount(session: Session) -> str:
    """Unmount; returns what is in the way, in words. Blocks."""
    place = session.place()
    found = own_mount.unmount_own(place, session.device)
    return own_mount.describe(place, found) if found is not None else ""


async def _flush(registry: Registry) -> None:
    for export in registry:
        if export.overlay != THROW_AWAY:
            try:
                await export.flush()
            except FusediskError as exc:
                log.error("flushing '%s' failed: %s", export.name, exc)


# --- options --------------------------------------------------------------------------------------------


def _requests(images: Image | Sequence[Image], options: Mapping[str, object]) -> list[ImageRequest]:
    several = isinstance(images, Sequence) and not isinstance(images, str | bytes)
    found = [_request(image) for image in cast(Sequence[Image], images if several else [images])]
    name = options.get("name")
    if name is not None:
        if len(found) > 1:
            raise OptionError("'name' is for one image; give each of several its own with 'name='.")
        found[0].name = check_name(text("name", name))
    return found


def _request(image: Image) -> ImageRequest:
    if isinstance(image, str):
        spec, name = take_name(parse_argument(image))
        return ImageRequest(image, spec, name)
    if isinstance(image, Mapping):
        spec, name = take_name(dict(mapping("the image", image)))
        return ImageRequest(str(spec), spec, name)
    named = os.path.abspath(path("the image", image))
    return ImageRequest(named, {"file": {"driver": "file", "filename": named}})


def _open_settings(options: ImageOptions) -> OpenSettings:
    """Raises OptionError for options that do not go together."""
    unknown = [name for name in options if name not in ServeOptions.__annotations__]
    if unknown:
        raise TypeError(f"there is no option '{unknown[0]}'.")

    def switch(name: str) -> bool:
        return flag(name, options.get(name, False))

    def file(name: str) -> str | None:
        given = options.get(name)
        return None if given is None else os.path.abspath(path(name, given))

    check_access({**options, **{name: switch(name) for name in _SWITCHES}}, str)
    return OpenSettings(
        format=options.get("format"),
        read_only=switch("read_only"),
        overlay=switch("overlay"),
        overlay_file=file("overlay_file"),
        copy_on_read=switch("copy_on_read"),
        detect_zeroes=choice("detect_zeroes", options.get("detect_zeroes", "off"), ("off", "on", "unmap")),
        discard=choice("discard", options.get("discard", "unmap"), ("ignore", "unmap")),
        cache=choice("cache", options.get("cache", "writeback"), tuple(CACHE_MODES)),
        force_share=switch("force_share"),
        partitions=switch("partitions"),
        snapshots=switch("snapshots"),
        key_file=file("key_file"),
        file=FileSettings(options.get("mode"), options.get("uid"), options.get("gid"), switch("growable")),
    )


def _serve_settings(options: ServeOptions) -> ServeSettings:
    passthrough = choice("passthrough", options.get("passthrough", "auto"), ("off", "auto", "on"))
    return ServeSettings(
        channel=choice("channel", options.get("channel", "auto"), ("auto", "off")) != "off",
        kernel_cache=choice("kernel_cache", options.get("kernel_cache", "auto"), ("auto", "off")) != "off",
        passthrough=Passthrough(passthrough),
    )

"""The daemon of a mount: the composition root, where graph, drivers, exports and the FUSE face come together.

Life: open the images, mount, be ready (a ``stat`` through the mount has been answered), serve until the mount is gone,
flush and close everything. SIGTERM, SIGINT and SIGHUP unmount as soon as the mount is not in use; SIGQUIT (which
``fusedisk umount --force`` sends) flushes and ends at once. If a file hangs, a daemon with nothing to lose ends all the
same; any other says what it waits for.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator
from typing import NoReturn

import trio

from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.cli import exit_codes
from fusedisk.cli.background import Report, notify_service_manager
from fusedisk.cli.last_resort import SignalWatch, after_grace
from fusedisk.cli.pid_file import PidFile
from fusedisk.compression.inflate_pool import allow_processes
from fusedisk.compression.inflated_cache import inflated_capacity
from fusedisk.core.errors import FusediskError, HostError, OptionError, host_error
from fusedisk.drivers.table import DRIVERS
from fusedisk.export.opening import THROW_AWAY, ImageRequest, OpenSettings
from fusedisk.export.registry import Registry
from fusedisk.mount import holders, memory_pressure, mountpoint, namespaces, own_mount, runtime
from fusedisk.mount.attachment import Attachment
from fusedisk.mount.export_records import export_record
from fusedisk.mount.loop_device import LoopSettings
from fusedisk.mount.operations import Operations
from fusedisk.mount.session import Session, mount_options
from fusedisk.mount.settings import ServeSettings

log = logging.getLogger(__name__)

_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT))
_RETRY = 1.0
"""Seconds between attempts to unmount what is in use by something other than our own file handles."""
_SWITCH_INTERVAL = 0.0002
"""Seconds after which a waiting thread gets Python's lock. Threads that inflate need it for a few microseconds between
two clusters, and would wait for Python's default of five milliseconds."""


@dataclasses.dataclass(slots=True)
class MountRequest:
    """The options of ``fusedisk mount``, checked as far as possible without opening anything. Paths are absolute.

    An option keeps its name all the way: in one of these groups, each for the package that needs it, and from there to
    the node or the export. Only ``cache`` is taken apart, by :meth:`.OpenSettings.config`.
    """

    images: list[ImageRequest]
    mountpoint: str
    settings: OpenSettings
    serve: ServeSettings = dataclasses.field(default_factory=ServeSettings)
    allow_other: bool = False
    allow_path: tuple[str, ...] = ()
    allow_any_reference: bool = False
    pid_file: str | None = None
    ready_fd: int | None = None
    loop: LoopSettings | None = None
    """The one file gets a loop device, which is part of being ready."""


def run_daemon(request: MountRequest, report: Report) -> int:
    """Serve a mount until it is gone; returns the exit code. ``report`` is called once, with success or failure."""
    return trio.run(Daemon(request, report).run, restrict_keyboard_interrupt_to_checkpoints=True)


class Daemon:
    """One mount, from opening its images to closing them."""

    def __init__(self, request: MountRequest, report: Report) -> None:
        self.request = request
        self._report: Report | None = report
        self.graph = Graph(DRIVERS, Gate(request.allow_path, allow_any=request.allow_any_reference))
        self.registry = Registry(self.graph)
        """The files of the mount; they may change while it serves."""
        self.session: Session | None = None
        self.record: runtime.MountRecord | None = None
        self._pid_file = PidFile(request.pid_file) if request.pid_file is not None else None
        self._failures: list[str] = []
        self._wrong_usage = False
        """Whether the first failure is about the options of the mount."""
        self._bug = False
        self._helpers: trio.Nursery
        self._attachment: Attachment | None = None
        """Set once the mount serves, unless it must end by then."""
        self._ending = False
        self._is_leaving = False
        """Whether it tries to unmount."""
        self._asked_to_end = False
        self._watch: SignalWatch

    async def run(self) -> int:
        """Open, mount, serve, close; returns the exit code."""
        memory_pressure.prepare()
        sys.setswitchinterval(_SWITCH_INTERVAL)
        allow_processes(inflated_capacity())
        with trio.open_signal_receiver(*_SIGNALS) as signals:
            self._watch = SignalWatch(_SIGNALS, self._stuck)
            async with trio.open_nursery() as nursery:
                self._helpers = nursery
                nursery.start_soon(self._obey, signals, nursery.cancel_scope)
                try:
                    await self._serve()
                except FusediskError as exc:
                    self._wrong_usage = isinstance(exc, OptionError) and not self._failures
                    self._fail(str(exc))
                except Exception as exc:
                    self._fail_by_bug("the mount ends", exc)
                finally:
                    with trio.CancelScope(shield=True):
                        await self._close()
                nursery.cancel_scope.cancel()
        if self._report is not None:
            sentence = "; ".join(self._failures) or "the mount was stopped before it was ready."
            self._tell(OptionError(sentence) if self._wrong_usage else HostError(sentence))
            return exit_codes.BUG if self._bug else exit_codes.FAILED
        return exit_codes.BUG if self._bug else exit_codes.FAILED if self._failures else 0

    async def _serve(self) -> None:
        request = self.request
        await self.registry.add(request.images, request.settings)
        files = [name for export in self.registry for name in export.chain_files()]
        mountpoint.check_not_hidden(request.mountpoint, files)
        os.chdir("/")
        single = not os.path.isdir(request.mountpoint)
        operations = Operations(
            self.registry,
            single=single,
            kernel_cache=request.serve.kernel_cache,
        )
        options = mount_options(
            [image.text for image in request.images],
            read_only=not any(export.writable for export in self.registry),
            allow_other=request.allow_other,
        )
        session = Session(request.mountpoint, operations, options, request.serve)
        self.record = self._make_record(single)
        self.record.write()
        session.start()
        self.session = session
        self.record.device = session.device
        self.record.write()
        session.face.record = self.record
        session.face.fixed = single or request.loop is not None
        await session.serve(self._ready)

    def _make_record(self, single: bool) -> runtime.MountRecord:
        return runtime.new_record(self.request.mountpoint, list(map(export_record, self.registry)), single=single)

    # --- ready ------------------------------------------------------------------------------------------

    def _ready(self) -> None:
        """Finish starting, now that the mount serves."""
        gc.collect()
        gc.freeze()
        if self.request.loop is None:
            self._announce()
        elif not self._ending:
            assert self.session is not None
            (export,) = self.registry
            path = os.path.join(self.session.place(), export.name)
            self._attachment = Attachment(export, path, self.request.loop)
            self._helpers.start_soon(self._attach, self._attachment)

    async def _attach(self, attachment: Attachment) -> None:
        assert self.record is not None
        try:
            self.record.loop = await attachment.attach()
            self.record.write()
        except FusediskError as exc:
            self._fail(str(exc))
        except Exception as exc:
            self._fail_by_bug("the mount ends", exc)
        else:
            self._announce()
            return
        await attachment.release()  # the device first: it cannot go while nobody serves its file
        assert self.session is not None
        self.session.stop()

    async def _release_loop(self) -> None:
        """Detach the loop device, also one that is about to be attached, and allow no other."""
        self._ending = True
        if self._attachment is not None:
            await self._attachment.settled.wait()
            await self._attachment.release()

    def _announce(self) -> None:
        """Announce that the mount is ready: pid file, --ready-fd, service manager and the starting command."""
        request = self.request
        try:
            if self._pid_file is not None:
                self._pid_file.write()
            if request.ready_fd is not None:
                _write_ready(request.ready_fd)
        except FusediskError as exc:
            self._fail(str(exc))
            assert self.session is not None
            self.session.stop()
            return
        notify_service_manager(f"READY=1\nMAINPID={os.getpid()}\nSTATUS=serving {request.mountpoint}")
        self._tell(None)

    def _tell(self, failure: FusediskError | None) -> None:
        if self._report is not None:
            report, self._report = self._report, None
            report(failure)

    # --- ending -----------------------------------------------------------------------------------------

    async def _obey(self, signals: AsyncIterator[int], opening: trio.CancelScope) -> None:
        """Handle signals."""
        async with trio.open_nursery() as nursery:
            async for number in signals:
                self._watch.heard()
                self._asked_to_end = True
                if self.session is None:
                    after_grace(self._late)
                    opening.cancel()
                elif number == signal.SIGQUIT:
                    nursery.start_soon(self._quit, self.session)
                elif not self._is_leaving:
                    self._is_leaving = True
                    nursery.start_soon(self._leave, self.session)

    async def _quit(self, session: Session) -> None:
        """Flush and end, although the mount is in use."""
        await self._release_loop()
        after_grace(self._late)
        await self._flush()
        session.stop()

    def _stuck(self, number: int) -> None:
        """The event loop did not take a signal. In another thread."""
        self._late()

    def _late(self) -> None:
        """Ending takes long: end at once where nothing is lost by that. In another thread."""
        if self.session is None:
            self._give_up("the mount was stopped before it was ready, while it waited for a file that does not answer.")
        if not any(export.writable for export in self.registry):
            self._give_up(f"'{self.request.mountpoint}' was ended while it waited for a file that does not answer.")
        log.warning(
            "'%s' still waits for the host to write to its images, and ends when that is done (SIGKILL ends it at "
            "once, and loses unwritten data).",
            self.request.mountpoint,
        )

    def _give_up(self, sentence: str) -> NoReturn:
        try:
            self._fail(sentence)
            self._tell(HostError(sentence))
            if self.record is not None:
                self._end_record(self.record)
            logging.shutdown()
        finally:
            os._exit(exit_codes.FAILED)

    async def _leave(self, session: Session) -> None:
        """Unmount as soon as the mount is neither in use nor covered; log what it waits for."""
        await self._release_loop()
        told = set()
        quiet_until = trio.current_time() + own_mount.VISIT
        while True:
            place = session.place()
            is_quiet = trio.current_time() < quiet_until
            try:
                obstacle = await trio.to_thread.run_sync(own_mount.unmount_own, place, session.device)
                if obstacle is None:
                    await self._tell_why_not_ended(session)
                    self._is_leaving = False  # another signal is answered again
                    return
                if not is_quiet and obstacle not in told:
                    told.add(obstacle)
                    found = await trio.to_thread.run_sync(own_mount.describe, place, obstacle)
                    log.warning(
                        "'%s' is %s: it will be unmounted when that is over (SIGQUIT ends it now).", place, found
                    )
            except FusediskError as exc:
                log.error("%s", exc)
                is_quiet = False
            with trio.move_on_after(own_mount.VISIT if is_quiet else _RETRY):
                await session.operations.released.wait()

    async def _tell_why_not_ended(self, session: Session) -> None:
        """Warn if the mount, which is gone here, still has users elsewhere."""
        found = await trio.to_thread.run_sync(namespaces.copies, session.device, abandon_on_cancel=True)
        if found:
            copies = holders.listed([str(copy) for copy in found])
            why = f"{copies}, until that ends ({found[0].way_to_unmount()})"
        elif opened := session.operations.open_files:
            why = f"{opened} open file{'s' if opened > 1 else ''}, until closed"
        else:
            return
        log.warning(
            "'%s' is unmounted, but its daemon (pid %d) goes on for %s: SIGQUIT ends it now.",
            session.mountpoint,
            os.getpid(),
            why,
        )

    async def _flush(self) -> None:
        for export in self.registry:
            if export.overlay == THROW_AWAY:  # it is to be lost
                continue
            try:
                await export.flush()
            except FusediskError as exc:
                self._fail(f"flushing '{export.name}' failed: {exc}")

    async def _close(self) -> None:
        """Flush and close the images, then release the mount and remove its record and pid file."""
        notify_service_manager("STOPPING=1")
        if self.record is not None and self.session is not None:
            self.record.closing = True
            self._write_record(self.record)
        notice = after_grace(self._late) if self._asked_to_end else None
        try:
            await self.graph.close()
        except FusediskError as exc:
            if self.session is not None and all(export.overlay == THROW_AWAY for export in self.registry):
                log.info("closing the throw-away layer failed, which loses nothing: %s", exc)
            else:
                self._fail(f"closing the images of '{self.request.mountpoint}' failed: {exc}")
        except Exception as exc:
            log.exception("a bug in fusedisk: closing the images failed")
            self._bug = True
            self._fail(f"closing the images failed: internal error: {type(exc).__name__}: {exc}")
        if notice is not None:
            notice.cancel()
        if self.session is not None:
            try:
                await trio.to_thread.run_sync(self.session.close)
            except FusediskError as exc:
                log.error("%s", exc)
        if self._pid_file is not None:
            self._pid_file.remove()
        if self.record is not None:
            self._end_record(self.record)

    def _end_record(self, record: runtime.MountRecord) -> None:
        """Remove the record, unless it holds an error that was not reported yet."""
        if self._failures and self._report is None:
            record.error = "; ".join(self._failures)
            self._write_record(record)
        else:
            record.remove()

    def _write_record(self, record: runtime.MountRecord) -> None:
        try:
            record.write()
        except FusediskError as exc:
            log.error("%s", exc)
        except Exception:
            log.exception("a bug in fusedisk: writing the record failed")
            self._bug = True

    def _fail_by_bug(self, what: str, exc: Exception) -> None:
        log.exception("a bug in fusedisk: %s", what)
        self._bug = True
        self._fail(f"internal error: {type(exc).__name__}: {exc}")

    def _fail(self, sentence: str) -> None:
        self._failures.append(sentence)
        if self._report is None:
            log.error("%s", sentence)


def _write_ready(fd: int) -> None:
    try:
        os.write(fd, b"ready\n")
        if fd > 2:  # the next file to be opened would become the standard stream
            os.close(fd)
    except OSError as exc:
        raise host_error(exc, f"/dev/fd/{fd}", "write to --ready-fd") from exc

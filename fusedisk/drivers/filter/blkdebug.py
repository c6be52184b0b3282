"""``blkdebug``: injects errors, suspends requests, and narrows limits, so that what hardly ever happens can be tested.

Formats announce their steps by named events (``Driver.debug_event`` of the node that they write to); rules
(:mod:`.blkdebug_rules`) arm errors at events, and breakpoints hold the request that reaches an event until ``resume``.
Without rules and breakpoints everything passes through.

Concurrent requests: the state is changed between awaits only. Source: QAPI's BlockdevOptionsBlkdebug and
docs/devel/blkdebug.txt of QEMU. Events that would cost every plain read or write something
(``read_aio``, and ``write_aio`` outside of allocations) do not occur.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import stat
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import trio

from fusedisk.block.graph.filenames import parse_filename
from fusedisk.block.model import permissions
from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.edge import Child
from fusedisk.block.model.extent import Extent
from fusedisk.block.model.flags import NO_FALLBACK, Buffer
from fusedisk.block.model.limits import Limits
from fusedisk.block.request.filter import FilterDriver
from fusedisk.core.errors import HostError, NoSpaceError, OptionError, host_error
from fusedisk.core.host_open import Found, kind_name
from fusedisk.core.offload import run_opening
from fusedisk.core.options import Options, option
from fusedisk.drivers.filter.blkdebug_rules import EVENTS, RULE_TYPES, InjectError, Rules, SetState, parse_config

_PERMISSIONS = {name.replace(" ", "-"): bit for bit, name in permissions.NAMES.items()}
_MAX_OPTION_SIZE = (1 << 31) - 1
"""QEMU keeps these options in an int."""


@dataclasses.dataclass(slots=True)
class BlkdebugOptions(Options):
    """Options of ``blkdebug``. Rules are lists of groups: ``inject-error.0.event=l2_update``."""

    config: str | None = option(None, kind="file", help="file with more rules, in QEMU's ini form")
    align: int = option(0, kind="size", help="required alignment of requests (default: the image's own)")
    max_transfer: int = option(0, kind="size", help="longest read or write")
    opt_write_zero: int = option(0, kind="size", help="alignment of write-zeroes")
    max_write_zero: int = option(0, kind="size", help="longest write-zeroes")
    opt_discard: int = option(0, kind="size", help="alignment of discards")
    max_discard: int = option(0, kind="size", help="longest discard")
    inject_error: tuple[InjectError, ...] = option((), kind="list", help="errors to inject")
    set_state: tuple[SetState, ...] = option((), kind="list", help="changes of state")
    take_child_perms: tuple[str, ...] = option((), kind="list", help="permissions to take on the image in addition")
    unshare_child_perms: tuple[str, ...] = option((), kind="list", help="permissions not to share on the image")

    @classmethod
    def parse(cls, given: Mapping[str, Any], owner: str) -> Self:
        """Lists here, everything else as for any driver. Raises OptionError."""
        plain = dict(given)
        lists: dict[str, tuple[Any, ...]] = {}
        for name, kind in RULE_TYPES.items():
            items = _list(plain.pop(name, None), f"{owner} option '{name}'")
            lists[name] = tuple(kind.read(item, f"{owner}'s {name}.{index}") for index, item in enumerate(items))
        for name in ("take-child-perms", "unshare-child-perms"):
            lists[name] = tuple(_list(plain.pop(name, None), f"{owner} option '{name}'"))
            if unknown := [item for item in lists[name] if item not in _PERMISSIONS]:
                raise OptionError(f"{owner}'s {name} has '{unknown[0]}', expected one of {', '.join(_PERMISSIONS)}.")
        parsed = super(BlkdebugOptions, cls).parse(plain, owner)
        for name, value in lists.items():
            setattr(parsed, name.replace("-", "_"), value)
        return parsed

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by QMP name."""
        found = super(BlkdebugOptions, self).given()
        for name in RULE_TYPES:
            if name in found:
                found[name] = [rule.given() for rule in found[name]]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _list(given: object, what: str) -> list[Any]:
    if given is None:
        return []
    if not isinstance(given, list):
        raise OptionError(f"{what} is '{given}', expected a list.")
    return given


class BlkdebugDriver(FilterDriver):
    """Passes everything through, as far as the rules allow."""

    name = "blkdebug"
    prefixes = ("blkdebug",)
    child_specs = (ChildSpec("image", Role.FILTERED),)
    options_type: ClassVar[type[Options]] = BlkdebugOptions
    moves_bytes = True

    rules: Rules

    def __init__(self, node: Any, options: Any) -> None:
        super().__init__(node, options)
        self._breakpoints: list[tuple[str, str]] = []
        self._suspended: dict[str, list[trio.Event]] = {}
        self._reached: dict[str, trio.Event] = {}

    @classmethod
    def parse_filename(cls, filename: str) -> dict[str, Any]:
        """``CONFIG:IMAGE``, where CONFIG may be empty."""
        # Imported here: the drivers' table imports this module.
        from fusedisk.drivers.table import DRIVERS

        config, colon, image = filename.partition(":")
        if not colon or not image:
            raise OptionError(f"'blkdebug:{filename}' is incomplete, expected blkdebug:CONFIG:IMAGE.")
        options: dict[str, Any] = {"image": parse_filename(image, DRIVERS)}
        return options | {"config": config} if config else options

    async def open(self) -> None:
        """Read the rules. Raises OptionError for invalid ones, HostError if the configuration file is unreadable."""
        options = self.options
        errors, changes = [], []
        if options.config is not None:
            groups = parse_config(await run_opening(_read_text, options.config), options.config)
            errors = [InjectError.read(group, f"'{options.config}'") for group in groups["inject-error"]]
            changes = [SetState.read(group, f"'{options.config}'") for group in groups["set-state"]]
        self._check_limits()
        self.rules = Rules([*errors, *options.inject_error], [*changes, *options.set_state])

    # --- limits and permissions -------------------------------------------------------------------------

    def _check_limits(self) -> None:
        options = self.options
        align = options.align or self.below.limits.request_alignment
        if options.align and (options.align & (options.align - 1) or options.align > _MAX_OPTION_SIZE):
            raise OptionError(f"blkdebug option 'align' is {options.align}, expected a power of two.")
        for name, unit in (
            ("max-transfer", align),
            ("opt-write-zero", align),
            ("max-write-zero", max(options.opt_write_zero, align)),
            ("opt-discard", align),
            ("max-discard", max(options.opt_discard, align)),
        ):
            value = getattr(options, name.replace("-", "_"))
            if value % unit or value > _MAX_OPTION_SIZE:
                raise OptionError(f"blkdebug option '{name}' is {value}, expected a multiple of {unit}.")

    def refresh_limits(self, limits: Limits) -> None:
        super().refresh_limits(limits)
        options = self.options
        limits.request_alignment = max(options.align, self.below.limits.request_alignment)
        limits.max_transfer = options.max_transfer or limits.max_transfer
        limits.zeroes_alignment = options.opt_write_zero or limits.zeroes_alignment
        limits.max_write_zeroes = options.max_write_zero or limits.max_write_zeroes
        limits.discard_alignment = options.opt_discard or limits.discard_alignment
        limits.max_discard = options.max_discard or limits.max_discard

    def child_permissions(self, child: Child, perm: int, shared: int) -> tuple[int, int]:
        perm, shared = super().child_permissions(child, perm, shared)
        for name in self.options.take_child_perms:
            perm |= _PERMISSIONS[name]
        for name in self.options.unshare_child_perms:
            shared &= ~_PERMISSIONS[name]
        return perm, shared

    # --- events and breakpoints -------------------------------------------------------------------------

    async def debug_event(self, event: str) -> None:
        """Arm rules, then wait at the breakpoints for the event, at one after the other."""
        self.rules.happen(event)
        for breakpoint in [item for item in self._breakpoints if item[0] == event]:
            self._breakpoints.remove(breakpoint)
            await self._suspend(breakpoint[1])

    async def _suspend(self, tag: str) -> None:
        resumed = trio.Event()
        waiting = self._suspended.setdefault(tag, [])
        waiting.append(resumed)
        self._reached.setdefault(tag, trio.Event()).set()
        try:
            await resumed.wait()
        finally:
            if resumed in waiting:
                waiting.remove(resumed)

    def set_breakpoint(self, event: str, tag: str) -> None:
        """Suspend the next request that reaches ``event``. Raises OptionError for an event that does not exist."""
        if event not in EVENTS:
            raise OptionError(f"there is no event '{event}', expected one of {', '.join(EVENTS)}.")
        self._breakpoints.append((event, tag))
        self._reached[tag] = trio.Event()

    def remove_breakpoint(self, tag: str) -> None:
        """Forget breakpoints of that tag and resume what waits there. Raises OptionError where there is neither."""
        left = [item for item in self._breakpoints if item[1] != tag]
        found = len(left) < len(self._breakpoints) or self.is_suspended(tag)
        self._breakpoints = left
        if not found:
            raise OptionError(f"no breakpoint has the tag '{tag}'.")
        for resumed in self._suspended.pop(tag, []):
            resumed.set()

    def resume(self, tag: str) -> None:
        """Let the request that waits at a breakpoint go on, the first of several. Raises OptionError if none does."""
        if not self.is_suspended(tag):
            raise OptionError(f"no request is suspended with the tag '{tag}'.")
        self._suspended[tag].pop(0).set()

    def is_suspended(self, tag: str) -> bool:
        """Whether a request waits at a breakpoint of that tag."""
        return bool(self._suspended.get(tag))

    async def wait_suspended(self, tag: str) -> None:
        """Wait until a request has reached the breakpoint."""
        await self._reached.setdefault(tag, trio.Event()).wait()

    # --- requests ---------------------------------------------------------------------------------------

    async def _check(self, iotype: str, offset: int = 0, length: int = 0) -> None:
        """Raise the error that the rules have for a request."""
        rule = self.rules.strike(iotype, offset, length)
        if rule is None:
            return
        if not rule.immediately:
            await trio.lowlevel.checkpoint()
        kind = NoSpaceError if rule.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
        raise kind(
            f"A {iotype} of '{self.node.filename}' failed on purpose (blkdebug rule): {os.strerror(rule.errno)}",
            errno=rule.errno,
        )

    async def preadv(self, offset: int, buffers: Sequence[Buffer]) -> None:
        for buffer in buffers:
            await self._check("read", offset, len(buffer))
            await super().preadv(offset, (buffer,))
            offset += len(buffer)

    async def pwritev(self, offset: int, buffers: Sequence[Buffer], flags: int) -> None:
        await self.debug_event("pwritev")
        await self._check("write", offset, sum(map(len, buffers)))
        await super().pwritev(offset, buffers, flags)
        await self.debug_event("pwritev_done")

    async def map(self, offset: int, length: int) -> Extent:
        await self._check("block-status", offset, length)
        return await super().map(offset, length)

    async def write_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self.debug_event("pwritev_zero")
        await self._check("write-zeroes", offset, length)
        # NO_FALLBACK: if the child cannot zero, the core writes zeroes through this node, so the rules see the writes.
        await super().write_zeroes(offset, length, flags | NO_FALLBACK)

    async def discard(self, offset: int, length: int) -> None:
        await self._check("discard", offset, length)
        await super().discard(offset, length)

    async def flush(self, flush_layers: Callable[[], Awaitable[None]]) -> None:
        await self._check("flush")
        await flush_layers()


def _read_text(filename: str) -> str:
    """The text of a configuration file. Blocks."""
    try:
        with Found(filename) as found:
            if not stat.S_ISREG(found.mode):
                raise OptionError(
                    f"the blkdebug configuration '{filename}' is {kind_name(found.mode)}, not a regular file."
                )
            with open(found.open(os.O_RDONLY), encoding="utf-8", errors="surrogateescape") as file:
                return file.read()
    except OSError as exc:
        raise host_error(exc, filename, "read the blkdebug configuration") from exc
    except ValueError as exc:
        raise OptionError(f"{filename!r} is not a valid path: {exc}.") from exc

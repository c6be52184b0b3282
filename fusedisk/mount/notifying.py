"""Tells the kernel what it must forget.

A notification may have to wait for locks of the kernel's that are held by a request which waits for our answer. So all
but the one about attributes alone are written in a thread, and the event loop goes on answering. What still waits when
the mount ends is left alone: closing the connection wakes it up.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TypeVarTuple, Unpack

import pyfuse3
import trio
from pyfuse3 import FileNameT, InodeT

from fusedisk.export.names import ROOT_INODE
from fusedisk.mount import wire
from fusedisk.mount.channel import Channel

log = logging.getLogger(__name__)

_Args = TypeVarTuple("_Args")


class Notifier:
    """The way to the kernel of one mount; without a ``channel`` that is pyfuse3."""

    def __init__(self) -> None:
        self.channel: Channel | None = None
        self._waiting: set[trio.CancelScope] = set()
        self._ended = False

    def end(self) -> None:
        """The mount ends: nobody answers the kernel any more, so nothing may wait for it."""
        self._ended = True
        for scope in self._waiting:
            scope.cancel()

    async def in_thread(self, function: Callable[[Unpack[_Args]], object], *args: *_Args) -> None:
        """Run in a thread what may wait for our own answers; left alone there when the mount ends. Raises what it
        raises."""
        with trio.CancelScope() as scope:
            if self._ended:
                return
            self._waiting.add(scope)
            try:
                await trio.to_thread.run_sync(function, *args, abandon_on_cancel=True)
            finally:
                self._waiting.discard(scope)

    async def drop_pages(self, inode: int) -> None:
        """Make the kernel drop its pages and attributes of a file. It writes back what was changed in memory first."""
        await self.in_thread(self.invalidate, inode, False)

    async def delete(self, name: str, inode: int) -> None:
        """Make the kernel forget the name of a removed file. Programs that watch the file (inotify) learn of it."""
        await self.in_thread(self._delete, os.fsencode(name), inode)

    def invalidate(self, inode: int, attributes_only: bool) -> None:
        """Make the kernel drop what it has cached of a file. Blocks, unless ``attributes_only``."""
        try:
            if self.channel is not None:
                body = wire.INVALIDATE_INODE.pack(inode, -1 if attributes_only else 0, 0)
                self.channel.notify(wire.NOTIFY_INVALIDATE_INODE, body)
            else:
                pyfuse3.invalidate_inode(InodeT(inode), attributes_only)
        except OSError as exc:  # ENOENT: the kernel does not know the inode
            log.debug("invalidating inode %d: %s", inode, exc)

    def _delete(self, name: bytes, inode: int) -> None:
        try:
            if self.channel is not None:
                body = wire.DELETE_ENTRY.pack(ROOT_INODE, inode, len(name), 0) + name + b"\0"
                self.channel.notify(wire.NOTIFY_DELETE, body)
            else:
                pyfuse3.invalidate_entry(InodeT(ROOT_INODE), FileNameT(name), InodeT(inode))
        except OSError as exc:  # ENOENT: the kernel does not know the name
            log.debug("deleting %r: %s", name, exc)

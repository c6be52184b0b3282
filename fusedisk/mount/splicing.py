"""Gets between libfuse and the kernel: libfuse keeps its descriptor's number, we take over the connection behind it.

libfuse reads and writes whole messages on one descriptor and does not care what that is. So after it has mounted, the
number is given to one end of a socket pair that keeps messages apart, and the connection to the kernel is ours.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import NamedTuple

from fusedisk.core.errors import HostError

FUSE_DEVICE = "/dev/fuse"
_SOCKET_BUFFER = 8 << 20
_SO_SNDBUFFORCE = 32


class Spliced(NamedTuple):
    """The two sides of the channel."""

    device: int
    """The kernel's."""
    library: socket.socket
    """libfuse's."""


def fuse_descriptors() -> set[int]:
    """Return the descriptors of this process that are connections to the kernel's FUSE."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == FUSE_DEVICE:
                found.add(int(name))
    return found


def splice(before: set[int]) -> Spliced:
    """Take over the one connection that is not in ``before``. Raises HostError, with nothing changed, if that is not
    possible."""
    try:
        new = fuse_descriptors() - before
    except OSError as exc:
        raise HostError(f"'/proc/self/fd', which tells libfuse's descriptor, cannot be read: {exc.strerror}.") from exc
    if len(new) != 1:
        raise HostError(f"libfuse has {len(new)} new descriptors of '{FUSE_DEVICE}', expected one.")
    (number,) = new
    with contextlib.ExitStack() as undo:
        try:
            device = os.dup(number)
            undo.callback(os.close, device)
            os.set_blocking(device, False)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(ours.close)
            with theirs:
                for end in (ours, theirs):
                    end.setblocking(False)
                    _widen(end)
                os.dup2(theirs.fileno(), number, inheritable=False)
        except OSError as exc:
            raise HostError(f"libfuse's descriptor cannot be replaced by a socket: {exc.strerror}.") from exc
        undo.pop_all()
    return Spliced(device, ours)


def _widen(end: socket.socket) -> None:
    """Let many replies wait in a socket; root may exceed the system's limit."""
    try:
        end.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SOCKET_BUFFER)
    except OSError:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)

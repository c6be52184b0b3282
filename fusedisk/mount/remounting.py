"""Makes a mount read-only, and writable again, as ``mount -o remount`` does. Blocks.

This changes only what the kernel allows: the images stay open as they are, and locked.
"""

from __future__ import annotations

import ctypes
import errno
import os

from fusedisk.core.errors import HostError, OperationBlockedError
from fusedisk.mount import holders
from fusedisk.mount.mountinfo import Mount

_RDONLY, _REMOUNT = 0x1, 0x20
_FLAGS = {
    "nosuid": 0x2,
    "nodev": 0x4,
    "noexec": 0x8,
    "noatime": 0x400,
    "nodiratime": 0x800,
    "relatime": 0x200000,
    "nosymfollow": 0x100,
}
"""What a mount is made with, and keeps (mount(2))."""


def remount(mount: Mount, *, read_only: bool) -> None:
    """Raises OperationBlockedError where files are open for writing, and HostError."""
    flags = _REMOUNT | (_RDONLY if read_only else 0)
    for name in mount.flags.split(","):
        flags |= _FLAGS.get(name, 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(mount.mountpoint), None, ctypes.c_ulong(flags), None) == 0:
        return
    code = ctypes.get_errno()
    if code == errno.EBUSY:
        raise OperationBlockedError(
            f"'{mount.mountpoint}' stays writable, as a file on it is open for writing: it is "
            f"{holders.describe(mount)}."
        )
    raise HostError(f"Could not remount '{mount.mountpoint}': {os.strerror(code)}", errno=code)

"""The error tree.

Every error that is meant for a user or for a caller's errno is one of these classes. Anything else that
escapes a driver is a bug: it is logged with its traceback at the border (mount, command line) and costs the
one request that met it.

A message is one sentence that says what was found and what was expected, and where it helps the next step.
Where in the graph it happened (node, operation, offset, length) is attached once on the way up by
:meth:`FusediskError.at` and shown by ``str()``.
"""

from __future__ import annotations

import errno as _errno
import os


class FusediskError(Exception):
    """Base of all expected errors.

    ``errno`` is what a POSIX caller sees, ``qmp_class`` what a QMP client sees.
    """

    errno: int = _errno.EIO
    qmp_class: str = "GenericError"

    def __init__(self, message: str, *, errno: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if errno is not None:
            self.errno = errno
        self.node: str | None = None
        self.operation: str | None = None
        self.offset: int | None = None
        self.length: int | None = None

    def at(self, node: str, operation: str, offset: int | None = None, length: int | None = None) -> FusediskError:
        """Attach where it happened, unless something nearer to the cause already did; returns self."""
        if self.node is None:
            self.node, self.operation, self.offset, self.length = node, operation, offset, length
        return self

    def __str__(self) -> str:
        return self.message

    def where(self) -> str:
        """``node 'x', write of 4096 bytes at 65536``, or an empty string where nothing was attached."""
        if self.node is None:
            return ""
        text = f"node '{self.node}', {self.operation}"
        if self.length is not None:
            text += f" of {self.length} bytes"
        if self.offset is not None:
            text += f" at {self.offset}"
        return text


class OptionError(FusediskError):
    """An option is unknown, malformed or contradicts another; on the command line this is wrong usage."""

    errno = _errno.EINVAL


class WouldLoseDataError(FusediskError):
    """It would lose what is stored, and the caller has not allowed that."""

    errno = _errno.EPERM


class NotMountedError(FusediskError):
    """Nothing of ours is mounted or attached there."""

    errno = _errno.ENOENT


class OutOfRangeError(FusediskError):
    """A request lies outside the disk."""

    errno = _errno.EINVAL


class NotSupportedError(FusediskError):
    """The driver or the host cannot do this operation; the core may emulate it."""

    errno = _errno.EOPNOTSUPP


class ReadOnlyError(FusediskError):
    """A write to a read-only node."""

    errno = _errno.EROFS


class NodeNotFoundError(FusediskError):
    """No node of that name."""

    errno = _errno.ENOENT
    qmp_class = "DeviceNotFound"


class SnapshotNotFoundError(FusediskError):
    """No internal snapshot of that id or name."""

    errno = _errno.ENOENT


class NoMediumError(FusediskError):
    """The node has no medium, or was closed."""

    errno = _errno.ENOMEDIUM


class NoSpaceError(FusediskError):
    """The host has no room for an allocation."""

    errno = _errno.ENOSPC


class PermissionConflictError(FusediskError):
    """Two users of one node need and refuse the same permission."""

    errno = _errno.EPERM


class OperationBlockedError(FusediskError):
    """A named blocker with a reason forbids the operation."""

    errno = _errno.EBUSY


class LockConflictError(FusediskError):
    """Another process holds an image lock that excludes us."""

    errno = _errno.EAGAIN


class GateError(FusediskError):
    """An image refers to a file that it may not refer to."""

    errno = _errno.EPERM


class PassphraseError(FusediskError):
    """No key slot of an encrypted image opens with the passphrase."""

    errno = _errno.EACCES


class ImageError(FusediskError):
    """The image's bytes are not what its format asks for."""

    errno = _errno.EINVAL


class UnsupportedFeatureError(ImageError):
    """The image uses a feature that this driver does not know; the message names it."""

    errno = _errno.ENOTSUP


class CorruptImageError(ImageError):
    """Corruption met while the image is in use; the node is fenced against writes."""

    errno = _errno.EIO


class HostError(FusediskError):
    """A host system call failed; ``errno`` is the host's."""


def host_error(exc: OSError, filename: str, doing: str) -> FusediskError:
    """The error for a failed host call: ``Could not open 'x.qcow2': No such file or directory``.

    ``doing`` completes "Could not …", for example "open" or "write to". ENOSPC and EDQUOT become
    :class:`NoSpaceError`.
    """
    code = exc.errno or _errno.EIO
    message = f"Could not {doing} '{filename}': {os.strerror(code)}"
    if code in (_errno.ENOSPC, _errno.EDQUOT):
        return NoSpaceError(message, errno=code)
    return HostError(message, errno=code)

"""The errors of the library: every expected failure is a subclass of :class:`FusediskError`."""

from __future__ import annotations

from fusedisk.core.errors import (
    CorruptImageError,
    FusediskError,
    GateError,
    HostError,
    ImageError,
    LockConflictError,
    NodeNotFoundError,
    NoMediumError,
    NoSpaceError,
    NotMountedError,
    NotSupportedError,
    OperationBlockedError,
    OptionError,
    OutOfRangeError,
    PassphraseError,
    PermissionConflictError,
    ReadOnlyError,
    SnapshotNotFoundError,
    UnsupportedFeatureError,
    WouldLoseDataError,
)

__all__ = [
    "CorruptImageError",
    "FusediskError",
    "GateError",
    "HostError",
    "ImageError",
    "LockConflictError",
    "NoMediumError",
    "NoSpaceError",
    "NodeNotFoundError",
    "NotMountedError",
    "NotSupportedError",
    "OperationBlockedError",
    "OptionError",
    "OutOfRangeError",
    "PassphraseError",
    "PermissionConflictError",
    "ReadOnlyError",
    "SnapshotNotFoundError",
    "UnsupportedFeatureError",
    "WouldLoseDataError",
]

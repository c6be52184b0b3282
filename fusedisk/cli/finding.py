"""Which mount a user means by the name of an image."""

from __future__ import annotations

import os
from collections.abc import Iterable

from fusedisk.core import paths
from fusedisk.mount import runtime
from fusedisk.mount.runtime import MountRecord


def mounts_of_image(records: Iterable[MountRecord], image: str) -> list[MountRecord]:
    """The mounts of an image: of the file that it is now, whatever it was called then, or else of its name."""
    records = list(records)
    identity = runtime.file_identity(image)
    if identity is not None:
        # A daemon has its file open, so that no other file can have become it.
        found = [
            record for record in records if record.alive and any(export.file == identity for export in record.exports)
        ]
        if found:
            return found
    return [record for record in records if _is_named(record, image)]


def _is_named(record: MountRecord, image: str) -> bool:
    names = {export.image for export in record.exports}
    return image in names or paths.real(image) in {os.path.realpath(name) for name in names if os.path.isabs(name)}

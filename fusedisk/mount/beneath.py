"""Files that were replaced, renamed or removed while a mount stands on them. Blocks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from fusedisk.mount.runtime import ExportRecord, MountRecord


class ChangedFile(NamedTuple):
    """A file that is not any more what its name leads to."""

    name: str
    replaced: bool
    """Whether the name leads to another file now; otherwise to none."""
    now: str | None
    """The current name of the file, None if that is unknown or it has none."""
    nameless: bool
    """Whether it has no name any more, and is gone when the mount is."""
    written: bool
    """Whether the mount writes to it."""

    @property
    def state(self) -> str:
        """In one word."""
        return "replaced" if self.replaced else "removed" if self.now is None else "renamed"

    def __str__(self) -> str:
        """``'vm.qcow2' was replaced by another file``."""
        how = {"replaced": "replaced by another file", "removed": "removed", "renamed": f"renamed to '{self.now}'"}
        return f"'{self.name}' was {how[self.state]}"


def changed_files(record: MountRecord, export: ExportRecord) -> list[ChangedFile]:
    """The files of a disk that have changed beneath a mount. Only mounts of this user are looked at: a path in
    another user's record may lead anywhere, such as into a filesystem that hangs."""
    if record.owner != os.geteuid() or record.hidden or not record.alive:
        return []
    return list(_changed(record, export))


def _changed(record: MountRecord, export: ExportRecord) -> Iterator[ChangedFile]:
    opened = _open_files(record.pid)
    for name, identity in export.files.items():
        # The kernel tells under which name it knows an open file, so that nothing needs to be asked of a filesystem,
        # which may hang, but where that is another one.
        if name in opened.values():
            continue
        try:
            found = _identity(record.reached(name))
        except OSError:
            continue  # nobody knows
        if found == identity:
            continue
        for fd, now in opened.items():
            with contextlib.suppress(OSError):
                if _identity(fd) == identity:
                    is_gone = now.endswith(" (deleted)")
                    nameless = is_gone and os.stat(fd).st_nlink == 0
                    yield ChangedFile(
                        name, found is not None, None if is_gone else now, nameless, name in export.written
                    )
                    break


def _open_files(pid: int) -> dict[str, str]:
    """Yield the open files of a process: links in /proc, and the names that they lead to."""
    folder = f"/proc/{pid}/fd"
    found = {}
    with contextlib.suppress(OSError):
        for fd in os.listdir(folder):
            with contextlib.suppress(OSError):
                name = os.readlink(f"{folder}/{fd}")
                if name.startswith("/"):
                    found[f"{folder}/{fd}"] = name
    return found


def _identity(path: str) -> str | None:
    """As in a record, None where there is no file. Raises OSError where that cannot be found out."""
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return f"{found.st_dev}:{found.st_ino}"

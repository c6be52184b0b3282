"""Images attached to loop devices for tests, always detached again."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fusedisk.mount import loop_device, runtime
from tests.conftest import require_fuse, require_root
from tests.support.commands import fusedisk_process
from tests.support.images import with_format


class Attachments:
    """Attaches images that lie below a folder; ``close`` detaches whatever is left, come what may."""

    def __init__(self, folder: Path) -> None:
        require_root()
        require_fuse()
        self._folder = folder

    def attach(self, *args: str | os.PathLike[str]) -> str:
        """``fusedisk attach``, which must succeed and say nothing but the name of the device."""
        done = fusedisk_process("attach", *with_format(*args))
        assert (done.code, done.err) == (0, ""), done
        assert done.out.startswith("/dev/loop")
        return done.out.strip()

    def detach(self, *args: str | os.PathLike[str]) -> None:
        """``fusedisk detach``, which must succeed and say nothing."""
        done = fusedisk_process("detach", *args)
        assert (done.code, done.out, done.err) == (0, "", "")

    def records(self) -> list[runtime.MountRecord]:
        """The mounts of images below the folder."""
        return [
            record
            for record in runtime.records()
            if any(export.image.startswith(f"{self._folder}/") for export in record.exports)
        ]

    def record(self, device: str) -> runtime.MountRecord:
        """The mount below a device."""
        (found,) = [record for record in self.records() if record.loop == device]
        return found

    def file(self, device: str) -> Path:
        """The mount's file that a device stands on."""
        path = loop_device.backing_file(device)
        assert path is not None
        return Path(path)

    def close(self) -> None:
        """Detach everything."""
        for record in self.records():
            if record.loop is not None:
                fusedisk_process("detach", "--force", "--timeout", "20", record.loop)
            elif record.mountpoint.startswith(f"{runtime.directory()}/"):
                fusedisk_process("umount", "--force", "--timeout", "20", record.mountpoint)


@contextlib.contextmanager
def attachments_below(folder: Path) -> Iterator[Attachments]:
    """Attachments that are all gone when the block ends.

    Tests take turns, also those of other processes: a device and a place to mount on that are free again belong to the
    next test at once, and a test could not tell that they were free.
    """
    found = Attachments(folder)
    with open(f"{tempfile.gettempdir()}/fusedisk-attachments.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        try:
            yield found
        finally:
            found.close()


def traces(name: str) -> set[str]:
    """What attaching an image whose disk is called ``name`` makes: directories to mount on that are not of a mount of
    another disk, and loop devices. Other tests attach at the same time, and their directories have no record for a
    moment, so a test waits until there is no more than before."""
    places = {place for place in os.listdir(runtime.directory()) if place.startswith("attached")}
    others = {
        os.path.basename(record.mountpoint)
        for record in runtime.records()
        if name not in [export.name for export in record.exports]
    }
    return places - others | {device for device, path in loop_device.devices() if os.path.basename(path) == name}

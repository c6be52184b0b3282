"""The gate for implicit file references.

An image is input of unknown origin, yet its header may name other files to open: a backing file, a data file. By
default only files in the directory tree of the image that names them may be opened that way, or what the user named;
everything else is refused with a sentence that says which reference it was.

A name is worth nothing here: between a look at it and the open, another user may put a symbolic link in its place. So
the name is opened first, as a descriptor that neither reads nor writes (O_PATH), and the gate judges that descriptor:
the file must be found again, without any link, below an allowed directory. That very file is then opened for use.
Directories are known by their numbers as well as by their paths, so one that takes the place of an allowed directory is
not allowed in its stead. What cannot be told apart from a file of the tree is a hard link to a file outside of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import stat
from collections.abc import Iterable
from typing import TYPE_CHECKING, NoReturn

from fusedisk.core.errors import GateError
from fusedisk.core.host_open import Identity, descriptor_path, identity

if TYPE_CHECKING:
    from fusedisk.block.model.driver import Driver

_LOOK = os.O_PATH | os.O_CLOEXEC


@dataclasses.dataclass(slots=True, frozen=True)
class Root:
    """A file that references may lead to, or a directory with everything below it."""

    path: str
    """Its path when it was looked up, without symbolic links."""
    identity: Identity

    def holds(self, fd: int) -> bool:
        """Whether the file behind a descriptor is this root, or lies below it now. Blocks."""
        found = identity(os.fstat(fd))
        if found == self.identity:
            return True
        with contextlib.suppress(OSError):
            start, path = self.path.rstrip("/") + "/", descriptor_path(fd)
            return path.startswith(start) and self._finds(path.removeprefix(start), found)
        return False

    def _finds(self, path: str, wanted: Identity) -> bool:
        """Whether a relative path leads from here to the file, through directories only. Raises OSError."""
        *parents, name = path.split("/")
        folder = os.open(self.path, _LOOK | os.O_DIRECTORY)
        try:
            if identity(os.fstat(folder)) != self.identity:
                return False
            for parent in parents:
                below = os.open(parent, _LOOK | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
                os.close(folder)
                folder = below
            return identity(os.stat(name, dir_fd=folder, follow_symlinks=False)) == wanted
        finally:
            os.close(folder)


class Gate:
    """Decides which references of images may be followed.

    ``allowed`` are files and directories (with everything below) that the user named; ``allow_any`` opens the gate.
    """

    def __init__(self, allowed: Iterable[str] = (), *, allow_any: bool = False) -> None:
        self.allow_any = allow_any
        self.roots: list[Root] = []
        for path in allowed:
            self.allow(path)

    def allow(self, path: str) -> None:
        """Allow this file or directory, which the user named; a missing one allows nothing. Blocks."""
        with contextlib.suppress(OSError, ValueError):
            fd = os.open(path, _LOOK)
            try:
                self.roots.append(Root(descriptor_path(fd), identity(os.fstat(fd))))
            finally:
                os.close(fd)


@dataclasses.dataclass(slots=True, frozen=True)
class ImageReference:
    """A file name in an image's header, and what it may open. Nodes opened because of it carry it."""

    gate: Gate
    image: str
    """The image, for messages."""
    text: str
    """The name as the image has it."""
    home: Root | None
    """The image's directory, None if the image is not a file of the host."""

    def check_driver(self, driver: Driver) -> None:
        """Raise GateError for a driver that images may not name, and for options that read another file, such as one
        with a passphrase: only the user may set those."""
        if self.gate.allow_any:
            return
        if not driver.may_be_named():
            self._refuse(f"uses the driver '{driver.name}'; images may name local files only")
        for name, field in driver.options.names().items():
            if field.metadata.get("kind") == "file" and getattr(driver.options, field.name) is not None:
                self._refuse(f"sets the option '{name}', which is for the user to set")

    def check_node(self, name: str) -> None:
        """Raise GateError: an image may not use nodes that are open already, since they may be other people's disks."""
        if not self.gate.allow_any:
            self._refuse(f"uses the node '{name}'; images may name local files only")

    def check_file(self, fd: int) -> None:
        """Raise GateError unless the file behind a descriptor may be opened. Blocks."""
        roots = [self.home] if self.home is not None else []
        if self.gate.allow_any or any(root.holds(fd) for root in (*roots, *self.gate.roots)):
            return
        try:
            path = descriptor_path(fd)
        except OSError:
            self._refuse("cannot be compared with the image's own directory, as /proc is missing")
        place = path if stat.S_ISBLK(os.fstat(fd).st_mode) else os.path.dirname(path)
        raise GateError(
            f"'{self.image}' refers to '{self.text}', which lies outside the image's own directory "
            f"(allow it with --allow-path {place} if you trust the image)."
        )

    def _refuse(self, what: str) -> NoReturn:
        raise GateError(
            f"'{self.image}' refers to '{self.text}', which {what} "
            "(allow it with --allow-any-reference if you trust the image)."
        )


def home_of(fd: int | None) -> Root | None:
    """Return the directory of the file behind a descriptor. None if the file was removed, and for a device, which must
    not lead to the other devices in ``/dev``. Blocks."""
    if fd is None or stat.S_ISBLK(os.fstat(fd).st_mode):
        return None
    with contextlib.suppress(OSError):
        folder = os.open(os.path.dirname(descriptor_path(fd)), _LOOK | os.O_DIRECTORY)
        try:
            home = Root(descriptor_path(folder), identity(os.fstat(folder)))
        finally:
            os.close(folder)
        return home if home.holds(fd) else None
    return None

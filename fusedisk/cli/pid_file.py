"""The pid file of a daemon, which may be root's and lie where everybody can write: never written or removed through
a symbolic link that somebody else has put there.

Links are followed here, one by one and each by the descriptor that was looked at, since whether the kernel protects
them depends on how it is set up (``protected_symlinks`` in proc_sys_fs(5)). All of it blocks for a moment.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator

from fusedisk.core.errors import FusediskError, OptionError, host_error
from fusedisk.mount import runtime

log = logging.getLogger(__name__)

_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_MOST_LINKS = 40
"""What Linux follows."""


class PidFile:
    """The file at an absolute path that holds this process's number from ``write`` to ``remove``."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._content = f"{os.getpid()}\n".encode()
        self._written: tuple[int, int] | None = None
        """Device and inode of what we wrote."""

    def write(self) -> None:
        """Put the file in its place, all or nothing. Raises OptionError, also where a link is not to be followed, and
        HostError."""
        runtime.check_pid_file(self._path)
        try:
            with _followed(self._path) as (directory, name):
                self._written = self._replace(directory, name)
        except OSError as exc:
            raise host_error(exc, self._path, "write the pid file") from exc

    def _replace(self, directory: int, name: str) -> tuple[int, int]:
        temporary = f"{name}.{os.urandom(4).hex()}"
        with open(os.open(temporary, _CREATE, 0o666, dir_fd=directory), "wb") as file:
            try:
                file.write(self._content)
                file.flush()
                os.replace(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                os.unlink(temporary, dir_fd=directory)
                raise
            return _identity(file.fileno())

    def remove(self) -> None:
        """Take the file away, if it is the one that was written."""
        if self._written is None:
            return
        try:
            with _followed(self._path) as (directory, name):
                with open(os.open(name, _READ, dir_fd=directory), "rb") as file:
                    # The inode may have been given to the file of another daemon since.
                    ours = _identity(file.fileno()) == self._written and file.read() == self._content
                if ours:
                    os.unlink(name, dir_fd=directory)
        except (OSError, FusediskError) as exc:
            log.debug("the pid file '%s' could not be removed: %s", self._path, exc)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


@contextlib.contextmanager
def _followed(path: str) -> Iterator[tuple[int, str]]:
    """The directory, as a descriptor, and the name in it that an absolute path leads to; nothing needs to be there.
    Raises OSError, and OptionError for a link that somebody else may have planted."""
    with contextlib.ExitStack() as opened:

        def look(name: str, directory: int | None = None) -> int:
            fd = os.open(name, _LOOK, dir_fd=directory)
            opened.callback(os.close, fd)
            return fd

        here = root = look("/")
        names, links = _names(path), 0
        while names:
            name = names.pop()
            try:
                found = look(name, here)
            except FileNotFoundError:
                if names:
                    raise
                break
            if stat.S_ISLNK(os.fstat(found).st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                _check_link(path, found, here, last=not names)
                target = os.readlink("", dir_fd=found)
                here = root if target.startswith("/") else here
                names += _names(target)
            elif names:
                here = found
            else:
                break
        else:
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))  # a link to /
        yield here, name


def _names(path: str) -> list[str]:
    """The parts of a path, the first one last."""
    return [name for name in reversed(path.split("/")) if name]


def _check_link(path: str, link: int, directory: int, *, last: bool) -> None:
    """Raise OptionError for a link that is not followed: in the place of the file every one that is neither ours nor
    root's, above it what Linux refuses."""
    owner, folder = os.fstat(link).st_uid, os.fstat(directory)
    if last:
        trusted = {0, os.geteuid()}
    elif folder.st_mode & stat.S_ISVTX and folder.st_mode & stat.S_IWOTH:
        trusted = {folder.st_uid, os.geteuid()}
    else:
        return
    if owner not in trusted:
        raise OptionError(
            f"the pid file '{path}' leads through '{os.readlink(f'/proc/self/fd/{link}')}', a symbolic link of user "
            f"{owner}, expected one of user {' or '.join(map(str, sorted(trusted)))}."
        )

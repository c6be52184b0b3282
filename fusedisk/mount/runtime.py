"""One JSON record for each mount, so that other commands find the daemon behind a mountpoint.

Records lie in ``/run/fusedisk`` for root, else in ``$XDG_RUNTIME_DIR/fusedisk``, else in ``/tmp/fusedisk-UID``.
Root sees everybody's. A directory that others could write to is not believed, and what lies in another user's is
looked at with care: whatever it is, it must not stop or mislead a command of root. Everything here blocks for a moment.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, get_origin, get_type_hints

from fusedisk.core.errors import HostError, OptionError, host_error
from fusedisk.mount import mountinfo, namespaces, owned_files

log = logging.getLogger(__name__)

_ROOT_DIRECTORY = "/run/fusedisk"
_BOOT_ID = "/proc/sys/kernel/random/boot_id"
_NOT_STORED = ("path", "owner", "held", "locked", "place", "mounted", "hidden", "foreign")
"""Fields of a record that are no part of its file."""
_CLOCK_TICK = 0.02
"""Seconds; how exactly the kernel tells when a process was started, and stamps files."""
_LARGEST_PID = (1 << 31) - 1
_LARGEST_SIZE = (1 << 63) - 1


@dataclasses.dataclass(slots=True)
class ExportRecord:
    """One file of a mount. ``size`` is virtual, in bytes; ``overlay`` is None, ``throw-away`` or a file name."""

    name: str
    image: str
    format: str
    size: int
    read_only: bool
    overlay: str | None = None
    file: str | None = None
    """The identity of the image's file, whatever its name: see :func:`file_identity`."""
    part_of: str | None = None
    """The name of the file that this one is a partition or snapshot of."""
    files: dict[str, str] = dataclasses.field(default_factory=dict)
    """The identities of all files of the disk, by their names; empty for partitions and snapshots."""
    written: list[str] = dataclasses.field(default_factory=list)
    """Names of those files that writes may reach."""


@dataclasses.dataclass(slots=True)
class MountRecord:
    """One mount and the daemon that serves it."""

    mountpoint: str
    pid: int
    started: str
    """Identifies the process together with ``pid``, which is used again some day."""
    exports: list[ExportRecord]
    error: str | None = None
    """Why closing the images failed; left behind by a daemon that has ended."""
    loop: str | None = None
    """The loop device that was attached together with the mount, ``/dev/loopN``."""
    device: str = ""
    """``major:minor`` of the files of the mount, once it is there."""
    closing: bool = False
    """The mount is gone, and the daemon flushes and closes the images."""
    single: bool = False
    """The mountpoint is a file, that of the only export."""
    pid_namespace: str = ""
    """In which ``pid`` counts, as :func:`.namespaces.of` names it. A record that is read has our number of the
    process, if it is one of ours."""
    path: str = ""
    """The path of the record; not part of it."""
    owner: int = 0
    """Whose runtime directory it lies in; not part of it."""
    held: int | None = dataclasses.field(default=None, compare=False)
    """A descriptor of the daemon's own, which locks the record as long as the daemon lives; not part of it."""
    locked: bool = dataclasses.field(default=False, compare=False)
    """Whether a daemon held the record when it was read; not part of it."""
    place: str = dataclasses.field(default="", compare=False)
    """The current place of the mount, as a directory above it may have been renamed; not part of it."""
    mounted: bool = dataclasses.field(default=False, compare=False)
    """Whether it is there; not part of it."""
    hidden: bool = dataclasses.field(default=False, compare=False)
    """Whether ``pid`` means nothing here: the daemon has ended, or lives in a PID namespace that we cannot look into;
    not part of the record."""
    foreign: bool = dataclasses.field(default=False, compare=False)
    """Whether it is there only in the mount namespace of its daemon, which is not ours; then ``place`` is meant there.
    Not part of it."""

    @property
    def alive(self) -> bool:
        """Whether the daemon still runs."""
        return self.locked if self.hidden else self.started == process_started(self.pid)

    @property
    def thrown_away(self) -> bool:
        """Whether what was written is lost at the end anyway, so that nothing needs to be flushed."""
        return all(export.overlay == "throw-away" for export in self.exports if not export.read_only)

    def path_of(self, export: ExportRecord) -> str:
        """Return where a file of the mount is now."""
        return self.place if self.single else f"{self.place}/{export.name}"

    def reached(self, path: str) -> str:
        """How we reach a file that the daemon knows by an absolute path: it may live in another mount namespace."""
        return f"/proc/{self.pid}/root{path}" if self.foreign else path

    @property
    def log(self) -> str:
        """The path of the daemon's log file, which exists only if a background daemon has logged something."""
        folder, name = os.path.split(self.path)
        return f"{folder}/{name.partition('.')[0]}.log"

    def has_log(self) -> bool:
        """Whether the daemon has logged something: an older file may be that of a daemon before it."""
        ticks = self.started.rpartition(":")[2]
        try:
            started = float(ticks) / os.sysconf("SC_CLK_TCK") + time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
            return os.stat(self.log).st_mtime >= started - _CLOCK_TICK
        except (OSError, ValueError):
            return False

    def write(self) -> None:
        """Put the record of this process in its place, all or nothing, and hold it from then on. Raises HostError."""
        content = dataclasses.asdict(self)
        for name in _NOT_STORED:
            del content[name]
        temporary = f"{self.path}.{os.getpid()}"
        try:
            with open(temporary, "w", errors="surrogateescape") as file:
                json.dump(content, file)
                file.flush()
                held = _hold(file.fileno())
            os.replace(temporary, self.path)
        except OSError as exc:
            raise host_error(exc, self.path, "write the record") from exc
        before, self.held = self.held, held
        if before is not None:
            os.close(before)

    def is_of_daemon_of(self, other: MountRecord) -> bool:
        """Return whether the same daemon wrote both records of one mountpoint. When it ends, it has no number here."""
        return (self.pid_namespace, self.started) == (other.pid_namespace, other.started)

    def remove(self) -> None:
        """Take the record away, if it is there and not another daemon's by now."""
        place, name = os.path.split(self.path)
        parent, mountpoint = os.path.split(self.mountpoint)
        try:
            # By its descriptor: if the directory is another user's, he could replace it with a link.
            with owned_files.trusted_directory(place, self.owner) as folder:
                found = _load_from(folder, self.path, self.owner)
                if found is not None and found.is_of_daemon_of(self):
                    os.unlink(name, dir_fd=folder)
                if parent == place:
                    os.rmdir(mountpoint, dir_fd=folder)
        except OSError as exc:
            log.debug("the record '%s' could not be removed: %s", self.path, exc)


_TYPES: dict[type, dict[str, Any]] = {
    kind: {
        name: get_origin(wanted) if get_origin(wanted) in (dict, list) else wanted
        for name, wanted in get_type_hints(kind).items()
        if name not in _NOT_STORED
    }
    for kind in (ExportRecord, MountRecord)
}
"""The type of each field of a record's file."""


def _hold(file: int) -> int:
    """Lock a file that nobody else knows yet; returns a descriptor that keeps the lock."""
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 3)


def process_started(pid: int | str) -> str | None:
    """Return an identity that a process shares with no other that had or will have its number; None without it."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b") ")[2].split()
        with open(_BOOT_ID) as file:
            boot = file.read().strip()
    except OSError:
        return None
    if fields[0] in (b"Z", b"X"):
        return None
    return f"{boot}:{fields[19].decode()}"


def directory() -> str:
    """This user's runtime directory, made if it is missing. Raises HostError where it cannot be trusted."""
    uid = os.geteuid()
    base = os.environ.get("XDG_RUNTIME_DIR")
    if uid == 0 and _is_private(_ROOT_DIRECTORY, uid):
        return _ROOT_DIRECTORY
    if base and _is_private(f"{base}/fusedisk", uid):
        return f"{base}/fusedisk"
    place = f"/tmp/fusedisk-{_outer_uid(uid)}"
    if not _is_private(place, uid):
        raise HostError(
            f"'{place}' is not a directory that only you can write to, which the record of a mount needs: remove it.",
            errno=errno.EPERM,
        )
    return place


def _outer_uid(uid: int) -> int:
    """Return ``uid`` as it is outside of this user namespace: root of a namespace is not root in /tmp."""
    try:
        with open("/proc/self/uid_map") as lines:
            for line in lines:
                inside, outside, count = map(int, line.split())
                if inside <= uid < inside + count:
                    return outside + uid - inside
    except (OSError, ValueError):
        pass
    return uid


def _is_private(place: str, uid: int) -> bool:
    try:
        os.mkdir(place, 0o700)
    except FileExistsError:
        pass
    except OSError:
        return False
    return _is_trusted(place, uid) and os.access(place, os.W_OK)


def _is_trusted(place: str, uid: int) -> bool:
    """Whether ``place`` is a directory that nobody but ``uid`` can write to."""
    try:
        return owned_files.is_trusted(os.lstat(place), uid)
    except OSError:
        return False


def make_place() -> str:
    """A new, empty directory to mount on, for a mount whose place nobody cares about. Raises HostError.

    The lowest free number, so that names are used again. The record's ``remove`` takes it away.
    """
    for number in itertools.count():
        place = f"{directory()}/attached{number}"
        try:
            os.mkdir(place, 0o700)
            return place
        except FileExistsError:
            continue
        except OSError as exc:
            raise host_error(exc, place, "make the directory") from exc
    raise AssertionError("numbers do not end")


def remove_place(place: str) -> None:
    """Remove what :func:`make_place` made, unless something is mounted there."""
    try:
        os.rmdir(place)
    except OSError as exc:
        log.debug("the directory '%s' could not be removed: %s", place, exc)


def check_pid_file(path: str) -> None:
    """Raise OptionError where something else than a regular file would be replaced, such as ``/dev/null``."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OptionError(f"the pid file '{path}' exists and is not a regular file.")


def record_path(mountpoint: str) -> str:
    """Return the path of the record of a mount of this user; the log lies beside it, with the suffix ``.log``."""
    digest = hashlib.blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()
    return f"{directory()}/{digest}.json"


def log_path(mountpoint: str) -> str:
    """Return the path of the log of a mount's daemon."""
    return record_path(mountpoint).removesuffix(".json") + ".log"


def new_record(mountpoint: str, exports: list[ExportRecord], *, single: bool = False) -> MountRecord:
    """A record for a mount that this process serves; not yet written."""
    pid, uid = os.getpid(), os.geteuid()
    path = record_path(mountpoint)
    other = _load(path, uid)
    if other is not None and other.alive:  # its directory was renamed, or it has not flushed everything yet
        path = f"{path.removesuffix('.json')}.{pid}.json"
    namespace = namespaces.of(kind="pid") or ""
    started = process_started("self") or ""
    return MountRecord(mountpoint, pid, started, exports, single=single, pid_namespace=namespace, path=path, owner=uid)


def file_identity(path: str | None) -> str | None:
    """Return the identity of a file, whatever its name, valid while it is open somewhere; None if it is missing."""
    if path is None:
        return None
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return f"{found.st_dev}:{found.st_ino}"


def records() -> list[MountRecord]:
    """All records that this user may see, by mountpoint."""
    found = [record for place, uid in _directories() for record in _records_in(place, uid) if _belongs(record)]
    _locate(found)
    return sorted(found, key=lambda record: record.place)


def _records_in(place: str, owner: int) -> list[MountRecord]:
    """The proper records in a directory, none where it is not to be trusted."""
    try:
        with owned_files.trusted_directory(place, owner) as folder:
            names = sorted(name for name in os.listdir(folder) if name.endswith(".json"))
            found = [_load_from(folder, f"{place}/{name}", owner) for name in names]
    except OSError as exc:
        log.debug("the directory '%s' is not looked into: %s", place, exc)
        return []
    return [record for record in found if record is not None]


def _locate(found: list[MountRecord]) -> None:
    """Fill in where the mounts are now. A record may speak of mounts of its owner only."""
    ours = [mount for mount in mountinfo.mounts() if mount.fstype == mountinfo.FSTYPE]
    claimed = {(record.owner, record.mountpoint) for record in found}
    for record in found:
        owned = [mount for mount in ours if mount.user_id in (None, record.owner)]
        here = [mount.mountpoint for mount in owned if mount.device == record.device]
        if record.mountpoint in here or not record.device:
            record.place = record.mountpoint
            record.mounted = any(mount.mountpoint == record.mountpoint for mount in owned)
            continue
        # A mount at the place of another record is that one's, and has the number of a mount that is gone.
        moved = [place for place in here if (record.owner, place) not in claimed]
        record.place = moved[0] if moved else record.mountpoint
        record.mounted = bool(moved)
        if moved or record.closing or record.hidden:
            continue
        if record.alive and namespaces.is_foreign(record.pid):
            there = namespaces.mountpoint_of(record.pid, record.device)
            record.foreign = there is not None
            record.place = there or record.place


def find(mountpoint: str, owner: int | None = None) -> MountRecord | None:
    """The record of the mount that is or was at an absolute path; that of a living daemon, and of what is there now,
    first. ``owner``: only of that user."""
    found = [
        record
        for record in records()
        if mountpoint in (record.place, record.mountpoint) and (owner is None or record.owner == owner)
    ]
    return max(found, key=lambda record: (record.alive, record.mounted and record.place == mountpoint), default=None)


def reread(record: MountRecord) -> MountRecord | None:
    """The record as the same daemon has left it, None if it took it away."""
    found = _load(record.path, record.owner)
    return found if found is not None and found.is_of_daemon_of(record) else None


def _directories() -> Iterator[tuple[str, int]]:
    """(directory, owner) of every place where records of this user, or for root of anybody, may lie."""
    uid = os.geteuid()
    places: dict[tuple[str, int], None] = {(_ROOT_DIRECTORY, 0): None}
    base = os.environ.get("XDG_RUNTIME_DIR")
    if base:
        places[f"{base}/fusedisk", uid] = None
    places[f"/tmp/fusedisk-{_outer_uid(uid)}", uid] = None
    if uid == 0:
        for parent, prefix, suffix in (("/run/user", "", "/fusedisk"), ("/tmp", "fusedisk-", "")):
            for name in _names_in(parent):
                number = name.removeprefix(prefix)
                if name.startswith(prefix) and number.isdecimal():
                    places[f"{parent}/{name}{suffix}", int(number)] = None
    yield from places


def _names_in(place: str) -> list[str]:
    try:
        return sorted(os.listdir(place))
    except OSError:
        return []


def _belongs(record: MountRecord) -> bool:
    """A user's record may speak of that user's processes only, as long as they live. Nothing is done to a process that
    is hidden."""
    if record.hidden:
        return True
    try:
        return os.stat(f"/proc/{record.pid}").st_uid == record.owner
    except OSError:
        return True


def _load(path: str, owner: int) -> MountRecord | None:
    """The record of a user in a file, None where there is none that can be read."""
    try:
        with owned_files.trusted_directory(os.path.dirname(path), owner) as folder:
            return _load_from(folder, path, owner)
    except OSError as exc:
        log.debug("the record '%s' cannot be read: %s", path, exc)
        return None


def _load_from(folder: int, path: str, owner: int) -> MountRecord | None:
    """The same, with a descriptor of the directory that ``path`` lies in."""
    try:
        data, locked = owned_files.read_locked(folder, os.path.basename(path), owner)
        record = _parse(json.loads(data), path, owner)
        record.locked = locked
        return record
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, RecursionError) as exc:
        log.debug("the record '%s' cannot be read: %s", path, exc)
        return None


def _parse(content: Any, path: str, owner: int) -> MountRecord:
    """A record that may have been written by anybody. Raises ValueError or TypeError where no daemon has."""
    if not isinstance(content, dict) or not isinstance(exports := content.pop("exports", None), list):
        raise ValueError("it is no object with a list of exports")
    files = [ExportRecord(**_checked(ExportRecord, export)) for export in exports]
    record = MountRecord(**_checked(MountRecord, content), exports=files, path=path, owner=owner)
    if not os.path.isabs(record.mountpoint) or not 0 < record.pid <= _LARGEST_PID:
        raise ValueError("it names no absolute mountpoint, or no process")
    if record.loop is not None and owner != 0:
        raise ValueError("it names a loop device, which only root attaches")
    for file in files:
        if "/" in file.name or file.name in ("", ".", "..") or not 0 <= file.size <= _LARGEST_SIZE:
            raise ValueError(f"it has a file '{file.name:.80}' of an invalid name or size")
        texts = (*file.files, *file.files.values(), *file.written)
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError(f"the file '{file.name}' is made of files with invalid names")
    _translate_pid(record)
    return record


def _translate_pid(record: MountRecord) -> None:
    """Let ``pid`` be our number of the process: in another PID namespace it has another one, or none."""
    namespace = record.pid_namespace
    if not namespaces.proc_is_ours():
        record.hidden = True
    elif namespace and namespace != namespaces.of(kind="pid"):
        pid = namespaces.pid_of(namespace, record.pid)
        record.hidden = pid is None
        record.pid = pid or record.pid


def _checked(kind: type, content: Any) -> dict[str, Any]:
    """The fields of a ``kind`` of record, each of its type. Raises ValueError."""
    if not isinstance(content, dict):
        raise ValueError("it has no fields")
    types = _TYPES[kind]
    for name, value in content.items():
        # To Python True is a number, too.
        if name not in types or not isinstance(value, types[name]) or isinstance(value, bool) != (types[name] is bool):
            raise ValueError(f"its field '{name:.80}' is not known, or of another type")
        if isinstance(value, str) and b"\0" in value.encode(errors="surrogateescape"):
            raise ValueError(f"its field '{name}' holds what no name can hold")
    return content

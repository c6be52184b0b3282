"""Parts of the mount that need no mount."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest

from fusedisk.core.errors import HostError, OptionError
from fusedisk.mount import holders, memory_pressure, mountinfo, mountpoint, runtime
from fusedisk.mount.mountinfo import Mount
from fusedisk.mount.runtime import ExportRecord, MountRecord
from fusedisk.mount.session import mount_options

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
36 22 0:32 / /mnt/a\\040b rw,nosuid,nodev - fuse.fusedisk /srv/x\\134y.img rw,user_id=1000,group_id=1000
37 36 0:33 / /mnt/a\\040b/c rw - tmpfs tmpfs rw
38 22 0:34 / /mnt/a\\040b rw master:7 propagate_from:2 - fuse.fusedisk top rw,user_id=0
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mountinfo").write_text(MOUNTINFO)
    monkeypatch.setattr(mountinfo, "_MOUNTINFO", str(tmp_path / "mountinfo"))


@pytest.mark.usefixtures("table")
def test_mountinfo_is_read() -> None:
    assert mountinfo.mounts()[1] == Mount(
        36, "0:32", "/mnt/a b", "fuse.fusedisk", "/srv/x\\y.img", "rw,user_id=1000,group_id=1000", "rw,nosuid,nodev"
    )
    assert mountinfo.mounts()[1].user_id == 1000
    assert mountinfo.mounts()[0].user_id is None
    topmost = mountinfo.mount_at("/mnt/a b")
    assert topmost is not None
    assert topmost.mount_id == 38
    assert mountinfo.mount_at("/mnt") is None
    assert [mount.mountpoint for mount in mountinfo.mounts_below("/mnt/a b")] == ["/mnt/a b/c"]


def test_a_path_is_resolved_as_the_kernel_does(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "parent").symlink_to(".")
    for spelling in ("real", "link", "link/", "parent/link", "./parent/../link", "real/."):
        assert mountinfo.absolute(f"{tmp_path}/{spelling}") == str(tmp_path / "real")
    assert mountinfo.absolute("/") == "/"
    with pytest.raises(OptionError, match=r"^the mountpoint is empty\.$"):
        mountinfo.absolute("")


def test_the_source_of_a_mount_is_escaped_for_libfuse() -> None:
    assert mount_options(["a,b\\c ä"], read_only=False, allow_other=False) == {
        "fsname=a\\,b\\\\c ?",
        "subtype=fusedisk",
        "default_permissions",
    }
    several = mount_options(["a", "b", "c"], read_only=True, allow_other=True)
    assert {"fsname=a and 2 more", "ro", "allow_other"} < several


def record_in(folder: Path, *, pid: int | None = None, started: str | None = None) -> MountRecord:
    pid = os.getpid() if pid is None else pid
    started = runtime.process_started(pid) if started is None else started
    export = ExportRecord("vm", "/x/\udcff.qcow2", "qcow2", 1 << 40, False, None)
    return MountRecord(
        "/mnt/\udcff", pid, started or "", [export], path=str(folder / "record.json"), owner=os.geteuid()
    )


def only_in(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let records be looked for in one directory alone."""
    monkeypatch.setattr(runtime, "_directories", lambda: iter([(str(folder), os.geteuid())]))


def test_a_record_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    only_in(tmp_path, monkeypatch)
    record = record_in(tmp_path)
    record.write()
    assert runtime.records() == [record]
    assert runtime.find("/mnt/\udcff") == record
    assert runtime.find("/mnt/\udcff", os.geteuid() + 1) is None
    assert runtime.reread(record) == record
    assert record.alive
    record.remove()
    assert runtime.records() == []
    assert os.listdir(tmp_path) == []


def test_a_record_tells_who_lives_in_another_pid_namespace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    only_in(tmp_path, monkeypatch)
    record = record_in(tmp_path)
    record.pid_namespace = "pid:[1]"
    for _ in range(2):  # written anew, it is held all the same
        record.write()
        (found,) = runtime.records()
        assert (found.hidden, found.alive) == (True, True)
    assert record.held is not None
    os.close(record.held)
    (found,) = runtime.records()
    assert (found.hidden, found.alive) == (True, False)


def test_what_a_daemon_leaves_behind_is_its_own_without_its_number(tmp_path: Path) -> None:
    """In another PID namespace it had another number, which nobody knows once it has ended."""
    record = record_in(tmp_path)
    record.write()
    seen = dataclasses.replace(record, pid=record.pid + 1)
    assert runtime.reread(seen) is not None
    seen.remove()
    assert not os.path.exists(record.path)


def test_a_process_with_a_dead_daemons_number_is_not_it(tmp_path: Path) -> None:
    assert not record_in(tmp_path, started="another time").alive
    child = subprocess.Popen(["true"])
    child.wait()
    assert not record_in(tmp_path, pid=child.pid, started="then").alive


def test_a_daemon_does_not_remove_its_successors_record(tmp_path: Path) -> None:
    old, new = record_in(tmp_path, started="before"), record_in(tmp_path)
    new.write()
    old.remove()
    assert os.path.exists(new.path)
    assert runtime.reread(old) is None


def test_directories_that_others_can_write_to_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o777)
    only_in(tmp_path, monkeypatch)
    record_in(tmp_path).write()
    assert runtime.records() == []
    tmp_path.chmod(0o700)
    assert len(runtime.records()) == 1
    monkeypatch.setattr(runtime, "_directories", lambda: iter([(str(tmp_path), os.geteuid() + 1)]))
    assert runtime.records() == []


def test_records_of_others_processes_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's record must not make root end a process of somebody else's."""
    tmp_path.chmod(0o700)
    only_in(tmp_path, monkeypatch)
    record_in(tmp_path).write()
    monkeypatch.setattr(runtime, "_belongs", lambda record: False)
    assert runtime.records() == []
    monkeypatch.undo()
    record = record_in(tmp_path)
    record.owner += 1
    assert not runtime._belongs(record)


_RECORD = (
    '{"mountpoint": "/x", "pid": 1, "started": "", "exports": [{"name": "x", "image": "", "format": "", "size": 1, '
    '"read_only": false, %s}]}'
)


@pytest.mark.parametrize(
    "content",
    [
        *("", "{", "[]", "5", '{"exports": 5}', '{"exports": [{}]}', '{"exports": [], "x": 1}'),
        *(_RECORD % field for field in ('"files": []', '"files": {"a": 1}', '"written": {}', '"written": [1]')),
    ],
)
def test_records_that_make_no_sense_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    tmp_path.chmod(0o700)
    only_in(tmp_path, monkeypatch)
    (tmp_path / "bad.json").write_text(content)
    record_in(tmp_path).write()
    assert len(runtime.records()) == 1


def test_the_runtime_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(runtime, "_ROOT_DIRECTORY", str(tmp_path / "none" / "fusedisk"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime.directory() == f"{tmp_path}/fusedisk"
    assert (tmp_path / "fusedisk").stat().st_mode & 0o777 == 0o700
    (tmp_path / "fusedisk").chmod(0o777)
    monkeypatch.setattr(runtime, "_outer_uid", lambda uid: "test-of-fusedisk")
    place = Path("/tmp/fusedisk-test-of-fusedisk")
    place.symlink_to(tmp_path)
    try:
        with pytest.raises(HostError, match="is not a directory that only you can write to"):
            runtime.directory()
    finally:
        place.unlink()


def test_many_holders_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    mount = Mount(1, "0:1", "/mnt", "fuse.fusedisk", "x", "")
    monkeypatch.setattr(holders, "holders", lambda mount: [f"h{index}" for index in range(12)])
    assert holders.describe(mount) == "in use by h0, h1, h2, h3, h4, h5, h6 and 5 more"
    monkeypatch.setattr(holders, "holders", lambda mount: ["a", "b"])
    assert holders.describe(mount) == "in use by a and b"
    monkeypatch.setattr(holders, "holders", lambda mount: [])
    assert "cannot be seen from here" in holders.describe(mount)


def test_json_of_a_record_is_plain(tmp_path: Path) -> None:
    record = record_in(tmp_path)
    record.write()
    content = json.loads(Path(record.path).read_text())
    fields = {"mountpoint", "pid", "pid_namespace", "started", "exports", "error", "loop", "device", "closing"}
    assert content.keys() == fields | {"single"}


@pytest.mark.parametrize(
    ("limit", "capable", "may"),
    [(8 << 20, False, False), (1 << 40, False, False), (resource.RLIM_INFINITY, False, True), (8 << 20, True, True)],
)
def test_memory_is_locked_only_where_there_is_no_limit(
    monkeypatch: pytest.MonkeyPatch, limit: int, capable: bool, may: bool
) -> None:
    """A lock under a limit holds for the stacks of threads to come as well."""
    monkeypatch.setattr(resource, "getrlimit", lambda what: (limit, limit))
    monkeypatch.setattr(memory_pressure, "_has_capability", lambda number: capable)
    assert memory_pressure._may_lock() == may


def test_capabilities_are_those_of_the_process() -> None:
    held = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)  # type: ignore[index]
    assert [memory_pressure._has_capability(number) for number in range(41)] == [
        bool(held >> number & 1) for number in range(41)
    ]


def test_a_place_where_something_is_mounted_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The daemon of what is mounted there may hang."""
    monkeypatch.setattr(os, "stat", None)
    with pytest.raises(HostError, match=r"^The mountpoint '/proc' is busy: proc \(proc\) is mounted there"):
        mountpoint.check_mountpoint("/proc", 1)

"""Root reads the records of all users, who may put there what they like: none of it stops or misleads a command."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from fusedisk.mount import mountinfo, owned_files, runtime
from tests.conftest import require_fuse, require_root, require_tool
from tests.support.commands import Outcome, process_command, process_environment
from tests.support.mounts import PATIENCE, has_ended, own_mounts

MIB = 1 << 20
NOBODY = 65534
EXPORT = {"name": "x", "image": "/x.img", "format": "raw", "size": 1, "read_only": False}
RECORD = {
    "mountpoint": "/mnt/x",
    "pid": 99999999,
    "started": "then",
    "exports": [EXPORT],
}


class Machine:
    """A mount namespace with an empty /run, where the tests of others see nothing of what is put there."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._pid = process.pid
        self.theirs = Path("/proc", str(process.pid), "root", f"run/user/{NOBODY}/fusedisk")
        """Where nobody's records lie."""
        for folder, owner in ((self.theirs.parent.parent, 0), (self.theirs.parent, NOBODY), (self.theirs, NOBODY)):
            folder.mkdir(mode=0o755 if owner == 0 else 0o700)
            os.chown(folder, owner, owner)

    def start(self, *command: str | Path, **keywords: Any) -> subprocess.Popen[str]:
        """Start a command there."""
        full = ["nsenter", f"--mount=/proc/{self._pid}/ns/mnt", "--", *map(str, command)]
        return subprocess.Popen(full, env=process_environment(), text=True, **keywords)

    def fusedisk(self, *args: str | Path) -> Outcome:
        """Run fusedisk there, as root."""
        with self.start(*process_command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            try:
                out, err = process.communicate(timeout=PATIENCE)
            finally:
                process.kill()
        return Outcome(process.returncode, out, err)

    def put(self, name: str, content: str) -> None:
        """Put a file among nobody's records."""
        path = self.theirs / name
        path.write_text(content)
        os.chown(path, NOBODY, NOBODY)

    def close(self) -> None:
        """Unmount what is left; a daemon there would keep the namespace."""
        for mount in mountinfo.mounts(self._pid):
            if mount.fstype == mountinfo.FSTYPE:
                with self.start("umount", "-l", mount.mountpoint):
                    pass


@pytest.fixture
def machine() -> Iterator[Machine]:
    require_root()
    require_fuse()
    require_tool("nsenter")
    script = "mount -t tmpfs -o mode=755 tmpfs /run && echo ready && exec cat"
    with subprocess.Popen(own_mounts(script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        made = Machine(process)
        try:
            yield made
        finally:
            made.close()


@pytest.fixture
def sleeper(machine: Machine) -> Iterator[subprocess.Popen[str]]:
    """A process of nobody that goes on and on."""
    command = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups", "sh", "-c", "echo; exec cat"]
    with machine.start(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process


def _living(process: subprocess.Popen[str], **fields: Any) -> str:
    """A forged record of a process that lives."""
    return json.dumps({**RECORD, "pid": process.pid, "started": runtime.process_started(process.pid), **fields})


def _put_everything(machine: Machine) -> None:
    os.mkfifo(machine.theirs / "pipe.json")
    (machine.theirs / "directory.json").mkdir()
    (machine.theirs / "zeroes.json").symlink_to("/dev/zero")
    (machine.theirs / "terminal.json").symlink_to("/dev/tty")
    machine.put("brackets.json", "[" * 200_000)
    machine.put("types.json", json.dumps({**RECORD, "mountpoint": 5}))
    machine.put("sparse.json", "")
    os.truncate(machine.theirs / "sparse.json", 1 << 40)
    for path in machine.theirs.iterdir():
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)


def test_no_command_is_stopped(machine: Machine, tmp_path: Path) -> None:
    _put_everything(machine)
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    (tmp_path / "mnt").mkdir()
    assert machine.fusedisk("list").code == 0
    assert machine.fusedisk("mount", "-f", "raw", image, tmp_path / "mnt") == (0, "", "")
    assert str(image) in machine.fusedisk("list").out
    assert machine.fusedisk("umount", tmp_path / "mnt") == (0, "", "")
    assert machine.fusedisk("detach", image) == (1, "", f"fusedisk: '{image}' is not attached.\n")


def test_a_forged_record_is_not_waited_for(machine: Machine, sleeper: subprocess.Popen[str], tmp_path: Path) -> None:
    machine.put("forged.json", _living(sleeper, mountpoint=str(tmp_path)))
    for options in ([], ["--wait"], ["--force"]):
        done = machine.fusedisk("umount", *options, tmp_path)
        assert done == (
            1,
            "",
            f"fusedisk: nothing is mounted at '{tmp_path}'; a process of user {NOBODY} (pid {sleeper.pid}) may still "
            "be flushing what was, and is not waited for.\n",
        )
    assert sleeper.poll() is None


def test_a_forged_record_hides_no_record_of_root(
    machine: Machine, sleeper: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Neither that of a mount whose directory was renamed, nor what a daemon of root has left behind."""
    (tmp_path / "old" / "mnt").mkdir(parents=True)
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    place = tmp_path / "new" / "mnt"
    machine.put("place.json", _living(sleeper, mountpoint=str(place)))
    machine.put("name.json", _living(sleeper, mountpoint="/mnt/x"))
    assert machine.fusedisk("mount", "-f", "raw", image, tmp_path / "old" / "mnt").code == 0
    os.rename(tmp_path / "old", tmp_path / "new")
    listed = {
        mount["mountpoint"]: mount["pid"]
        for mount in machine.fusedisk("list", "--output", "json").json
        if mount["state"] == "serving"
    }
    assert list(listed) == [str(place)]
    daemon = psutil.Process(listed[str(place)])
    assert machine.fusedisk("umount", place) == (0, "", "")
    assert has_ended(daemon)

    left = machine.theirs.parent.parent.parent / "fusedisk" / "0123456789abcdef.json"
    left.write_text(json.dumps({**RECORD, "error": "the disk broke"}))
    assert machine.fusedisk("umount", "/mnt/x") == (1, "", "fusedisk: the disk broke\n")


def test_a_forged_record_of_a_loop_device_does_not_make_it_ambiguous(
    machine: Machine, sleeper: subprocess.Popen[str], tmp_path: Path
) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom(MIB))
    found = machine.fusedisk("attach", "--output", "json", "-f", "raw", image).json
    try:
        exports = [{**EXPORT, "image": str(image), "file": runtime.file_identity(str(image))}]
        forged = _living(sleeper, mountpoint=found["mountpoint"], loop=found["loop-device"], exports=exports)
        machine.put("forged.json", forged)
        assert machine.fusedisk("detach", found["loop-device"]) == (0, "", "")
    finally:
        (machine.theirs / "forged.json").unlink(missing_ok=True)
        machine.fusedisk("detach", "--force", found["loop-device"])


def test_a_link_in_place_of_their_directory_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between looking at a record and removing it."""
    require_root()
    theirs, other = tmp_path / "theirs", tmp_path / "other"
    for folder in (theirs, other):
        folder.mkdir(mode=0o700)
        os.chown(folder, NOBODY, NOBODY)
        (folder / "x.json").write_text(json.dumps({**RECORD, "mountpoint": f"{theirs}/place"}))
        os.chown(folder / "x.json", NOBODY, NOBODY)
        (folder / "place").mkdir()
    monkeypatch.setattr(runtime, "_directories", lambda: iter([(str(theirs), NOBODY)]))
    (record,) = runtime.records()
    shutil.rmtree(theirs)
    theirs.symlink_to(other)
    record.remove()
    assert sorted(os.listdir(other)) == ["place", "x.json"]
    theirs.unlink()
    other.rename(theirs)
    record.remove()
    assert os.listdir(theirs) == []


@pytest.mark.parametrize("what", ["other owner", "link", "second name", "large"])
def test_files_that_are_not_plain_ones_of_the_owner(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    require_root()
    path = tmp_path / "x.json"
    path.write_text(json.dumps(RECORD))
    for made in (tmp_path, path):
        os.chown(made, NOBODY, NOBODY)
    monkeypatch.setattr(runtime, "_directories", lambda: iter([(str(tmp_path), NOBODY)]))
    assert len(runtime.records()) == 1
    if what == "other owner":
        os.chown(path, NOBODY - 1, NOBODY)
    elif what == "link":
        path.rename(tmp_path / "y")
        path.symlink_to("y")
    elif what == "second name":
        (tmp_path / "y").hardlink_to(path)
    else:
        path.write_text(json.dumps(RECORD) + " " * owned_files._LARGEST)
    assert runtime.records() == []


@pytest.mark.parametrize(
    "change",
    [
        {"mountpoint": 5},
        {"mountpoint": "relative"},
        {"mountpoint": "/a\0b"},
        {"mountpoint": "/\ud800"},
        {"pid": "../self"},
        {"pid": True},
        {"pid": 0},
        {"pid": 1 << 80},
        {"pid": 1.0},
        {"started": None},
        {"device": 5},
        {"error": ["x"]},
        {"loop": {}},
        {"place": "/x"},
        {"path": "/x"},
        {"exports": None},
        {"exports": [5]},
        {"exports": {"name": "x"}},
        *(
            {"exports": [{**EXPORT, **change}]}
            for change in (
                {"name": "../x"},
                {"name": ".."},
                {"name": ""},
                {"image": 5},
                {"image": "\0"},
                {"size": -1},
                {"size": 10**400},
                {"size": "1"},
                {"read_only": 1},
                {"read_only": None},
                {"overlay": 1},
                {"more": 1},
            )
        ),
    ],
    ids=str,
)
def test_fields_that_no_daemon_writes(tmp_path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.setattr(runtime, "_directories", lambda: iter([(str(tmp_path), os.geteuid())]))
    (tmp_path / "good.json").write_text(json.dumps(RECORD))
    (tmp_path / "bad.json").write_text(json.dumps({**RECORD, **change}))
    (found,) = runtime.records()
    assert found.path == str(tmp_path / "good.json")


def test_a_loop_device_is_roots_alone(tmp_path: Path) -> None:
    content = {**RECORD, "loop": "/dev/loop0"}
    assert runtime._parse(dict(content), str(tmp_path), 0).loop == "/dev/loop0"
    with pytest.raises(ValueError, match="which only root attaches"):
        runtime._parse(dict(content), str(tmp_path), NOBODY)

"""The library's mounts and loop devices."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import fusedisk
from fusedisk.core.errors import HostError, OptionError
from fusedisk.mount import loop_device
from tests.support.attachments import Attachments, attachments_below
from tests.support.images import MIB, make_qcow2
from tests.support.mounts import Mounts, is_mounted


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_qcow2(tmp_path / "disk.qcow2", 4 * MIB, "write -P 9 1M 64k")


async def test_a_mount(mounts: Mounts, image: Path, raw: Path) -> None:
    on = mounts.directory()
    mounts.adopt(on)
    async with fusedisk.mount(
        [image, {"driver": "raw", "name": "x", "file": {"filename": str(raw)}}], on, read_only=True
    ) as found:
        disk, other = found.files
        assert (found.mountpoint, found.state, found.error, found.device) == (str(on), "serving", None, None)
        assert (disk.path, disk.image, disk.format, disk.size) == (f"{on}/disk", str(image), "qcow2", 4 * MIB)
        assert (disk.read_only, disk.devices, other.image) == (True, (), str(raw))
        assert Path(disk.path).read_bytes()[MIB : MIB + 2] == b"\x09\x09"
        assert found in await fusedisk.list()
    assert not is_mounted(on)
    with pytest.raises(HostError, match=f"^nothing is mounted at '{on}'"):
        await fusedisk.umount(on)


def test_a_mount_without_trio(mounts: Mounts, image: Path) -> None:
    on = mounts.folder / "file"
    on.touch()
    mounts.adopt(on)
    with fusedisk.mount_sync(image, on, overlay=True, name=None) as found:  # type: ignore[arg-type]
        assert [file.path for file in found.files] == [str(on)]
        assert on.stat().st_size == 4 * MIB
        assert found in fusedisk.list_sync()
    assert not is_mounted(on)


def test_a_mount_that_is_in_use_stays_and_the_first_error_counts(mounts: Mounts, image: Path) -> None:
    on = mounts.directory()
    mounts.adopt(on)
    manager = fusedisk.mount_sync(image, on)
    with open(manager.__enter__().files[0].path, "rb"):
        error = ZeroDivisionError()
        assert not manager.__exit__(ZeroDivisionError, error, None)
        assert "is in use by" in error.__notes__[0]
        assert is_mounted(on)
    fusedisk.umount_sync(on, wait=True, timeout=30)
    assert not is_mounted(on)


async def test_what_does_not_mount(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    on = mounts.directory()
    mounts.adopt(on)
    with pytest.raises(HostError, match=r"none': No such file or directory"):
        async with fusedisk.mount(tmp_path / "none", on):
            pass
    with pytest.raises(OptionError, match="qcow2 has no option 'colour'"):
        async with fusedisk.mount(f"driver=qcow2,file.filename={image},colour=red", on):
            pass
    with pytest.raises(OptionError, match="--read-only forbids"):
        async with fusedisk.mount(image, on, overlay=True, read_only=True):
            pass
    with pytest.raises(TypeError, match="there is no option 'colour'"):
        fusedisk.mount(image, on, colour="red")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="overlay is of the type str"):
        fusedisk.mount(image, on, overlay="yes")  # type: ignore[typeddict-item]
    assert not is_mounted(on)


def test_the_command_tells_of_its_mount_in_json(mounts: Mounts, image: Path) -> None:
    on, done = mounts.try_mount("--output", "json", image)
    assert done.json["exports"][0]["image"] == str(image)
    assert done.json["mountpoint"] == str(on)
    assert json.dumps(done.json)


@pytest.mark.root
async def test_an_attachment(tmp_path: Path, image: Path) -> None:
    with attachments_below(tmp_path) as attachments:
        assert isinstance(attachments, Attachments)
        async with fusedisk.attach(image, read_only=True, sector_size=4096) as found:
            assert found.partitions == ()
            assert loop_device.backing_file(found.device) == found.mount.files[0].path
            assert found.mount.device == found.device
            with open(found.device, "rb") as device:
                device.seek(MIB)
                assert device.read(2) == b"\x09\x09"
        assert loop_device.backing_file(found.device) != found.mount.files[0].path
        with fusedisk.attach_sync(image) as found:
            assert os.path.exists(found.device)
        with pytest.raises(HostError, match="is not attached"):
            fusedisk.detach_sync(image)
        assert not attachments.records()

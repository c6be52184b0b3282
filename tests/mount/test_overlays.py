"""Layers that take the writes: the image below is never touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import qemu_img, run_tool
from tests.support.commands import fusedisk_process
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, daemon_of, has_ended, wait_until

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return make_qcow2(tmp_path / "vm.qcow2", 4 * MIB, "write -P 7 0 1M")


@pytest.fixture
def untouched(image: Path) -> object:
    """Afterwards the image must be what it was, to the byte and the nanosecond."""
    content, before = image.read_bytes(), image.stat()
    yield
    after = image.stat()
    assert image.read_bytes() == content
    assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)


@pytest.mark.usefixtures("untouched")
def test_a_throw_away_layer_is_gone_after_the_mount(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    on = mounts.mount("--overlay", image, env={"TMPDIR": str(place)})
    file = on / "vm"
    assert file.stat().st_mtime_ns == image.stat().st_mtime_ns
    with file.open("r+b", buffering=0) as handle:
        handle.write(b"x" * 100_000)
        os.fsync(handle.fileno())
        assert os.pread(handle.fileno(), 200_000, 0) == b"x" * 100_000 + b"\7" * 100_000
    assert file.stat().st_mtime_ns > image.stat().st_mtime_ns
    assert os.listdir(place) == []
    assert os.getxattr(file, "user.fusedisk.image") == os.fsencode(image)
    assert os.getxattr(file, "user.fusedisk.overlay") == b"throw-away"
    mounts.umount(on)
    mounts.mount("-r", image, on=on)
    assert file.read_bytes() == b"\7" * MIB + bytes(3 * MIB)


@pytest.mark.usefixtures("untouched")
def test_a_throw_away_layer_is_gone_after_a_crash(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    on = mounts.mount("--overlay", image, env={"TMPDIR": str(place)})
    (on / "vm").write_bytes(b"x" * MIB)
    daemon = daemon_of(on)
    daemon.kill()
    wait_until(lambda: has_ended(daemon), "the daemon is dead")
    assert os.listdir(place) == []


def test_a_throw_away_layer_needs_a_place(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    _, done = mounts.try_mount("--overlay", image, env={"TMPDIR": str(tmp_path / "none")})
    assert (done.code, done.err) == (
        1,
        f"fusedisk: Could not make an overlay in '{tmp_path}/none': No such file or directory\n",
    )


def test_an_overlay_of_a_file_that_nobody_may_write(mounts: Mounts, raw: Path) -> None:
    raw.chmod(0o400)
    on = mounts.mount("--overlay", "-f", "raw", raw)
    (on / "disk").write_bytes(b"y" * 4 * MIB)
    assert (on / "disk").read_bytes() == b"y" * 4 * MIB


@pytest.mark.usefixtures("untouched")
def test_a_named_layer_is_made_and_used_again(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layers" / "today.qcow2"
    layer.parent.mkdir()
    on = mounts.directory()
    for letter, offset in ((b"a", 0), (b"b", 2 * MIB)):
        mounts.mount("--overlay-file", layer, image, on=on)
        with (on / "vm").open("r+b", buffering=0) as handle:
            os.pwrite(handle.fileno(), letter * 65536, offset)
        mounts.umount(on)
    qemu_img("check", layer)
    expected = b"a" * 65536 + b"\7" * (MIB - 65536) + bytes(MIB) + b"b" * 65536 + bytes(2 * MIB - 65536)
    qemu_img("convert", "-O", "raw", layer, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == expected
    said = qemu_img("info", "--output=json", layer)
    assert f'"backing-filename": "{image}"' in said
    assert '"backing-filename-format": "qcow2"' in said


def test_a_named_layer_beside_its_image_names_it_alone(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    on = mounts.mount("--overlay-file", "over.qcow2", image.name, cwd=tmp_path)
    mounts.umount(on)
    assert '"backing-filename": "vm.qcow2"' in qemu_img("info", "--output=json", tmp_path / "over.qcow2")
    run_tool("mv", image, tmp_path / "other.qcow2")
    _, done = mounts.try_mount("--overlay-file", tmp_path / "over.qcow2", tmp_path / "other.qcow2")
    assert done.code == 1
    assert "stands on 'vm.qcow2', not on" in done.err


def test_an_image_that_was_changed_under_its_layer_is_told(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    layer = tmp_path / "over.qcow2"
    on = mounts.mount("--overlay-file", layer, image)
    (on / "vm").write_bytes(b"x" * MIB)
    mounts.umount(on)
    mounts.umount(mounts.mount("--overlay-file", layer, image))
    qemu_img("resize", image, "8M")
    _, done = mounts.try_mount("--overlay-file", layer, image)
    assert (done.code, done.err) == (
        0,
        f"fusedisk: '{image}' has changed since '{layer}' was made over it (a disk of {4 * MIB} bytes then, {8 * MIB} "
        "now): if its disk reads otherwise now, the two no longer fit together.\n",
    )


def test_a_layer_of_another_image_is_refused(mounts: Mounts, image: Path, raw: Path, tmp_path: Path) -> None:
    layer = make_qcow2(tmp_path / "layer.qcow2", None, backing=raw)
    alone = make_qcow2(tmp_path / "alone.qcow2", MIB)
    content = layer.read_bytes()
    for file, found in ((layer, "stands on 'disk.img'"), (alone, "stands on nothing")):
        _, done = mounts.try_mount("--overlay-file", file, image)
        assert (done.code, done.err) == (
            1,
            f"fusedisk: the overlay '{file}' {found}, not on '{image}': choose another --overlay-file, or mount the "
            f"overlay itself.\n",
        )
    assert layer.read_bytes() == content
    _, done = mounts.try_mount("--overlay-file", raw, image)
    assert done.code == 1


def test_a_layer_that_takes_the_image_for_another_format_is_refused(
    mounts: Mounts, image: Path, tmp_path: Path
) -> None:
    layer = tmp_path / "layer.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-b", image, "-F", "raw", layer)
    _, done = mounts.try_mount("--overlay-file", layer, image)
    assert (done.code, done.err) == (
        1,
        f"fusedisk: the overlay '{layer}' takes '{image}' for raw, but it was opened as qcow2: say --format raw if "
        f"that is right.\n",
    )


def test_copy_on_read_fills_the_layer(mounts: Mounts, image: Path, tmp_path: Path) -> None:
    layer = tmp_path / "layer.qcow2"
    on = mounts.mount("--copy-on-read", "--overlay-file", layer, image)
    before = (on / "vm").stat()
    assert (on / "vm").read_bytes()[:MIB] == b"\7" * MIB
    assert (on / "vm").stat().st_mtime_ns == before.st_mtime_ns
    mounts.umount(on)
    found = fusedisk_process("map", "--output", "json", layer).json
    data = [entry for entry in found if entry["data"]]
    assert {entry["depth"] for entry in data} == {0}
    assert sum(entry["length"] for entry in data) == MIB


def test_detect_zeroes_keeps_zeroes_out_of_the_image(mounts: Mounts, tmp_path: Path) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", 4 * MIB)
    on = mounts.mount("--detect-zeroes", "unmap", image)
    run_tool("dd", "if=/dev/zero", f"of={on / 'vm'}", "bs=1M", "count=4", "conv=notrunc", "status=none")
    mounts.umount(on)
    assert image.stat().st_size < MIB


@pytest.mark.parametrize("mode", ["writeback", "writethrough", "none", "directsync", "unsafe"])
def test_cache_modes(mounts: Mounts, tmp_path: Path, mode: str) -> None:
    image = make_qcow2(tmp_path / "vm.qcow2", MIB)
    on, done = mounts.try_mount("--cache", mode, image)
    if "has no O_DIRECT" in done.err:
        pytest.skip("the filesystem has no O_DIRECT")
    assert done.code == 0, done.err
    data = os.urandom(100_001)
    with (on / "vm").open("r+b", buffering=0) as handle:
        os.pwrite(handle.fileno(), data, 4097)
    mounts.umount(on)
    qemu_img("check", image)
    qemu_img("convert", "-O", "raw", image, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == bytes(4097) + data + bytes(MIB - 4097 - len(data))

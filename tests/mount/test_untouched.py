"""A writable mount, or an attached loop device, through which nobody writes leaves the image as it is; what the first
write costs is on the terminal before it.
"""

from __future__ import annotations

from pathlib import Path

from tests.conftest import qemu_img, run_tool
from tests.support.mounts import Mounts

MIB = 1 << 20


def test_who_only_reads_touches_nothing(mounts: Mounts, tmp_path: Path) -> None:
    image = tmp_path / "v.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "16M")
    qemu_img("bitmap", "--add", image, "chain")
    before = image.read_bytes(), image.stat().st_mtime_ns
    on, done = mounts.try_mount(image)
    assert (done.code, done.out) == (0, "")
    assert done.err == (
        f"fusedisk: '{image}' has the dirty bitmap 'chain', which fusedisk does not keep up to date: the first write "
        "will make it invalid; mount with --read-only or --overlay to avoid that.\n"
    )
    device = mounts.loop(on / "v")
    assert Path(device).read_bytes() == bytes(16 * MIB)
    run_tool("blockdev", "--flushbufs", device)
    mounts.detach(device)
    mounts.umount(on)
    assert (image.read_bytes(), image.stat().st_mtime_ns) == before
    for way in ("--read-only", "--overlay"):
        on, done = mounts.try_mount(way, image)
        assert (done.code, done.err) == (0, "")
        mounts.umount(on)
    on, _ = mounts.try_mount(image)
    with (on / "v").open("r+b") as file:
        file.write(b"x")
    mounts.umount(on)
    assert "in-use" in qemu_img("info", image)

"""Images that are replaced, renamed or removed beneath their mounts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import qemu_img
from tests.support.commands import fusedisk_process
from tests.support.images import make_qcow2
from tests.support.mounts import Mounts, daemon_of

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image over a backing file."""
    make_qcow2(tmp_path / "base.qcow2", MIB)
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", tmp_path / "vm.qcow2")
    return tmp_path / "vm.qcow2"


def _changed(on: Path) -> list[dict[str, Any]]:
    (mount,) = [
        mount for mount in fusedisk_process("list", "--output", "json").json if mount["pid"] == daemon_of(on).pid
    ]
    (export,) = mount["exports"]
    return list(export["changed-files"])


def _change(file: Path, way: str) -> str | None:
    """Do that to a file; returns the name that it has then."""
    other = file.with_name("other.qcow2")
    if way == "replaced":
        make_qcow2(other, MIB)
        other.rename(file)
    elif way == "renamed":
        file.rename(other)
        return str(other)
    else:
        file.unlink()
    return None


@pytest.mark.parametrize(
    ("way", "how"), [("replaced", "replaced by another file"), ("removed", "removed"), ("renamed", None)]
)
def test_a_written_image_is_told_at_the_end(mounts: Mounts, image: Path, way: str, how: str | None) -> None:
    """A new name alone is no news."""
    on = mounts.mount(image)
    assert _changed(on) == []
    now = _change(image, way)
    with (on / "vm").open("r+b") as file:
        file.write(b"precious")
    assert _changed(on) == [{"file": str(image), "state": way, "now": now}]
    assert f"{image} ({way})\n" in fusedisk_process("list").out
    done = fusedisk_process("umount", on)
    assert (done.code, done.out) == (0, "")
    sentence = (
        f"fusedisk: '{image}' was {how} while it was mounted at '{on}': what was written to the mount is lost, as the "
        "old file has no name any more.\n"
    )
    assert done.err == ("" if how is None else sentence)


def test_a_backing_file_is_told_of(mounts: Mounts, image: Path) -> None:
    base = image.with_name("base.qcow2")
    on = mounts.mount(image)
    _change(base, "replaced")
    assert _changed(on) == [{"file": str(base), "state": "replaced", "now": None}]
    done = fusedisk_process("umount", "--force", on)
    assert (done.code, done.err) == (
        0,
        f"fusedisk: '{base}' was replaced by another file while it was mounted at '{on}': '{image}' may not fit what "
        "is there now.\n",
    )


@pytest.mark.parametrize("option", ["--read-only", "--overlay"])
def test_nothing_is_told_at_the_end_where_nothing_was_to_stay(mounts: Mounts, image: Path, option: str) -> None:
    on = mounts.mount(option, image)
    _change(image, "replaced")
    assert _changed(on) == [{"file": str(image), "state": "replaced", "now": None}]
    mounts.umount(on)


def test_another_name_of_the_same_file_is_no_change(mounts: Mounts, image: Path) -> None:
    on = mounts.mount(image)
    os.link(image, image.with_name("link"))
    image.unlink()
    image.symlink_to("link")
    assert _changed(on) == []
    image.unlink()
    assert _changed(on) == [{"file": str(image), "state": "removed", "now": None}]
    assert fusedisk_process("umount", on).err.endswith(": what was written to the mount is in the old file.\n")

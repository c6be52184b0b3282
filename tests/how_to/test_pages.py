"""The tutorial and the how-to pages work as they stand: a user with sudo types them in, on a machine of its own."""

from __future__ import annotations

import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import require_fuse, require_root, require_tool
from tests.how_to import disks, pages
from tests.support.commands import ROOT
from tests.support.users import User

HERE = Path(__file__).parent
TIMEOUT = 400
PAGES = {
    "../README.md": "vm.qcow2",
    "tutorial.md": None,
    "how-to/files-from-a-disk.md": "vm.qcow2",
    "how-to/back-up.md": "vm.qcow2",
    "how-to/examine-evidence.md": "evidence.qcow2",
    "how-to/containers-and-rootless.md": "vm.qcow2",
    "how-to/mount-at-boot.md": "vm.qcow2",
}
"""The pages, and the image that each begins with."""
SLOW = {"how-to/back-up.md"}
TOOLS = {
    "tutorial.md": ("debugfs", "mkfs.ext4"),
    "how-to/files-from-a-disk.md": ("debugfs", "mcopy", "blkid"),
    "how-to/back-up.md": ("borg", "restic", "rsync"),
    "how-to/examine-evidence.md": ("debugfs", "fls", "mmls"),
    "how-to/mount-at-boot.md": ("systemd-analyze",),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the images that pages begin with."""
    for tool in ("sfdisk", "mkfs.vfat", "mcopy", "mkfs.ext4", "debugfs", "qemu-img"):
        require_tool(tool)
    folder = tmp_path_factory.mktemp("images")
    disks.dirty_disk(folder, disks.vm_disk(folder))
    return folder


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder that other users reach."""
    folder = Path(tempfile.mkdtemp(prefix="fusedisk-page-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def _machine(scratch: Path) -> User:
    """What is installed on the page's machine, and its user."""
    home = scratch / "home"
    home.mkdir()
    user = User(home)
    programs = scratch / "bin"
    programs.mkdir()
    for name, module in {
        "fusedisk": "fusedisk",
        "mount.fuse.fusedisk": "fusedisk.cli.mount_helper",
        "systemctl": "tests.how_to.systemctl",
    }.items():
        program = programs / name
        program.write_text(f"#!/bin/sh\nPYTHONPATH='{ROOT}' exec '{sys.executable}' -P -m {module} \"$@\"\n")
        program.chmod(0o755)
    sudoers = scratch / "sudoers"
    sudoers.write_text(
        'Defaults secure_path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"\n'
        f"Defaults !use_pty\n{user.entry.pw_name} ALL=(ALL:ALL) NOPASSWD: ALL\n"
    )
    sudoers.chmod(stat.S_IRUSR | stat.S_IRGRP)
    return user


def _run(scratch: Path, user: User, todo: list[pages.Command | pages.File]) -> None:
    results = scratch / "results"
    results.mkdir()
    (results).chmod(0o777)
    (scratch / "page.sh").write_text(pages.script(todo, results))
    environment = {
        "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
        "HOME": str(user.home),
        "LC_ALL": "C.UTF-8",
        "COLUMNS": "120",
        "TZ": "UTC",
        "XDG_RUNTIME_DIR": f"/run/user/{user.entry.pw_uid}",
    }
    done = subprocess.run(
        [
            *("unshare", "-m", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"),
            *("bash", str(HERE / "machine.sh"), str(scratch), str(user.entry.pw_uid)),
            *(*user.become, "bash", str(scratch / "page.sh")),
        ],
        cwd=user.home,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in SLOW else page for page in PAGES]
)
def test_page_works_as_it_stands(page: str, images: Path, scratch: Path) -> None:
    require_root()
    require_fuse()
    for tool in ("sudo", "setpriv", "unshare", *TOOLS.get(page, ())):
        require_tool(tool)
    user = _machine(scratch)
    image = PAGES[page]
    if image is not None:
        shutil.copy(images / image, user.home)
        shutil.chown(user.home / image, user.entry.pw_uid, user.entry.pw_gid)
    todo = pages.steps(ROOT / "docs" / page)
    _run(scratch, user, todo)
    wrong = pages.differences(page, todo, scratch / "results")
    assert wrong is None, wrong
    assert (scratch / "left").read_text() == "", "the page leaves this mounted or attached"


def test_every_page_is_run() -> None:
    found = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs/how-to").glob("*.md")}
    assert found | {"../README.md", "tutorial.md"} == set(PAGES)


# --- the reader of pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        (["a", "b"], ["a", "b"], True),
        (["a"], ["a", "b"], False),
        (["a", "…"], ["a", "b", "c"], True),
        (["…", "c"], ["a", "b", "c"], True),
        (["…", "c"], ["c", "d"], False),
        (["pid … ends"], ["pid 17 ends"], True),
        (["pid … ends"], ["pid 17 goes on"], False),
        (["a.c"], ["abc"], False),
    ],
)
def test_shown_output_is_compared(shown: list[str], printed: list[str], same: bool) -> None:
    assert pages.matches(shown, printed) is same


@pytest.mark.parametrize(
    ("block", "complaint"),
    [
        ("$ true\n$ false\n$ echo never\n", "exited 1"),
        ("$ echo one\ntwo\n", "the page shows:\ntwo\nbut it printed:\none"),
        ("$ false\n$ echo $?\n1\n", None),
        ("$ false\n$ echo $?\n0\n", "but it printed:\n1"),
        ("$ number=1\n$ cd /\n$ echo \\\n> $number $PWD\n1 /\n", None),
    ],
)
def test_the_first_step_that_goes_wrong_is_told(block: str, complaint: str | None, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n```console\n{block}```\n")
    todo = pages.steps(page)
    subprocess.run(["bash", "-c", pages.script(todo, tmp_path)], check=True, timeout=60)
    wrong = pages.differences("page.md", todo, tmp_path)
    assert wrong is None if complaint is None else wrong is not None and complaint in wrong

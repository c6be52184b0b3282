"""Fixtures for tests with real mounts."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusedisk.mount import mountinfo
from tests.conftest import require_root, run_tool
from tests.support.mounts import Covered, Mounts, mounts_below

MIB = 1 << 20


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[Mounts]:
    """Makes mounts, and takes them away whatever happens."""
    with mounts_below(tmp_path) as found:
        yield found


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A sparse raw image of 4 MiB: random bytes in its first quarter, then a hole, and a few bytes at its very end."""
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.write(random.Random(1).randbytes(MIB))
        file.seek(4 * MIB - 7)
        file.write(b"the end")
    return path


@pytest.fixture
def covered(tmp_path: Path) -> Iterator[Covered]:
    """A place to mount on and to cover."""
    require_root()
    above = tmp_path / "above"
    above.mkdir()
    run_tool("mount", "-t", "tmpfs", "above", above)
    try:
        run_tool("mount", "--make-private", above)  # what lies on a shared one cannot be moved
        yield Covered(above)
    finally:
        while mountinfo.mount_at(str(above)) is not None:
            run_tool("umount", "-l", above)


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    """A command line for fusedisk whose file driver misbehaves as the file ``broken`` says, one rule in a line:

    ``error METHOD`` fails as an expected error does, ``bug METHOD`` as a bug does, ``hold METHOD OFFSET`` waits, in
    requests at that offset, until the file is gone; the file ``held`` appears then.
    """
    script = tmp_path / "breakable.py"
    script.write_text(_BREAKABLE.format(rules=str(tmp_path / "broken")))
    return [sys.executable, str(script)]


_BREAKABLE = """
import functools
from pathlib import Path
import trio
from fusedisk.cli.main import main
from fusedisk.core.at_once import refuse_to_wait
from fusedisk.core.errors import HostError
from fusedisk.drivers.protocol.file import FileDriver

RULES = Path({rules!r})


def rules():
    return [line.split() for line in RULES.read_text().splitlines()] if RULES.exists() else []


def breakable(name):
    method = getattr(FileDriver, name)

    @functools.wraps(method)
    async def wrapper(self, *args):
        for kind, broken, *more in rules():
            if broken != name:
                continue
            if kind == "error":
                raise HostError("the disk is broken")
            if kind == "bug":
                raise RuntimeError("a bug for the test")
            while kind == "hold" and args[0] == int(more[0]) and RULES.exists():
                refuse_to_wait()
                RULES.with_name("held").touch()
                await trio.sleep(0.01)
        return await method(self, *args)

    setattr(FileDriver, name, wrapper)


def lengthened(short, broken):
    # What breaks is not to be gone around.
    method = getattr(FileDriver, short)

    @functools.wraps(method)
    def wrapper(self, *args):
        return not any(rule[1] == broken for rule in rules()) and method(self, *args)

    setattr(FileDriver, short, wrapper)


lengthened("read_now", "preadv")
lengthened("write_now", "pwritev")
for name in ("preadv", "pwritev", "flush_to_disk", "allocated_size"):
    breakable(name)
main()
"""

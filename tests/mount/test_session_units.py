"""A session without a mount."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pyfuse3
import pytest
import trio
import trio.testing

from fusedisk.core.errors import HostError
from fusedisk.mount import mountinfo, own_mount, umount_calls
from fusedisk.mount.face import MountFace
from fusedisk.mount.notifying import Notifier
from fusedisk.mount.session import Session


class _File:
    writable = False

    def __init__(self, number: int) -> None:
        self.inode = number
        self.name = str(number)
        self.backend = SimpleNamespace(on_resize=[])
        self.on_change: Callable[[bool], None] | None = None

    def change(self) -> None:
        assert self.on_change is not None
        self.on_change(True)

    async def write_behind(self) -> None:
        await trio.sleep_forever()


def _operations(*exports: _File) -> Any:
    registry = SimpleNamespace(faces=[])
    return SimpleNamespace(exports=exports, inode_of=lambda export: export.inode, registry=registry, single=False)


async def test_every_file_whose_data_is_stale_is_told_of() -> None:
    """However often another one's is."""
    exports = [_File(number) for number in range(3)]
    notifier = Notifier()
    face = MountFace(_operations(*exports), notifier, lambda: "/nowhere")
    told: list[int] = []
    all_told = trio.Event()

    def invalidate(inode: int, attributes_only: bool) -> None:
        assert not attributes_only
        told.append(inode)
        if set(told) == {0, 1, 2}:
            trio.from_thread.run_sync(all_told.set)

    notifier.invalidate = invalidate  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        face.start(nursery)
        await trio.testing.wait_all_tasks_blocked()
        for number in (0, 0, 0, 0, 0, 0, 0, 0, 1, 2):
            exports[number].change()
        with trio.fail_after(30):
            await all_told.wait()
        exports[1].change()
        while told[-1] != 1 or len(told) < 4:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()


async def test_a_mount_that_cannot_be_looked_at_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the connection is aborted before the first answer."""
    session = Session("/nowhere", _operations(), set())
    monkeypatch.setattr(pyfuse3, "main", _serve_for_ever)
    with pytest.raises(HostError, match=r"^Could not look at the mount '/nowhere': No such file or directory$"):
        await session.serve(lambda: None)


async def _serve_for_ever(**_: int) -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("left", [False, True])
async def test_only_a_mount_that_was_left_is_taken_away_at_the_end(monkeypatch: pytest.MonkeyPatch, left: bool) -> None:
    """One that ended by itself has given its number away, to another one in its place."""
    session = Session("/nowhere", _operations(), set())
    session._mount = mountinfo.Mount(1, "0:99", "/nowhere", mountinfo.FSTYPE, "disk", "")
    taken: list[str] = []
    monkeypatch.setattr(own_mount, "is_at", lambda place, device: left)
    monkeypatch.setattr(own_mount, "is_on_top", lambda place, device: True)
    monkeypatch.setattr(umount_calls, "detach", taken.append)
    monkeypatch.setattr(pyfuse3, "main", _end_at_once)
    monkeypatch.setattr(pyfuse3, "close", lambda unmount: None)
    await session.serve(lambda: None)
    session.close()
    assert taken == (["/nowhere"] if left else [])


async def _end_at_once(**_: int) -> None:
    pass

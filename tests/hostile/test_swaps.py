"""What another user puts in the place of a file between any two looks at its name.

Every system call of an opening that takes a name is counted. The opening is then repeated once for each of them, with
the name leading elsewhere from that call on, up to it, during it, or always but then. Whichever it is, nothing outside
of the image's directory is read or written.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio

from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.block.image.create import create_image
from fusedisk.core import host_open
from fusedisk.core.errors import FusediskError, GateError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img

SIZE = 64 << 10
SECRET = b"S" * SIZE


class Evil(NamedTuple):
    """Which calls find the name leading outside."""

    when: str
    at: int

    def __call__(self, call: int) -> bool:
        at = self.at
        return {"from": call >= at, "until": call < at, "during": call == at, "except": call != at}[self.when]


def _swaps(calls: int) -> list[Evil]:
    return [Evil(when, at) for when in ("from", "until", "during", "except") for at in range(calls + 1)]


class Swapper:
    """Runs before each call that takes a name."""

    def __init__(self, swap: Callable[[bool], None]) -> None:
        self._swap = swap
        self._thread = threading.Lock()
        self.calls = 0
        self.evil: Callable[[int], bool] = lambda call: False
        self._outside = False

    def turn(self, outside: bool) -> None:
        if outside != self._outside:
            self._outside = outside
            self._swap(outside)

    @contextlib.contextmanager
    def watching(self, evil: Callable[[int], bool]) -> Iterator[None]:
        """While the block runs, names lead outside at the calls that ``evil`` says."""
        self.calls, self.evil = 0, evil
        saved = {name: getattr(os, name) for name in ("open", "stat", "lstat", "readlink")}
        for name, function in saved.items():
            setattr(os, name, self._before(function))
        try:
            yield
        finally:
            for name, function in saved.items():
                setattr(os, name, function)
            self.turn(False)

    def _before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            with self._thread:
                self.turn(self.evil(self.calls))
                self.calls += 1
            return function(*args, **more)

        return call


def _link_swapper(home: Path) -> Callable[[bool], None]:
    """``link`` leads to ``keep`` beside it, or outside."""

    def swap(outside: bool) -> None:
        os.symlink("../out/secret" if outside else "keep", home / "new")
        os.rename(home / "new", home / "link")

    return swap


def _directory_swapper(home: Path) -> Callable[[bool], None]:
    """Another directory, which nobody may look into, takes the place of the image's own."""

    def swap(outside: bool) -> None:
        out, aside = home.parent / "out", home.parent / "aside"
        for source, target in ((home, aside), (out, home)) if outside else ((home, out), (aside, home)):
            os.rename(source, target)

    return swap


def _parent_swapper(home: Path) -> Callable[[bool], None]:
    """A directory below the image's own becomes a link to the one outside."""

    def swap(outside: bool) -> None:
        below = home / "below"
        if outside:
            os.rename(below, home / "aside")
            os.symlink("../out", below)
        else:
            os.unlink(below)
            os.rename(home / "aside", below)

    return swap


def _prepare(tmp_path: Path) -> Path:
    """Directories with a file of the same name: ``in`` with a link to it, and ``out``, which holds what is secret."""
    home, out = tmp_path / "in", tmp_path / "out"
    (home / "below").mkdir(parents=True)
    out.mkdir()
    for directory, content in ((home, bytes(SIZE)), (home / "below", bytes(SIZE)), (out, SECRET)):
        (directory / "keep").write_bytes(content)
    (out / "secret").write_bytes(SECRET)
    os.symlink("keep", home / "link")
    return home


def _overlay(home: Path, reference: str) -> Path:
    qemu_img("create", "-q", "-u", "-f", "qcow2", "-b", reference, "-F", "raw", home / "top.qcow2", str(SIZE))
    return home / "top.qcow2"


def _with_data_file(home: Path, name: str) -> Path:
    made = f"data_file={home}/data.tmp,data_file_raw=on"
    qemu_img("create", "-q", "-f", "qcow2", "-o", made, home / "top.qcow2", str(SIZE))
    qemu_img("amend", "-f", "qcow2", "-o", f"data_file={name}", home / "top.qcow2")
    return home / "top.qcow2"


def _json(home: Path, name: str) -> str:
    return "json:" + json.dumps({"driver": "raw", "file": {"driver": "file", "filename": f"{home}/{name}"}})


async def _attack(image: Path, gate: Gate | None) -> bytes:
    """Read the first bytes of an image and write to it, as far as it opens; returns what was read."""
    graph = Graph(DRIVERS, gate)
    try:
        backend = await graph.open_backend(str(image), writable=True)
        found = await backend.read(0, 512)
        await backend.write(4096, b"OVERWRITTEN".ljust(512))
        return found
    except FusediskError:
        return b""
    finally:
        await graph.close()


@pytest.mark.parametrize(
    ("kind", "make", "swapper"),
    [
        ("backing file", lambda home: _overlay(home, "link"), _link_swapper),
        ("json: name", lambda home: _overlay(home, _json(home, "link")), _link_swapper),
        ("data file", lambda home: _with_data_file(home, "link"), _link_swapper),
        ("backing file", lambda home: _overlay(home, "keep"), _directory_swapper),
        ("data file", lambda home: _with_data_file(home, "keep"), _directory_swapper),
        ("backing file", lambda home: _overlay(home, "below/keep"), _parent_swapper),
        ("data file", lambda home: _with_data_file(home, "below/keep"), _parent_swapper),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.strip("_"),
)
async def test_nothing_outside_is_reached_whenever_a_name_is_swapped(
    tmp_path: Path, kind: str, make: Callable[[Path], Path], swapper: Callable[[Path], Callable[[bool], None]]
) -> None:
    home = _prepare(tmp_path)
    image = make(home)
    swap = Swapper(swapper(home))
    content = image.read_bytes()
    with swap.watching(lambda call: False):
        assert await _attack(image, None) == bytes(512)
    calls = swap.calls
    assert calls > 5
    for evil in _swaps(calls):
        image.write_bytes(content)
        with swap.watching(evil):
            read = await _attack(image, None)
        assert b"S" not in read, f"the {kind} was read outside: {evil}"
        for name in ("secret", "keep"):
            assert (tmp_path / "out" / name).read_bytes() == SECRET, f"{name} was written as the {kind}: {evil}"


async def test_an_allowed_directory_is_not_exchanged_for_another(tmp_path: Path) -> None:
    """What the user allows is that directory, not whatever takes its name later."""
    home = _prepare(tmp_path)
    (tmp_path / "allowed").mkdir()
    (tmp_path / "allowed" / "keep").write_bytes(bytes(SIZE))
    image = _overlay(home, "../allowed/keep")
    gate = Gate([str(tmp_path / "allowed")])
    assert await _attack(image, gate) == bytes(512)
    os.rename(tmp_path / "allowed", tmp_path / "aside")
    os.rename(tmp_path / "out", tmp_path / "allowed")
    assert await _attack(image, gate) == b""
    os.rename(tmp_path / "allowed", tmp_path / "out")
    os.symlink("out", tmp_path / "allowed")
    assert await _attack(image, gate) == b""


async def test_an_image_whose_directory_is_a_link(tmp_path: Path) -> None:
    """The image's directory is where it lies, and by any name of it the same files are allowed."""
    home = _prepare(tmp_path)
    image = _overlay(home, "link")
    os.symlink("in", tmp_path / "alias")
    for place in (tmp_path / "alias" / image.name, image):
        assert await _attack(place, None) == bytes(512)
    os.unlink(home / "link")
    os.symlink("../out/secret", home / "link")
    for place in (tmp_path / "alias" / image.name, image):
        assert await _attack(place, None) == b""


async def test_what_became_of_an_open_file_does_not_matter_to_a_reopening(tmp_path: Path) -> None:
    """Reading becomes writing on the very file that the gate let through."""
    from fusedisk.block.graph.reopen import reopen

    home = _prepare(tmp_path)
    image = _with_data_file(home, "link")
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(image))
    os.rename(home / "keep", tmp_path / "moved")
    _link_swapper(home)(True)
    await reopen(graph, {backend.node: {"read-only": False}})
    data = backend.node.children["data-file"].node
    assert data.driver.storage_descriptor() is not None
    await graph.close()
    assert (tmp_path / "out" / "secret").read_bytes() == SECRET
    assert data.config.reference is not None
    assert not data.config.read_only


async def test_a_pipe_in_the_place_of_an_image_never_keeps_who_opens_it_waiting(tmp_path: Path) -> None:
    """Nor in that of a new image: a pipe's opening waits for its other end, so only regular files are opened."""
    home = _prepare(tmp_path)
    os.mkfifo(tmp_path / "out" / "pipe")

    def swap(outside: bool) -> None:
        os.symlink("../out/pipe" if outside else "keep", home / "new")
        os.rename(home / "new", home / "link")

    swapper = Swapper(swap)
    with swapper.watching(lambda call: False):
        assert await _attack(home / "link", None) == bytes(512)
    for evil in _swaps(swapper.calls):
        with swapper.watching(evil), trio.fail_after(60):
            await _attack(home / "link", None)
        with swapper.watching(evil), trio.fail_after(60), contextlib.suppress(FusediskError):
            await create_image(DRIVERS, "raw", str(home / "link"), {"size": SIZE})


async def test_without_proc_only_what_the_user_names_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = _prepare(tmp_path)
    image = _overlay(home, "keep")
    monkeypatch.setattr(host_open, "_OWN_DESCRIPTORS", "/nowhere")
    assert await _attack(home / "keep", None) == bytes(512)
    graph = Graph(DRIVERS)
    with pytest.raises(GateError, match="as /proc is missing"):
        await graph.open_backend(str(image))
    assert not graph.nodes

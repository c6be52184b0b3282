"""An overlay takes note of its backing file while it is empty, and says if that was changed afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.drivers.format.qcow2.first_write import EXTENSION_BASE
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.support.images import MIB, make_qcow2, make_sparse_raw

TAG = EXTENSION_BASE.to_bytes(4, "big")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """The warnings since it was called last."""

    def since() -> list[str]:
        found = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return found

    return since


async def _write(image: Path, offset: int = 0) -> None:
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(image), writable=True)
    await backend.write(offset, b"x" * 512)
    await graph.close()


async def _read(image: Path) -> None:
    graph = Graph(DRIVERS)
    await graph.open_backend(str(image))
    await graph.close()


async def _overlay(folder: Path, base: Path, **options: object) -> Path:
    """An overlay that QEMU has made, and that we have written to."""
    top = make_qcow2(folder / "top.qcow2", None, backing=base, **options)
    await _write(top)
    return top


def _told(base: Path, top: Path, change: str) -> str:
    return (
        f"'{base}' has changed since '{top}' was made over it ({change}): if its disk reads otherwise now, the two no "
        "longer fit together."
    )


async def test_nothing_is_said_of_a_base_that_is_what_it_was(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    top = await _overlay(tmp_path, make_qcow2(tmp_path / "base.qcow2", MIB))
    await _read(top)
    await _write(top)
    base = tmp_path / "base.qcow2"
    base.chmod(0o400)
    base.rename(tmp_path / "x")
    (tmp_path / "x").rename(base)
    await _read(top)
    assert said() == []
    qemu_img("check", top)


@pytest.mark.parametrize("name", ["base.qcow2", "base.raw"])
async def test_a_base_that_was_written_to(tmp_path: Path, said: Callable[[], list[str]], name: str) -> None:
    base = tmp_path / name
    if name == "base.raw":
        make_sparse_raw(base, MIB)
    else:
        make_qcow2(base, MIB, "write 0 1M")
    top = await _overlay(tmp_path, base)
    qemu_io(base, "write -P 6 64k 64k", fmt=base.suffix[1:])
    for opened in (_read, _write):
        await opened(top)
        (sentence,) = said()
        assert sentence.startswith(f"'{base}' has changed since '{top}' was made over it (last written 20")


async def test_a_base_of_another_size(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    top = await _overlay(tmp_path, base)
    qemu_img("resize", base, "2M")
    await _read(top)
    assert said() == [_told(base, top, f"a disk of {MIB} bytes then, {2 * MIB} now")]


async def test_a_base_that_was_replaced(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    top, before = await _overlay(tmp_path, base), base.stat().st_size
    base.unlink()
    make_qcow2(base, MIB, "write 0 1M")
    await _read(top)
    assert said() == [_told(base, top, f"a file of {before} bytes then, {base.stat().st_size} now")]


async def test_the_data_file_of_a_base_counts(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB, "write 0 1M", data_file=tmp_path / "base.data")
    top = await _overlay(tmp_path, base)
    await _read(top)
    assert said() == []
    with (tmp_path / "base.data").open("ab") as file:
        file.write(b"more")
    await _read(top)
    assert f"a file of {base.stat().st_size + MIB} bytes then" in said()[0]


async def test_copies_are_no_changes(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    """They have other times, in whatever order, and the same content."""
    folder, copied = tmp_path / "one", tmp_path / "two"
    folder.mkdir()
    copied.mkdir()
    await _overlay(folder, make_qcow2(folder / "base.qcow2", MIB, "write 0 1M"))
    for name in ("top.qcow2", "base.qcow2"):
        shutil.copyfile(folder / name, copied / name)
    await _read(copied / "top.qcow2")
    assert said() == []


async def test_after_a_commit_it_takes_note_anew(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    top = await _overlay(tmp_path, base)
    qemu_img("commit", top)
    await _read(top)
    await _write(top)
    await _read(top)
    assert said() == []
    qemu_io(base, "write 0 1k")
    await _read(top)
    assert len(said()) == 1


async def test_an_overlay_without_a_note_says_nothing(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    base = make_qcow2(tmp_path / "base.qcow2", MIB)
    top = make_qcow2(tmp_path / "top.qcow2", None, "write 0 64k", backing=base)
    await _write(top)
    qemu_io(base, "write 0 64k")
    await _read(top)
    assert said() == []
    assert TAG not in top.read_bytes()[:65536]


async def test_the_note_is_of_the_file_that_the_header_names(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    base, other = make_qcow2(tmp_path / "base.qcow2", MIB), make_qcow2(tmp_path / "other.qcow2", 2 * MIB)
    top = await _overlay(tmp_path, base)
    graph = Graph(DRIVERS)
    await graph.open_backend(
        {"driver": "qcow2", "file.filename": str(top), "backing.driver": "qcow2", "backing.file.filename": str(other)}
    )
    await graph.close()
    qemu_img("rebase", "-u", "-b", "other.qcow2", "-F", "qcow2", top)
    assert TAG in top.read_bytes()[:65536]
    await _read(top)
    assert said() == []


@pytest.mark.parametrize("writable", [False, True])
async def test_looking_at_an_empty_overlay_changes_nothing(tmp_path: Path, writable: bool) -> None:
    top = make_qcow2(tmp_path / "top.qcow2", None, backing=make_qcow2(tmp_path / "base.qcow2", MIB))
    before = top.read_bytes()
    graph = Graph(DRIVERS)
    backend = await graph.open_backend(str(top), writable=writable)
    await backend.read(0, 4096)
    await graph.close()
    assert top.read_bytes() == before


async def test_a_header_without_room_stays_as_it_is(tmp_path: Path, said: Callable[[], list[str]]) -> None:
    make_qcow2(tmp_path / "base.qcow2", MIB)
    top = tmp_path / "top.qcow2"
    name = "./" * 170 + "base.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=512", "-b", name, "-F", "qcow2", top)
    await _write(top)
    await _read(top)
    assert said() == []
    assert TAG not in top.read_bytes()[:512]
    qemu_img("check", top)

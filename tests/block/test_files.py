"""Formats of several files: made together, all removed after a failure, and opened through the gate for a check."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.registry import Registry
from fusedisk.block.image.check import open_for_check
from fusedisk.block.image.create import create_image
from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.children import ChildSpec, Role
from fusedisk.block.model.driver import Driver
from fusedisk.block.model.files import Files
from fusedisk.block.request import io
from fusedisk.core.errors import (
    FusediskError,
    GateError,
    HostError,
    NotSupportedError,
    OptionError,
    ReadOnlyError,
    WouldLoseDataError,
)
from fusedisk.core.options import CreateOptions, option
from tests.hostile.sentence import assert_sentence


@dataclasses.dataclass(slots=True)
class PartsOptions(CreateOptions):
    size: int = option(None, kind="size", help="of the disk")
    parts: str = option("", help="names of the parts")
    fails: bool = option(False, kind="bool", help="fail after the files are made")


class PartsDriver(Driver):
    """Its file has the names of its parts, a line each."""

    name = "parts"
    create_options_type = PartsOptions
    child_specs = (ChildSpec("file", Role.FILE),)

    @classmethod
    async def create(cls, files: Files, options: Any) -> None:
        main, *parts = await files.create(*options.parts.split())
        for number, part in enumerate(parts):
            await io.write(part, 0, (memoryview(b"part %d" % number),))
        await io.write(main, 0, (memoryview(options.parts.encode()),))
        if options.fails:
            raise NotSupportedError("this image fails.")

    @classmethod
    async def check(cls, files: Files, repair: Repair, progress: Any, *, dry_run: bool = False) -> CheckResult:
        names = bytearray(files.main.length)
        await io.read(files.main, 0, memoryview(names))
        for name in names.decode().split():
            part = await files.open(name)
            head = bytearray(4)
            await io.read(part, 0, memoryview(head))
            assert head == b"part"
            if repair is Repair.ALL:
                await io.write(part, 0, (memoryview(b"done"),))
        return CheckResult()


PARTS = Registry(
    {
        "parts": "tests.block.test_files:PartsDriver",
        "raw": "fusedisk.drivers.format.raw:RawDriver",
        "file": "fusedisk.drivers.protocol.file:FileDriver",
    },
    prefixes={"file": "file"},
    probed=("raw",),
)


async def _create(image: Path, parts: str, **more: Any) -> None:
    options = {key: more.pop(key) for key in ("fails",) if key in more}
    await create_image(PARTS, "parts", str(image), {"size": 512, "parts": parts, **options}, **more)


async def _check(image: Path, repair: Repair = Repair.NOTHING, *, writable: bool = False) -> None:
    spec = {"driver": "parts", "file": {"driver": "file", "filename": str(image)}}
    async with open_for_check(PARTS, spec, writable=writable, gate=Gate()) as found:
        await found.driver.check(found.files, repair, lambda done, total: None)


async def test_all_files_are_made_beside_the_image(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    await _create(folder / "disk", "one two")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "disk": b"one two",
        "one": b"part 0",
        "two": b"part 1",
    }


@pytest.mark.parametrize(
    ("parts", "error", "sentence"),
    [
        ("one missing/two", HostError, "missing/two"),
        ("one old", WouldLoseDataError, "exists and holds 3 bytes"),
        ("one disk", OptionError, "cannot be its own data file"),
        ("one ./one", OptionError, "names the file './one' twice"),
    ],
)
async def test_a_file_that_cannot_be_made_leaves_none(
    parts: str, error: type[FusediskError], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(b"old")
    with pytest.raises(error, match=sentence) as caught:
        await _create(tmp_path / "disk", parts)
    assert_sentence(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


async def test_an_existing_image_is_replaced_after_all_new_files_are_made(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"precious")
    with pytest.raises(HostError):
        await _create(tmp_path / "disk", "one missing/two", overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"disk": b"precious"}
    await _create(tmp_path / "disk", "one", overwrite=True)
    assert (tmp_path / "disk").read_bytes() == b"one"


async def test_a_failure_of_the_format_removes_all_new_files(tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match="this image fails"):
        await _create(tmp_path / "disk", "one two", fails=True)
    assert not list(tmp_path.iterdir())


async def test_a_check_opens_the_files_that_the_image_names(tmp_path: Path) -> None:
    await _create(tmp_path / "disk", "one two")
    await _check(tmp_path / "disk")
    with pytest.raises(ReadOnlyError):
        await _check(tmp_path / "disk", Repair.ALL)
    await _check(tmp_path / "disk", Repair.ALL, writable=True)
    assert (tmp_path / "one").read_bytes() == b"done 0"


async def test_a_check_opens_nothing_outside_of_the_directory(tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"part")
    folder = tmp_path / "images"
    folder.mkdir()
    image = folder / "disk"
    for name in ("../outside", str(tmp_path / "outside"), "link"):
        image.write_text(name)
        if name == "link":
            (folder / "link").symlink_to(tmp_path / "outside")
        with pytest.raises(GateError) as caught:
            await _check(image)
        assert_sentence(caught.value)
    image.write_text("gone")
    with pytest.raises(HostError, match="gone"):
        await _check(image)

"""What is of the wrong type is refused in a sentence, and what is nearly of the right one is taken."""

from __future__ import annotations

import os
from array import array
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

import fusedisk
from fusedisk.core.errors import FusediskError, OptionError, OutOfRangeError
from tests.support.images import KIB, make_qcow2, make_sparse_raw


class Number:
    """Counts as an int, as numpy's integers do."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


class Place:
    """Counts as a path, if that is what it holds."""

    def __init__(self, path: Any) -> None:
        self.path = path

    def __fspath__(self) -> Any:
        return self.path


ODD: list[Any] = [
    *(None, 5, -1, 1 << 62, 1 << 70, -1 << 70, 1.5, float("nan"), True, "", "0", "x", "a\0b", "\ud800", "\udcff"),
    *(b"", b"x", b"\xff", b"a\0b", (), [], [None], {}, {5: 1}, {"driver": 5}, {"file": None}, {"a": {"b": {5: 6}}}),
    *({"driver": "raw", "file": [None]}, {"driver": "raw", "file": {"filename": Path("x")}}, {None}, object(), int),
    *(Number(3), Place(b"x"), Place(5), array("H", [1, 2]), memoryview(b"abcdef")[::2], "9" * 30, "x" * 5000),
]
"""Most of it is wrong everywhere."""


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Among others, in the working directory."""
    monkeypatch.chdir(tmp_path)
    make_sparse_raw(tmp_path / "x", 64 * KIB, (0, 64 * KIB))
    return make_qcow2(tmp_path / "disk.qcow2", 1024 * KIB, "write -P 165 0 64k")


@pytest.fixture
async def disk(image: Path) -> AsyncIterator[fusedisk.Disk]:
    async with fusedisk.open(image, writable=True) as disk:
        yield disk


def opened_file(image: Path) -> fusedisk.DiskFile:
    return fusedisk.open_sync(image, writable=True).as_file()


async def outcome(call: Callable[[], Any]) -> BaseException | None:
    """What comes out of a call, of a function of whatever kind."""
    try:
        found = call()
        if hasattr(found, "__aenter__"):
            async with found:
                pass
        elif hasattr(found, "__aiter__"):
            async for _ in found:
                pass
        elif hasattr(found, "__await__"):
            await found
    except BaseException as exc:
        return exc
    return None


def assert_told(exc: BaseException | None, what: str) -> None:
    """It is an error for callers, in a sentence of ours."""
    if exc is None:
        return
    assert type(exc) in (TypeError, ValueError) or isinstance(exc, FusediskError), f"{what}: {exc!r}"
    if not isinstance(exc, FusediskError):
        assert ", expected " in str(exc) or str(exc).endswith(" does."), f"{what}: {exc!r}"


# --- whatever it is -------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(len(ODD)))
async def test_requests(disk: fusedisk.Disk, index: int) -> None:
    odd = ODD[index]
    calls: dict[str, Callable[[], Any]] = {
        "truncate": lambda: disk.truncate(odd if not isinstance(odd, int) or odd < 0 else "x"),
        "preallocation": lambda: disk.truncate(disk.size, preallocation=odd),
        "may_unmap": lambda: disk.write_zeroes(0, 1, may_unmap=odd),
        "create_snapshot": lambda: disk.create_snapshot(odd),
        "vm_clock": lambda: disk.create_snapshot("s", vm_clock=odd),
        "vm_state_size": lambda: disk.create_snapshot("s", vm_state_size=odd),
        "icount": lambda: disk.create_snapshot("s", icount=odd),
        "apply_snapshot": lambda: disk.apply_snapshot(odd),
        "delete_snapshot": lambda: disk.delete_snapshot(odd),
        "delete_snapshot id": lambda: disk.delete_snapshot(id=odd),
    }
    for name in ("read", "block_status", "write_zeroes", "discard", "extents"):
        calls[f"{name}({odd!r:.50}, 5)"] = partial(getattr(disk, name), odd, 5)
        calls[f"{name}(0, {odd!r:.50})"] = partial(getattr(disk, name), 0, odd)
    if odd != 1 << 62:  # more memory than there is, and no more VM state than there may be
        calls["load_vmstate length"] = lambda: disk.load_vmstate(0, odd)
    calls["load_vmstate offset"] = lambda: disk.load_vmstate(odd, 5)
    for name in ("write", "write_compressed", "save_vmstate", "read_into"):
        calls[f"{name}({odd!r:.50}, bytes)"] = partial(getattr(disk, name), odd, bytearray(8))
        calls[f"{name}(0, {odd!r:.50})"] = partial(getattr(disk, name), 0, odd)
    for name, call in calls.items():
        assert_told(await outcome(call), f"{name} with {odd!r:.50}")


@pytest.mark.parametrize("index", range(len(ODD)))
async def test_opening(image: Path, index: int) -> None:
    odd = ODD[index]
    assert_told(await outcome(lambda: fusedisk.open(odd)), f"{odd!r}")
    for name in (
        *("writable", "format", "cache", "discard", "detect_zeroes", "copy_on_read", "force_share", "allow_paths"),
        "allow_any_reference",
    ):
        options: dict[str, Any] = {name: odd}
        assert_told(await outcome(partial(fusedisk.open, image, **options)), f"{name}={odd!r}")


@pytest.mark.parametrize("index", range(len(ODD)))
async def test_creating_and_amending(image: Path, index: int) -> None:
    odd = ODD[index]
    given = {"filename": "new", "format": "qcow2", "size": KIB, "backing": "disk.qcow2", "backing_format": "qcow2"}
    for name in (*given, "options", "check_backing", "allow_paths", "allow_any_reference"):
        options: dict[str, Any] = given | {name: odd}
        assert_told(await outcome(partial(fusedisk.create, **options)), f"create {name}={odd!r}")
    for name in ("size", "cluster_size", "compat", "data_file", "backing_file", "preallocation", "lazy_refcounts"):
        options = {
            "filename": "new",
            "format": "qcow2",
            "size": KIB if name != "size" else None,
            "options": {name: odd},
        }
        assert_told(await outcome(partial(fusedisk.create, **options)), f"create -o {name}={odd!r}")
    for name in ("image", "options", "format", "force", "progress", "allow_paths", "allow_any_reference"):
        if name != "progress" or not callable(odd):
            options = {"image": image, "options": {"lazy_refcounts": True}} | {name: odd}
            assert_told(await outcome(partial(fusedisk.amend, **options)), f"amend {name}={odd!r}")


@pytest.mark.parametrize("index", range(len(ODD)))
async def test_files(image: Path, index: int) -> None:
    odd = ODD[index]
    file = await trio.to_thread.run_sync(opened_file, image)
    calls: dict[str, Callable[[], Any]] = {
        "seek": lambda: file.seek(odd),
        "whence": lambda: file.seek(0, odd),
        "write": lambda: (file.seek(0), file.write(odd)),
        "readinto": lambda: (file.seek(0), file.readinto(odd)),
        "truncate": lambda: file.truncate(odd if not isinstance(odd, int) or odd < 0 else "x"),
    }
    for name, call in calls.items():
        exc = await outcome(partial(trio.to_thread.run_sync, call))
        if not isinstance(exc, OSError):
            assert_told(exc, f"{name} with {odd!r:.50}")
    await trio.to_thread.run_sync(file._disk.close)


# --- the sentences --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda disk: disk.read("0", 5), "offset is of the type str, expected a whole number."),
        (lambda disk: disk.read(1.5, 2), "offset is of the type float, expected a whole number."),
        (lambda disk: disk.read(0, None), "length is of the type NoneType, expected a whole number."),
        (lambda disk: disk.truncate("x"), "size is of the type str, expected a whole number."),
        (
            lambda disk: disk.write(0, "text"),
            "data is of the type str, expected bytes, or an object that holds them as bytes and bytearray do.",
        ),
        (
            lambda disk: disk.read_into(0, b"fixed"),
            "buffer is of the type bytes, expected a buffer that can be written to, such as a bytearray.",
        ),
        (
            lambda disk: disk.write(0, memoryview(b"abcd")[::2]),
            "data is a view of bytes that do not lie in one piece; bytes(data) does.",
        ),
        (lambda disk: fusedisk.open("x", writable="yes"), "writable is of the type str, expected True or False."),
        (lambda disk: fusedisk.open(5), "the image is of the type int, expected a path."),
        (
            lambda disk: fusedisk.open("x", allow_paths="/tmp"),
            "allow_paths is of the type str, expected a list of paths.",
        ),
        (lambda disk: fusedisk.open({"file": {5: 1}}), "a name in the option 'file' is of the type int, expected text"),
    ],
)
async def test_sentences(disk: fusedisk.Disk, call: Callable[[fusedisk.Disk], Any], sentence: str) -> None:
    exc = await outcome(lambda: call(disk))
    assert isinstance(exc, TypeError | ValueError)
    assert str(exc).startswith(sentence)


async def test_sentences_about_values(disk: fusedisk.Disk) -> None:
    with pytest.raises(OptionError, match=r"^vm_clock is -1, but it must lie between 0 and 18446744073709551615\.$"):
        await disk.create_snapshot("s", vm_clock=-1)
    with pytest.raises(OptionError, match=r"^preallocation is 'x', expected one of off, .*\.$"):
        await disk.truncate(0, preallocation="x")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^the image is 'x\\ud800', which has characters that no name can have.$"):
        fusedisk.open("x\ud800")
    with pytest.raises(OptionError, match=r"^the file name '\\ud800' cannot be written in this system's utf-8.$"):
        async with fusedisk.open('json:{"driver": "raw", "file": {"driver": "file", "filename": "\\ud800"}}'):
            pass
    for offset, length in ((1 << 70, 1), (0, 1 << 70), (0, -1)):
        with pytest.raises(OutOfRangeError):
            await disk.load_vmstate(offset, length)


# --- what is taken --------------------------------------------------------------------------------------


async def test_numbers_of_other_types(disk: fusedisk.Disk) -> None:
    await disk.write(Number(4), b"abc")  # type: ignore[arg-type]
    assert await disk.read(Number(5), Number(2)) == b"bc"  # type: ignore[arg-type]
    buffer = bytearray(2)
    await disk.read_into(Number(4), buffer)  # type: ignore[arg-type]
    assert buffer == b"ab"
    with pytest.raises(OutOfRangeError):
        await disk.read(Number(-1), 1)  # type: ignore[arg-type]
    await disk.truncate(Number(2048 * KIB))  # type: ignore[arg-type]
    assert disk.size == 2048 * KIB


async def test_buffers_of_other_items(disk: fusedisk.Disk) -> None:
    words = array("H", [0x0101, 0x0202, 0x0303])
    await disk.write(0, words)  # type: ignore[arg-type]
    assert await disk.read(0, 7) == b"\1\1\2\2\3\3\xa5"
    found = array("H", [0, 0])
    await disk.read_into(2, found)  # type: ignore[arg-type]
    assert list(found) == [0x0202, 0x0303]
    await disk.write(0, memoryview(bytearray(b"abcd")).cast("B", (2, 2)))
    assert await disk.read(0, 5) == b"abcd\3"
    with pytest.raises(OutOfRangeError):
        await disk.write(disk.size - 5, words)  # type: ignore[arg-type]


def test_a_file_takes_buffers_of_other_items(image: Path) -> None:
    with fusedisk.open_sync(image, writable=True) as disk:
        file = disk.as_file()
        assert file.write(array("H", [0x0101, 0x0202])) == 4
        file.seek(Number(2))  # type: ignore[arg-type]
        found = array("H", [0, 0])
        assert file.readinto(found) == 4
        assert list(found) == [0x0202, 0xA5A5]


async def test_paths_of_each_kind(image: Path) -> None:
    odd = os.fsdecode(b"json:\xff")  # no UTF-8, and no JSON either
    os.rename("x", odd)
    for given in (os.fsencode(odd), Place(odd), Place(os.fsencode(odd)), Path(odd)):
        async with fusedisk.open(given, format="raw") as disk:
            assert disk.size == 64 * KIB
    other = image.parent.parent / f"{image.parent.name}-other"
    other.mkdir()
    await fusedisk.create(os.fsencode(other / "top"), "qcow2", backing=os.fsencode(image), backing_format="qcow2")
    async with fusedisk.open(other / "top", allow_paths=[os.fsencode(image.parent)]) as disk:
        assert await disk.read(0, 1) == b"\xa5"
    (entry,) = os.scandir(os.fsencode(other))
    await fusedisk.amend(entry, {"size": 2048 * KIB}, allow_paths=[image.parent])
    (entry,) = os.scandir(other)
    async with fusedisk.open(entry, allow_paths=[Place(str(image))]) as disk:
        assert disk.size == 2048 * KIB

"""An image whose file ends too early says so as it opens; a whole one never does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img, qemu_io
from tests.support.images import KIB, MIB, make_qcow2


async def _said(image: Path, caplog: pytest.LogCaptureFixture, *, writable: bool = False) -> list[str]:
    """The warnings of one opening."""
    caplog.clear()
    graph = Graph(DRIVERS)
    await graph.open_backend(str(image), writable=writable)
    await graph.close()
    return [record.getMessage() for record in caplog.records]


def _sentence(image: Path, length: int, place: int) -> str:
    return (
        f"'{image}' is incomplete: the file is {length} bytes long, but has data at {place}; what is missing reads as "
        "zeroes, so copy it again if it was cut short."
    )


@pytest.mark.parametrize("writable", [False, True])
async def test_data_that_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture, writable: bool) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 4 * MIB, "write 1M 64k", "write 3M 64k", "write 2M 64k")
    length = image.stat().st_size
    assert await _said(image, caplog) == []
    with image.open("r+b") as file:
        file.truncate(length - 64 * KIB)
    assert await _said(image, caplog, writable=writable) == [_sentence(image, length - 64 * KIB, length - 64 * KIB)]


async def test_an_l2_table_that_is_cut_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 4 << 30, "write 0 64k", "write 3G 64k")
    length = image.stat().st_size
    with image.open("r+b") as file:
        file.truncate(length - 128 * KIB)
    assert await _said(image, caplog) == [_sentence(image, length - 128 * KIB, length - 128 * KIB)]


@pytest.mark.parametrize(
    "options",
    [
        {"cluster_size": 512},
        {"cluster_size": 4096, "refcount_bits": 1},
        {"cluster_size": "2M", "refcount_bits": 64},
        {"extended_l2": "on"},
        {"compat": "0.10"},
    ],
    ids=str,
)
async def test_every_layout(tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, object]) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 16 * MIB, "write 3M 5M", "write 0 1M", "write 12M 4M", **options)
    assert await _said(image, caplog) == []
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - (4 * MIB if options.get("cluster_size") == "2M" else MIB))
    (said,) = await _said(image, caplog)
    assert "is incomplete" in said


async def test_compressed_clusters(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, image = tmp_path / "x.raw", tmp_path / "x.qcow2"
    source.write_bytes(bytes(range(256)) * (16 * KIB))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", source, image)
    assert await _said(image, caplog) == []
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 8 * KIB)
    (said,) = await _said(image, caplog)
    assert "is incomplete" in said


async def test_a_raw_data_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = tmp_path / "x.raw"
    image = make_qcow2(tmp_path / "x.qcow2", MIB, "write 0 1M", data_file=data, data_file_raw="on")
    assert await _said(image, caplog) == []
    with data.open("r+b") as file:
        file.truncate(MIB // 2)
    (said,) = await _said(image, caplog)
    assert said.startswith(f"'{data}', the data file of '{image}', is incomplete: it is {MIB // 2} bytes long")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preallocation": "metadata"},
        {"preallocation": "falloc"},
        {"preallocation": "metadata", "extended_l2": "on"},
        {"cluster_size": 512},
        {"cluster_size": "2M"},
        {"refcount_bits": 1, "preallocation": "metadata"},
        {"lazy_refcounts": "on"},
    ],
    ids=str,
)
async def test_whole_images(tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, object]) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 8 * MIB, **options)
    assert await _said(image, caplog) == []
    qemu_io(image, "write 1M 3000k", "discard 1M 1M", "write -z 5M 1M", options="-d unmap")
    if options.get("refcount_bits") != 1:
        qemu_img("snapshot", "-c", "s", image)
    assert await _said(image, caplog, writable=True) == []


async def test_clusters_that_a_crash_has_leaked_are_not_missing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", MIB, "write 0 64k", compat="1.1")
    next_cluster = image.stat().st_size // (64 * KIB)
    with image.open("r+b") as file:
        file.seek(2 * 64 * KIB + 2 * next_cluster)  # the refcount block
        file.write(b"\0\1\0\1")
    assert await _said(image, caplog) == []


async def test_allocated_zeroes_are_not_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image = make_qcow2(tmp_path / "x.qcow2", 4 * MIB, "write 1M 64k", "write -z 1M 64k")
    with image.open("r+b") as file:
        file.truncate(image.stat().st_size - 64 * KIB)
    assert await _said(image, caplog) == []

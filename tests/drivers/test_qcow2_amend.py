"""``amend`` on qcow2: qemu-img finds the image sound, sees the new setting, and reads what it read before."""

from __future__ import annotations

import itertools
import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.image.amend import amend_image, amend_node
from fusedisk.core.errors import ImageError, NotSupportedError
from fusedisk.core.options import split_dotted
from fusedisk.drivers.format.qcow2 import layout
from fusedisk.drivers.table import DRIVERS
from tests.conftest import ToolError, qemu_img, qemu_io
from tests.support.qcow2 import assert_clean, opened
from tests.support.thinning import thinned

WIDTHS = (1, 2, 4, 8, 16, 32, 64)
KIB = 1 << 10


async def amend(path: Path, *, force: bool = False, **options: Any) -> None:
    """Amend the image with our driver."""
    await amend_image(DRIVERS, str(path), options, force=force)


def specific(path: Path) -> dict[str, Any]:
    """What qemu-img says about the format, without what differs by version."""
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", path))
    data: dict[str, Any] = found["format-specific"]["data"]
    return {"size": found["virtual-size"]} | data


def content(path: Path, snapshot: str | None = None) -> bytes:
    """What QEMU reads in the image, or in one of its snapshots."""
    out = path.with_suffix(".out")
    chosen = ["-l", f"snapshot.name={snapshot}"] if snapshot else []
    qemu_img("convert", "-O", "raw", *chosen, path, out)
    return out.read_bytes()


def contents(path: Path) -> dict[str, bytes]:
    """What QEMU reads in the image and in each snapshot."""
    found = json.loads(qemu_img("info", "--output=json", path))
    names = [snapshot["name"] for snapshot in found.get("snapshots", ())]
    return {"": content(path)} | {name: content(path, name) for name in names}


def cluster_size(path: Path) -> int:
    """Bytes in a cluster."""
    return 1 << int.from_bytes(path.read_bytes()[20:24], "big")


def make(
    path: Path, options: str = "cluster_size=4096", *, backing: bool = False, snapshots: bool = True, size: str = "1M"
) -> Path:
    """An image with data, zeroes with and without host clusters, compressed clusters and, if asked for, snapshots and
    a backing file, some of all shared by them."""
    args: list[str | Path] = []
    if backing:
        below = path.with_suffix(".base")
        below.write_bytes(b"".join(b"%07d\n" % number for number in range(256 * KIB // 8 * 3)))
        args = ["-b", below, "-F", "raw"]
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, *args, path, size)
    zeroes = ("write -z 96k 64k",) if "0.10" not in options else ("write -P 0 96k 64k",)
    unit = max(cluster_size(path), 4096)
    compressed = () if unit > 64 * KIB else (f"write -c -P 2 512k {unit}", f"write -c -P 3 {512 * KIB + unit} {unit}")
    qemu_io(path, "write -P 1 0 128k", *zeroes, *compressed, fmt="qcow2")
    if snapshots:
        qemu_img("snapshot", "-c", "first", path)
        more = ("write -z 16k 32k", "write -z 600k 8k") if "0.10" not in options else ()
        qemu_io(path, "write -P 4 40k 16k", *more, fmt="qcow2")
        qemu_img("snapshot", "-c", "second", path)
        qemu_io(path, "write -P 5 44k 4k", "write -P 6 100k 4k", fmt="qcow2")
    return path


KINDS = list(itertools.product((False, True), (False, True)))
kinds = pytest.mark.parametrize(("backing", "snapshots"), KINDS, ids=lambda value: str(value).lower())


# --- settings -------------------------------------------------------------------------------------------


@kinds
async def test_downgrade_and_upgrade(tmp_path: Path, backing: bool, snapshots: bool) -> None:
    image = make(tmp_path / "disk.qcow2", backing=backing, snapshots=snapshots)
    before = contents(image)
    await amend(image, compat="0.10")
    assert image.read_bytes()[4:8] == b"\0\0\0\2"
    assert_clean(image)
    assert contents(image) == before
    await amend(image, compat="v3")
    assert specific(image)["compat"] == "1.1"
    assert_clean(image)
    assert contents(image) == before
    qemu_io(image, "write -P 9 0 256k", fmt="qcow2")
    assert_clean(image)
    for name in before.keys() - {""}:
        assert content(image, name) == before[name]


@pytest.mark.parametrize("unit", [512, 1024, 4096, 65536, 2 << 20])
async def test_versions_at_every_cluster_size(tmp_path: Path, unit: int) -> None:
    image = make(tmp_path / "disk.qcow2", f"cluster_size={unit}", backing=True)
    before = contents(image)
    for compat in ("0.10", "1.1", "0.10"):
        await amend(image, compat=compat)
        assert specific(image)["compat"] == compat
        assert_clean(image)
        assert contents(image) == before


async def test_zeroes_that_keep_a_shared_cluster_cost_the_other_nothing(tmp_path: Path) -> None:
    """A zero entry may name a host cluster in which a snapshot has data."""
    image = make(tmp_path / "disk.qcow2", backing=True, snapshots=False)
    qemu_img("snapshot", "-c", "data", image)
    async with opened(image) as disk:
        await disk.write_zeroes(0, 64 * KIB)
    mapped = json.loads(qemu_img("map", "--output=json", image))
    assert mapped[0]["zero"]
    before = contents(image)
    assert before[""][: 64 * KIB] == bytes(64 * KIB) != before["data"][: 64 * KIB]
    await amend(image, compat="0.10")
    assert contents(image) == before
    assert_clean(image)


@kinds
async def test_every_width_to_every_other(tmp_path: Path, backing: bool, snapshots: bool) -> None:
    image = make(tmp_path / "disk.qcow2", backing=backing, snapshots=snapshots)
    before = contents(image)
    # Two compressed clusters share a host cluster, which three L2 tables lead to with the snapshots.
    widths = [width for width in WIDTHS if width >= (4 if snapshots else 2)]
    order = [*widths, *reversed(widths), 64, widths[0], 64, 16]
    for width in order:
        await amend(image, refcount_bits=width)
        assert specific(image)["refcount-bits"] == width
        assert_clean(image)
    assert contents(image) == before
    qemu_io(image, "write -P 9 0 1M", fmt="qcow2")
    assert_clean(image)


@pytest.mark.parametrize(
    "options",
    [
        "extended_l2=on,cluster_size=16k",
        "compression_type=zstd",
        "data_file={}.data",
        "data_file={}.data,data_file_raw=on",
    ],
)
async def test_widths_beside_other_features(tmp_path: Path, options: str) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options.format(image), image, "8M")
    qemu_io(image, "write -P 1 0 1M", "write -z 512k 1M", "write -P 2 3M 100k", fmt="qcow2")
    before = content(image)
    for width in (64, 1, 16):
        await amend(image, refcount_bits=width, lazy_refcounts=width == 64)
        assert specific(image)["refcount-bits"] == width
        assert content(image) == before
        assert_clean(image)


@pytest.mark.parametrize("unit", [512, 65536, 2 << 20])
@pytest.mark.parametrize("width", [1, 64])
@pytest.mark.slow
async def test_widths_of_large_images(tmp_path: Path, unit: int, width: int) -> None:
    image = tmp_path / "disk.qcow2"
    size = 40 << 20 if unit == 512 else 8 << 30
    options = f"cluster_size={unit},preallocation=metadata"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, image, str(size))
    qemu_io(image, "write -P 7 3M 5M", fmt="qcow2")
    qemu_img("create", "-q", "-f", "qcow2", image.with_suffix(".same"), str(size))
    qemu_io(image.with_suffix(".same"), "write -P 7 3M 5M", fmt="qcow2")
    for bits in (width, 16, width):
        await amend(image, refcount_bits=bits)
        assert specific(image)["refcount-bits"] == bits
        assert_clean(image)
    qemu_img("compare", image, image.with_suffix(".same"))


async def test_a_reference_too_many_for_the_width_changes_nothing(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2")
    before = image.read_bytes()
    with pytest.raises(ImageError, match=r"counts 6 references to the cluster at .* refcounts of 1 bits"):
        await amend(image, refcount_bits=1)
    assert image.read_bytes() == before


async def test_lazy_refcounts(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2")
    await amend(image, lazy_refcounts=True)
    assert specific(image)["lazy-refcounts"] is True
    async with opened(image) as disk:
        await disk.write(0, b"x" * 300 * KIB)
    await amend(image, lazy_refcounts="off")
    assert specific(image)["lazy-refcounts"] is False
    assert_clean(image)


async def test_lazy_refcounts_that_a_crash_left_wrong_are_right_again(tmp_path: Path) -> None:
    image = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on", image, "8M")
    with pytest.raises(ToolError):
        qemu_io(image, "write -P 3 0 1M", "flush", "abort", fmt="qcow2")
    assert image.read_bytes()[79] & layout.DIRTY
    await amend(image, lazy_refcounts=False, compat="0.10")
    assert_clean(image)
    qemu_io(image, "read -P 3 0 1M", fmt="qcow2")


@pytest.mark.parametrize("size", ["3M", 1 << 20, "512k"])
async def test_size(tmp_path: Path, size: str | int) -> None:
    image = make(tmp_path / "disk.qcow2", backing=True, snapshots=False)
    before = content(image)
    await amend(image, size=size)
    after = content(image)
    assert len(after) == {"3M": 3 << 20, 1 << 20: 1 << 20, "512k": 512 << 10}[size]
    assert after == before.ljust(len(after), b"\0")[: len(after)]
    assert_clean(image)


async def test_growing_over_a_longer_backing_file_hides_it(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", backing=True, snapshots=False, size="576k")
    assert image.with_suffix(".base").stat().st_size > 700 * KIB
    before = content(image)
    await amend(image, size="1M")
    assert content(image) == before.ljust(1 << 20, b"\0")


async def test_several_at_once(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "cluster_size=4096,refcount_bits=32", backing=True, snapshots=False)
    before = content(image)
    await amend(image, size="2M", refcount_bits=16, compat="0.10", lazy_refcounts=False)
    assert specific(image) == {"size": 2 << 20, "compat": "0.10", "compression-type": "zlib", "refcount-bits": 16}
    assert_clean(image)
    await amend(image, size="3M", refcount_bits=8, compat="1.1", lazy_refcounts=True)
    found = specific(image)
    assert (found["size"], found["refcount-bits"], found["lazy-refcounts"]) == (3 << 20, 8, True)
    assert_clean(image)
    assert content(image) == before.ljust(3 << 20, b"\0")


@pytest.mark.parametrize(
    "options",
    ["compat=0.10", "refcount_bits=64", "refcount_bits=4", "size=2M", "lazy_refcounts=on", "size=2M,refcount_bits=8"],
)
async def test_the_same_as_qemu_img_amend(tmp_path: Path, options: str) -> None:
    image = make(tmp_path / "disk.qcow2", backing=True, snapshots="size" not in options)
    theirs = tmp_path / "theirs.qcow2"
    theirs.write_bytes(image.read_bytes())
    qemu_img("amend", "-f", "qcow2", "-o", options, theirs)
    await amend_image(DRIVERS, str(image), split_dotted(options))
    assert specific(image) == specific(theirs)
    # Not the snapshots: QEMU 7.2 zeroes what they share with the disk's zero clusters.
    assert content(image) == content(theirs)


async def test_they_amend_and_we_read(tmp_path: Path) -> None:
    # Without snapshots: QEMU 7.2 leaves COPIED flags on zero clusters that a snapshot shares, a corruption.
    image = make(tmp_path / "disk.qcow2", backing=True, snapshots=False)
    before = content(image)
    for options in ("refcount_bits=64", "refcount_bits=4", "refcount_bits=16", "compat=0.10", "compat=1.1"):
        qemu_img("amend", "-f", "qcow2", "-o", options, image)
        async with opened(image) as disk:
            assert bytes(await disk.read(0, disk.length)) == before
            await disk.write(700 * KIB, before[700 * KIB : 710 * KIB])
        assert_clean(image)


async def test_a_node_in_use_goes_on(tmp_path: Path) -> None:
    """Reads and writes between amends of one open node."""
    image = make(tmp_path / "disk.qcow2", backing=True)
    expected = bytearray(content(image))
    async with opened(image) as disk:
        for number, text in enumerate(
            ("refcount_bits=64", "lazy_refcounts=on", "size=1M", "refcount_bits=16", "compat=0.10")
        ):
            await amend_node(disk.node, split_dotted(text))
            data = bytes([number + 65]) * 9 * KIB
            expected[number * 70 * KIB : number * 70 * KIB + len(data)] = data
            await disk.write(number * 70 * KIB, data)
            assert bytes(await disk.read(0, disk.length)) == expected
    assert content(image) == expected
    assert_clean(image)


async def _try_width(image: Path, width: int) -> None:
    """Change the width, where that can count what there is; QEMU has the same opinion."""
    copy = image.with_suffix(".copy")
    before = image.read_bytes()
    copy.write_bytes(before)
    refusal = ""
    try:
        await amend(image, refcount_bits=width)
    except ImageError as exc:
        refusal = str(exc)
    if refusal:
        assert "references to the cluster" in refusal
        assert image.read_bytes() == before
        with pytest.raises(ToolError, match="Cannot decrease refcount entry width"):
            qemu_img("amend", "-f", "qcow2", "-o", f"refcount_bits={width}", copy)
    else:
        qemu_img("amend", "-f", "qcow2", "-o", f"refcount_bits={width}", copy)
        assert specific(image) == specific(copy)


@pytest.mark.parametrize("seed", thinned(range(6)))
async def test_random_sequences(tmp_path: Path, seed: int) -> None:
    """Amends, writes by us and by QEMU, and snapshots, in any order."""
    rng = random.Random(seed)
    unit = rng.choice((512, 4096, 65536))
    image = make(tmp_path / "disk.qcow2", f"cluster_size={unit}", backing=bool(seed % 2), snapshots=False)
    frozen: dict[str, bytes] = {}
    for step in range(14):
        version = 2 if specific(image)["compat"] == "0.10" else 3
        before = content(image)
        match rng.choice(("compat", "refcount_bits", "refcount_bits", "lazy", "write", "theirs", "snapshot")):
            case "compat" if version == 2:
                await amend(image, compat="1.1")
            case "compat":
                await amend(image, compat="0.10", refcount_bits=16)
            case "refcount_bits" if version == 3:
                await _try_width(image, rng.choice(WIDTHS))
            case "lazy" if version == 3:
                await amend(image, lazy_refcounts=rng.random() < 0.5)
            case "write":
                offset, length = rng.randrange(900) * KIB, rng.randrange(1, 100) * KIB
                changed = bytearray(before)
                async with opened(image) as disk:
                    if rng.random() < 0.5:
                        changed[offset : offset + length] = bytes(length)
                        await disk.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
                    else:
                        changed[offset : offset + length] = bytes([step + 1]) * length
                        await disk.write(offset, bytes([step + 1]) * length)
                before = bytes(changed)
            case "theirs" if version == 3:
                offset = rng.randrange(200) * 4
                qemu_io(image, f"write -z {offset}k 64k", f"write -P 77 {offset + 96}k 4k", fmt="qcow2")
                before = content(image)
            case "snapshot" if specific(image)["refcount-bits"] >= 8 and len(frozen) < 3:
                qemu_img("snapshot", "-c", f"s{step}", image)
                frozen[f"s{step}"] = before
        assert_clean(image)
        assert contents(image) == {"": before} | frozen


# --- version 2 and its snapshots ------------------------------------------------------------------------


def _short_snapshot_table(image: Path) -> None:
    """Take the extra data, which version 2 can do without, out of the only snapshot's entry."""
    data = bytearray(image.read_bytes())
    offset = struct.unpack_from(">Q", data, 64)[0]
    extra, identity, name = (
        struct.unpack_from(">I", data, offset + 36)[0],
        *struct.unpack_from(">HH", data, offset + 12),
    )
    end = offset + 40 + extra + identity + name
    tail = bytes(data[offset + 40 + extra : end])
    struct.pack_into(">I", data, offset + 36, 0)
    data[offset + 40 : end] = tail.ljust(end - offset - 40, b"\0")
    image.write_bytes(data)


async def test_upgrading_completes_the_snapshot_table(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "cluster_size=4096,compat=0.10", snapshots=False)
    qemu_img("snapshot", "-c", "old", image)
    _short_snapshot_table(image)
    before = contents(image)
    await amend(image, compat="1.1")
    assert_clean(image)  # qemu-img counts an incomplete entry of version 3 as a corruption
    assert contents(image) == before
    await amend(image, size="2M")
    assert content(image, "old") == before["old"].ljust(2 << 20, b"\0")


async def test_what_is_so_already_changes_nothing(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", backing=True)
    before = image.read_bytes()
    info = json.loads(qemu_img("info", "--output=json", image))
    await amend(
        image,
        compat="1.1",
        size="1M",
        refcount_bits=16,
        lazy_refcounts=False,
        backing_file=info["backing-filename"],
        backing_fmt="raw",
    )
    assert image.read_bytes() == before


async def test_raw_images_have_nothing_to_change(tmp_path: Path) -> None:
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(4096))
    with pytest.raises(NotSupportedError, match="raw images have no settings"):
        await amend_image(DRIVERS, str(image), {"size": "1M"}, format="raw")


async def test_progress_goes_up_to_the_end(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", backing=True)
    seen: list[tuple[int, int]] = []
    options = {"refcount_bits": 32, "lazy_refcounts": True}
    await amend_image(DRIVERS, str(image), options, progress=lambda done, total: seen.append((done, total)))
    await amend_image(
        DRIVERS,
        str(image),
        {"refcount_bits": 16, "compat": "0.10"},
        progress=lambda done, total: seen.append((done, total)),
    )
    shares = [done / total for done, total in seen]
    middle = shares.index(1.0)
    assert shares[: middle + 1] == sorted(shares[: middle + 1])
    assert shares[middle + 1 :] == sorted(shares[middle + 1 :])
    assert shares[-1] == 1.0
    assert len(shares) > 6

"""Small real images to damage: one set of qcow2's features each, made by QEMU's tools, and one of each other format."""

from __future__ import annotations

import dataclasses
import json
import signal
import struct
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

from fusedisk.block.graph.graph import Graph
from tests.conftest import qemu_img, require_tool
from tests.support.images import KIB, MIB, make_qcow2, make_sparse_raw
from tests.support.profiles import PROFILES, QCOW2, FormatProfile

SECRET = "secret,id=key,data=secret"
"""QEMU's object with the passphrase of encrypted images."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """An image that is whole, and what else it takes to read it."""

    path: Path
    content: bytes
    data_file: Path | None = None
    key: str | None = None
    """``luks`` or ``aes`` where it is encrypted."""
    backed: bool = False
    """What is unallocated is read from a backing file."""
    profile: FormatProfile = QCOW2

    def qemu_name(self, path: Path, *, backing: bool = False) -> str:
        """A copy's name for qemu-img. Files that the image refers to are given, so that damaged names do not matter;
        without ``backing`` there is none."""
        options: dict[str, Any] = {"driver": "qcow2", "file": {"driver": "file", "filename": str(path)}}
        if not backing:
            options["backing"] = None
        if self.data_file is not None:
            options["data-file"] = {"driver": "file", "filename": str(self.data_file)}
        if self.key:
            options["encrypt.key-secret"] = "key"
        return f"json:{json.dumps(options)}"

    def qemu_objects(self) -> list[str]:
        """Options of qemu-img that must come with :meth:`qemu_name`."""
        return ["--object", SECRET] if self.key else []


_WRITES = ("write -P 1 0 200k", "write -P 2 700k 100k", "write -P 3 1000k 3k")
_ZEROES = ("write -z 256k 64k", "write -P 3 512k 64k", "write -z 512k 32k", "write -z -u 540k 4k")


def _sample(path: Path, data_file: Path | None = None, key: str | None = None) -> Sample:
    return Sample(path, path.read_bytes(), data_file, key)


def _plain(size: int, *commands: str, **options: Any) -> Callable[[Path], Sample]:
    """A maker of images with these writes and creation options."""

    def make(folder: Path) -> Sample:
        return _sample(make_qcow2(folder / "disk.qcow2", size, *commands, **options))

    return make


def _compressed(kind: str) -> Callable[[Path], Sample]:
    """Compressed clusters, several in one host cluster, some of them overwritten."""
    commands = [f"write -c -P {index} {index * 16}k 16k" for index in range(40)]
    return _plain(4 * MIB, *commands, "write -P 77 100k 50k", cluster_size=16 * KIB, compression_type=kind)


def _snapshots(*, size: int = 4 * MIB, names: int = 3, **options: Any) -> Callable[[Path], Sample]:
    """Snapshots that share tables and clusters; in version 3 the first ones have sizes of VM state."""

    def make(folder: Path) -> Sample:
        path = make_qcow2(folder / "disk.qcow2", size, *_WRITES, **options)
        for number in range(names):
            qemu_img("snapshot", "-c", f"snapshot {number}", path)
            _write(path, f"write -P {number} {number * 300}k 40k", "write -P 9 64k 4k")
        if options.get("compat") != "0.10":
            _set_vm_state(path, 4096 * KIB + 17)
        return _sample(path)

    return make


def _set_vm_state(path: Path, size: int) -> None:
    """Let the first snapshot have this much VM state (whose bytes are the disk's business, not the table's)."""
    content = bytearray(path.read_bytes())
    (entry,) = struct.unpack_from(">Q", content, 64)
    struct.pack_into(">I", content, entry + 32, size)
    struct.pack_into(">Q", content, entry + 40, size)
    path.write_bytes(content)


def _write(path: Path, *commands: str) -> None:
    args = [arg for command in commands for arg in ("-c", command)]
    subprocess.run([require_tool("qemu-io"), "-f", "qcow2", *args, path], check=True, capture_output=True)


def _lazy_and_dirty(folder: Path) -> Sample:
    """The process was killed in between: the refcounts of what it wrote are not in the file."""
    path = make_qcow2(folder / "disk.qcow2", 4 * MIB, "write -P 1 0 200k", cluster_size=4096, lazy_refcounts="on")
    commands = ("write -P 2 700k 100k", "flush", "write -P 3 1000k 3k", f"sigraise {signal.SIGKILL:d}")
    args = [arg for command in commands for arg in ("-c", command)]
    killed = subprocess.run([require_tool("qemu-io"), "-f", "qcow2", *args, path], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    sample = _sample(path)
    assert sample.content[79] & 1, "the image is not marked dirty"
    return sample


def _data_file(*, raw: bool) -> Callable[[Path], Sample]:
    def make(folder: Path) -> Sample:
        data = folder / "disk.data"
        options: dict[str, Any] = {"data_file": data, "data_file_raw": "on" if raw else "off", "cluster_size": 4096}
        path = make_qcow2(folder / "disk.qcow2", 2 * MIB, *_WRITES, "write -z 256k 64k", **options)
        return _sample(path, data)

    return make


def _bitmaps(folder: Path) -> Sample:
    """Three of them, one disabled, one that was in use; two with bits set."""
    path = make_qcow2(folder / "disk.qcow2", 4 * MIB, *_WRITES, cluster_size=4096)
    qemu_img("bitmap", "--add", path, "one")
    qemu_img("bitmap", "--add", "-g", "4096", path, "two")
    _write(path, "write -P 5 100k 300k", "write -P 6 3M 4k")
    qemu_img("bitmap", "--disable", path, "two")
    qemu_img("bitmap", "--add", "-g", "512", path, "three")
    return _sample(path)


def _encrypted(kind: str, refcount_bits: int = 16) -> Callable[[Path], Sample]:
    def make(folder: Path) -> Sample:
        path = folder / "disk.qcow2"
        options = f"cluster_size=4096,refcount_bits={refcount_bits},encrypt.format={kind},encrypt.key-secret=key"
        if kind == "luks":
            options += ",encrypt.iter-time=10"
        qemu_img("create", "-q", "-f", "qcow2", "--object", SECRET, "-o", options, path, "2M")
        image = f"driver=qcow2,encrypt.key-secret=key,file.driver=file,file.filename={path}"
        args = [arg for command in (*_WRITES, "write -z 256k 64k") for arg in ("-c", command)]
        command = [require_tool("qemu-io"), "--object", SECRET, "--image-opts", *args, image]
        subprocess.run(command, check=True, capture_output=True)
        return _sample(path, key=kind)

    return make


def _backed(folder: Path) -> Sample:
    below = make_sparse_raw(folder / "below.raw", 3 * MIB, (0, MIB), (2 * MIB, 64 * KIB))
    commands = (*_WRITES, "write -z 256k 64k")
    path = make_qcow2(folder / "disk.qcow2", 4 * MIB, *commands, backing=below, cluster_size=4096)
    return dataclasses.replace(_sample(path), backed=True)


FEATURE_SETS: dict[str, Callable[[Path], Sample]] = {
    "v2": _plain(4 * MIB, *_WRITES, compat="0.10", cluster_size=4096),
    "v3": _plain(4 * MIB, *_WRITES, *_ZEROES, cluster_size=4096),
    "clusters-512": _plain(MIB, *_WRITES, cluster_size=512),
    "clusters-64k": _plain(4 * MIB, *_WRITES, *_ZEROES),
    "refcounts-1": _plain(4 * MIB, *_WRITES, cluster_size=4096, refcount_bits=1),
    "refcounts-2": _snapshots(names=1, cluster_size=4096, refcount_bits=2),
    "refcounts-8": _snapshots(size=MIB, names=1, cluster_size=512, refcount_bits=8),
    "refcounts-64": _plain(4 * MIB, *_WRITES, cluster_size=4096, refcount_bits=64),
    "extended-l2": _plain(
        4 * MIB,
        *_WRITES,
        "write -z 256k 20k",
        "write -c -P 4 1M 16k",
        "discard 8k 4k",
        cluster_size=16 * KIB,
        extended_l2="on",
    ),
    "compressed-zlib": _compressed("zlib"),
    "compressed-zstd": _compressed("zstd"),
    "data-file": _data_file(raw=False),
    "data-file-raw": _data_file(raw=True),
    "lazy-refcounts": _plain(4 * MIB, *_WRITES, cluster_size=4096, lazy_refcounts="on"),
    "lazy-refcounts-dirty": _lazy_and_dirty,
    "snapshots": _snapshots(cluster_size=4096),
    "snapshots-v2": _snapshots(size=2 * MIB, compat="0.10", cluster_size=1 * KIB),
    "bitmaps": _bitmaps,
    "luks": _encrypted("luks"),
    "luks-refcounts-1": _encrypted("luks", refcount_bits=1),
    "aes": _encrypted("aes"),
    "backing": _backed,
    "preallocated": _plain(2 * MIB, "write -P 1 0 200k", cluster_size=4096, preallocation="metadata"),
}
"""Makers of samples, by the name of the set; each takes an empty folder."""


async def _of_format(profile: FormatProfile, options: dict[str, Any], folder: Path) -> Sample:
    """An image of a format with nothing but a profile, with data here and there."""
    path = folder / f"disk.{profile.name}"
    await profile.create(path, 4 * MIB, profile.block(profile.block_sizes[1]) | options)
    graph = Graph(profile.drivers)
    try:
        spec = {"driver": profile.name, "file": {"driver": "file", "filename": str(path)}}
        disk = await graph.open_backend(spec, writable=True)
        for number, (offset, length) in enumerate(((700, 100), (0, 200), (1000, 3), (2048, 64)), 1):
            await disk.write(offset * KIB, bytes([number]) * (length * KIB))
        await disk.write_zeroes(720 * KIB, 40 * KIB)
    finally:
        await graph.close()
    return Sample(path, path.read_bytes(), profile=profile)


_Making = Callable[[Path], Awaitable[Sample]]
OTHER_SETS: dict[str, _Making] = {
    f"{profile.name}-{variant}".rstrip("-"): partial(_of_format, profile, options)
    for profile in PROFILES.values()
    if profile.places is not None and profile is not QCOW2
    for variant, options in profile.variants.items()
}
"""The same for other formats: a sample of each kind of their images."""

ALL_SETS = [*FEATURE_SETS, *OTHER_SETS]


async def make_sample(name: str, folder: Path) -> Sample:
    """Make the sample of a set in an empty folder."""
    return await OTHER_SETS[name](folder) if name in OTHER_SETS else FEATURE_SETS[name](folder)

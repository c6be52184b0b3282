"""The images that the workloads run on."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scripts.benchmark.servers import KEY, ServerError, run

MIB = 1 << 20
CLUSTER = 64 << 10
"""qcow2's cluster size, in bytes."""
EMPTY = 64
"""How many times the size of the others the empty image has."""
UNDER = 2
"""How many times their size the image below the overlay has."""
DEPTH = 16
"""Images in the chain."""
FILES = 10_000
"""Files in the filesystem, of 1 to 48 KiB each."""
FILES_SIZE = 512 * MIB
"""Size of the disk with the filesystem, whatever that of the other images, in bytes."""

_CANNOT_TIME = "Unable to get accurate CPU usage"
"""qemu-img fails with this at random: it measures the derivation of keys, and may find that it took no time."""
_TRIES = 60
_SUBCLUSTERS = "extended_l2=on,cluster_size=64k"
PROGRAMS = (Path("/usr/bin"), Path("/usr/lib"))
"""Where programs and libraries are."""

FORMATS = {
    "raw": "raw",
    "qcow2": "qcow2",
    "empty": "qcow2",
    "subclusters": "qcow2",
    "empty-subclusters": "qcow2",
    "overlay": "qcow2",
    "luks": "qcow2",
    "compressed": "qcow2",
    "ext4": "qcow2",
    "chain": "qcow2",
}
"""What is served, and the driver that opens it.

``empty``: nothing is allocated, at the start of each run; so large that hardly a cluster is written to twice.
``subclusters`` and ``empty-subclusters``: the same with extended L2 entries. ``overlay``: empty at the start of each
run, over an image that holds everything. ``luks``: encrypted; the key lies beside the image.
``compressed``: this machine's programs and libraries, zlib in clusters of 64 KiB. ``ext4``: a filesystem with ten
thousand files. ``chain``: the lowest of DEPTH images holds everything, each other one a sixteenth of it again, cluster
by cluster in turns.
"""


@dataclass(frozen=True)
class Image:
    """An image file and what it stands on."""

    path: Path
    fmt: str
    """The driver that opens it."""
    backing: Image | None = None
    empty_size: int = 0
    """Bytes of a disk that each run finds empty; 0 for all others."""
    options: tuple[str, ...] = ()
    """How to create it for each run."""

    @property
    def bottom(self) -> Image:
        """The lowest image of the chain; itself where it stands on nothing."""
        return self if self.backing is None else self.backing.bottom

    @property
    def depth(self) -> int:
        """How many images there are from here down."""
        return 1 if self.backing is None else 1 + self.backing.depth


def make_images(folder: Path, size: int, formats: tuple[str, ...]) -> dict[str, Image]:
    """Write one fully allocated image of *size* bytes for each of *formats*, keys of FORMATS; the empty one is made by
    :func:`settle`.

    Raw, qcow2 and the chain hold the same random content.
    """
    images = {}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        scratch = Path(name)
        raw = (folder if "raw" in formats else scratch) / "image.raw"
        if {"raw", "qcow2", "subclusters", "luks", "chain"} & set(formats):
            _write(raw, size)
        for fmt in formats:
            image = Image(folder / f"image.{fmt}", FORMATS[fmt])
            if fmt == "qcow2":
                _convert(raw, image.path)
            elif fmt == "subclusters":
                _convert(raw, image.path, "-o", _SUBCLUSTERS)
            elif fmt == "luks":
                _encrypt(raw, image.path)
            elif fmt == "empty":
                image = Image(image.path, image.fmt, empty_size=size * EMPTY)
            elif fmt == "empty-subclusters":
                image = Image(image.path, image.fmt, empty_size=size * EMPTY, options=("-o", _SUBCLUSTERS))
            elif fmt == "overlay":
                base = Image(folder / "base.qcow2", "qcow2")
                _write(scratch / "base.raw", size * UNDER)
                _convert(scratch / "base.raw", base.path)
                options = ("-b", base.path.name, "-F", "qcow2")
                image = Image(image.path, image.fmt, base, empty_size=size * UNDER, options=options)
            elif fmt == "compressed":
                content = scratch / "programs.raw"
                _write_programs(content, size)
                _convert(content, image.path, "-c")
            elif fmt == "ext4":
                _convert(_filesystem(scratch), image.path)
            elif fmt == "chain":
                image = _chain(folder, raw, scratch)
            images[fmt] = image
    return images


def settle(image: Image) -> None:
    """Write dirty pages of *image* and all below it to disk and read them: runs start with a clean, warm page cache,
    and with a new image where it shall be empty."""
    if image.empty_size:
        run(["qemu-img", "create", "-q", "-f", image.fmt, *image.options, str(image.path), str(image.empty_size)])
    buffer = bytearray(MIB)
    with image.path.open("rb", buffering=0) as file:
        os.fsync(file.fileno())
        while file.readinto(buffer):
            pass
    if image.backing is not None:
        settle(image.backing)


def _write(path: Path, size: int) -> None:
    source = random.Random(size)
    with path.open("wb") as file:
        for _ in range(size // MIB):
            file.write(source.randbytes(MIB))


def _write_programs(path: Path, size: int) -> None:
    """What disks of machines are full of, over and over if there is not enough: the content decides how fast it
    inflates."""
    written = 0
    with path.open("wb") as file:
        while written < size:
            before = written
            for program in _programs():
                written += file.write(program.read_bytes()[: size - written])
                if written == size:
                    return
            if written == before:
                raise ServerError(f"{' and '.join(map(str, PROGRAMS))} hold no programs to fill an image with")


def _programs() -> Iterator[Path]:
    for folder in PROGRAMS:
        for parent, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                path = Path(parent, name)
                if path.is_file() and not path.is_symlink():
                    with path.open("rb") as file:
                        program = file.read(4) == b"\x7fELF"
                    if program:
                        yield path


def _convert(raw: Path, image: Path, *options: str) -> None:
    run(["qemu-img", "convert", *options, "-f", "raw", "-O", "qcow2", str(raw), str(image)], timeout=600)


def _encrypt(raw: Path, image: Path) -> None:
    key = image.with_name(image.name + KEY)
    key.write_text("a passphrase")
    secret = ["--object", f"secret,id=key,file={key}"]
    layout = ["-o", "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10"]
    source = f"driver=raw,file.filename={raw}"
    create = ["qemu-img", "create", "-q", *secret, "-f", "qcow2", *layout, str(image), str(raw.stat().st_size)]
    for more_tries in reversed(range(_TRIES)):
        try:
            run(create)
            break
        except ServerError as exc:
            if _CANNOT_TIME not in str(exc) or not more_tries:
                raise
    target = f"driver=qcow2,file.filename={image},encrypt.key-secret=key"
    run(["qemu-img", "convert", *secret, "-n", "--image-opts", "--target-image-opts", source, target], timeout=600)


def _chain(folder: Path, raw: Path, scratch: Path) -> Image:
    """The chain's top. A layer is converted from its own clusters with holes between them, then put on its place."""
    image = Image(folder / "chain-0.qcow2", "qcow2")
    _convert(raw, image.path)
    part = scratch / "part.raw"
    for layer in range(1, DEPTH):
        with raw.open("rb") as source, part.open("wb") as target:
            size = os.fstat(source.fileno()).st_size
            target.truncate(size)
            for offset in range(layer * CLUSTER, size, DEPTH * CLUSTER):
                os.pwrite(target.fileno(), os.pread(source.fileno(), CLUSTER, offset), offset)
        above = Image(folder / f"chain-{layer}.qcow2", "qcow2", image)
        _convert(part, above.path)
        run(["qemu-img", "rebase", "-u", "-f", "qcow2", "-b", image.path.name, "-F", "qcow2", str(above.path)])
        image = above
    return image


def _filesystem(scratch: Path) -> Path:
    """A raw disk with ext4 on it and FILES files in a hundred directories, made without mounting it."""
    source = random.Random(FILES)
    tree = scratch / "tree"
    for number in range(FILES):
        path = tree / f"{number % 100:02}" / f"{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(source.randbytes(source.randrange(1 << 10, 48 << 10)))
    disk = scratch / "ext4.raw"
    with disk.open("wb") as file:
        file.truncate(FILES_SIZE)
    run(["mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0", "-d", str(tree), str(disk)], timeout=600)
    return disk

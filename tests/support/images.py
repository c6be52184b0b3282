"""Images made by qemu-img and qemu-io, simple ones and random ones."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.conftest import qemu_img, qemu_io

KIB = 1 << 10
MIB = 1 << 20


def with_format(*args: str | os.PathLike[str]) -> list[str | os.PathLike[str]]:
    """Arguments of a command that opens images, with their format where that is raw and not given: a guess is told."""
    images = [arg for arg in args if isinstance(arg, Path) and arg.is_file()]
    guessed = images and not any(_begins_as_qcow2(image) for image in images)
    return ["--format", "raw", *args] if guessed and not {"-f", "--format"}.intersection(args) else list(args)


def _begins_as_qcow2(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"QFI\xfb"


def make_sparse_raw(path: Path, size: int, *data: tuple[int, int]) -> Path:
    """A raw file with bytes at ``(offset, length)`` places and holes elsewhere."""
    with path.open("wb") as file:
        file.truncate(size)
        for offset, length in data:
            file.seek(offset)
            file.write(b"\xa5" * length)
    return path


def make_qcow2(path: Path, size: int | None, *commands: str, backing: Path | None = None, **options: object) -> Path:
    """A qcow2 image with creation options by name, its backing file named from it; ``commands`` are qemu-io's."""
    args = ["create", "-q", "-f", "qcow2"]
    if backing is not None:
        format = "qcow2" if backing.suffix == ".qcow2" else "raw"
        args += ["-b", os.path.relpath(backing, path.parent), "-F", format]
    if options:
        args += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    qemu_img(*args, path, *([str(size)] if size is not None else []))
    if commands:
        qemu_io(path, *commands, fmt="qcow2", options="-d unmap")
    return path


def make_overlay(folder: Path) -> Path:
    """A qcow2 image of 4 MiB, ``disk.qcow2``, over a shorter one, ``base.qcow2``; nines at 1 MiB."""
    base = make_qcow2(folder / "base.qcow2", 2 * MIB, "write -P 9 1M 64k")
    return make_qcow2(folder / "disk.qcow2", 4 * MIB, backing=base)


def random_commands(random_: random.Random, size: int, cluster: int, count: int, *, compressed: int = 0) -> list[str]:
    """qemu-io commands: first ``compressed`` clusters, which must be new, then writes, zeroes and discards anywhere."""
    clusters = random_.sample(range(size // cluster), min(compressed, size // cluster))
    commands = [f"write -c -P 3 {index * cluster} {cluster}" for index in clusters]
    for _ in range(count):
        kind = random_.choice(["write -P 7", "write -P 9", "write -z", "write -z -u", "discard"])
        offset = random_.randrange(size // 512) * 512
        if random_.random() < 0.5:
            offset = offset // cluster * cluster
        length = min(
            size - offset, random_.choice([512, 4096, cluster, cluster * 3, random_.randrange(1, 9 * cluster)])
        )
        commands.append(f"{kind} {offset} {max(512, length // 512 * 512)}")
    return commands


def random_chain(folder: Path, seed: int) -> Path:
    """A chain of one to five images of unequal lengths, cluster sizes and versions; returns its top."""
    random_ = random.Random(seed)
    depth = random_.randrange(1, 6)
    below: Path | None = None
    if random_.random() < 0.4:
        size = random_.randrange(1, 2 * MIB // 512) * 512
        places = [(random_.randrange(size), random_.randrange(1, 40_000)) for _ in range(6)]
        below = make_sparse_raw(folder / "base.raw", size, *((at, min(n, size - at)) for at, n in places))
    for layer in range(depth):
        cluster = random_.choice([512, 4096, 16 * KIB, 64 * KIB, 256 * KIB])
        size = random_.randrange(cluster // 512, 3 * MIB // 512) * 512
        compat = random_.choice(["0.10", "1.1"])
        options: dict[str, object] = {"cluster_size": cluster, "compat": compat}
        if below is None and random_.random() < 0.3:
            options["preallocation"] = random_.choice(["metadata", "falloc"])
        compressed = 0 if "preallocation" in options else random_.choice([0, 0, 3])
        commands = random_commands(random_, size, cluster, random_.randrange(12), compressed=compressed)
        below = make_qcow2(folder / f"layer{layer}.qcow2", size, *commands, backing=below, **options)
    assert below is not None
    return below

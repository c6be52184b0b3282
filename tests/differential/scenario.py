"""What a seed stands for: a format, a chain of images, and how it is opened."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from pathlib import Path
from typing import Any

from fusedisk.drivers.format.qcow2.layout import MIN_EXTENDED_L2_CLUSTER
from tests.conftest import qemu_img, qemu_io
from tests.support.profiles import QCOW2, FormatProfile, QemuJudge

KIB, MIB = 1 << 10, 1 << 20
CLUSTER_SIZES = tuple(512 << shift for shift in range(13))
VERSIONS = ("0.10", "1.1")
DEPTHS = tuple(range(1, 9))
SYSTEMATIC = 10_000
ENCRYPTED = 20_000
"""From here on seeds stand for the same as those below ``SYSTEMATIC``, but always with encryption."""
COMBINATIONS = len(CLUSTER_SIZES) * len(VERSIONS) * len(DEPTHS)

Window = tuple[int, int]
"""Offset and length of a part of the disk that is worked on."""


@dataclasses.dataclass(frozen=True)
class Scenario:
    """The active image and what lies below it."""

    seed: int
    profile: FormatProfile
    cluster_size: int
    version: str
    depth: int
    """Images in the chain, the active one included."""
    size: int
    windows: tuple[Window, ...]

    @classmethod
    def of(cls, seed: int, profile: FormatProfile | None = None) -> Scenario:
        """The scenario of a seed, for qcow2 unless another profile is given."""
        return cls._of_qcow2(seed) if profile in (None, QCOW2) else cls._of_other(seed, profile)

    @classmethod
    def _of_other(cls, seed: int, profile: FormatProfile) -> Scenario:
        rng = random.Random(f"scenario {profile.name} {seed}")
        depth = rng.choice((1, 2)) if "backing" in profile.can else 1
        cluster_size = rng.choice(profile.block_sizes)
        size = rng.randrange(128 * KIB, max(2 * MIB, 8 * cluster_size)) // 512 * 512
        return cls(seed, profile, cluster_size, "", depth, size, ((0, size),))

    @classmethod
    def _of_qcow2(cls, seed: int) -> Scenario:
        """From ``SYSTEMATIC`` on they go through all cluster sizes, versions and depths."""
        rng = random.Random(f"scenario {seed}")
        depth: int
        cluster_size, version, depth = (
            rng.choice(CLUSTER_SIZES),
            rng.choice(VERSIONS),
            rng.choice((1, 1, 2, 2, *DEPTHS)),
        )
        if SYSTEMATIC <= seed < ENCRYPTED:
            number, depth_index = divmod(seed - SYSTEMATIC, len(DEPTHS))
            number, version_index = divmod(number, len(VERSIONS))
            cluster_size = CLUSTER_SIZES[number % len(CLUSTER_SIZES)]
            version, depth = VERSIONS[version_index], DEPTHS[depth_index]
        size, windows = _layout(rng, cluster_size)
        return cls(seed, QCOW2, cluster_size, version, depth, size, windows)

    @property
    def batches(self) -> int:
        """How long the run is: where every combination has its turn, eight hundred requests and more."""
        if self.profile is QCOW2 and SYSTEMATIC <= self.seed < ENCRYPTED:
            return 500 if self.cluster_size < 64 * KIB else 200  # large ones take several times as long
        return 60

    @property
    def data_file(self) -> bool:
        """Whether the active image has its data in a file of its own: no snapshots then, and nothing compressed."""
        return self.version == "1.1" and random.Random(f"data file {self.seed}").random() < 0.15

    @property
    def encryption(self) -> tuple[str | None, ...]:
        """``luks``, ``aes`` or None for each image of the chain that can be encrypted, the base first."""
        rng = random.Random(f"encryption {self.seed}")
        if "encryption" not in self.profile.can:
            return (None,) * self.depth
        if rng.random() >= 0.12 and self.seed < ENCRYPTED:
            return (None,) * self.depth
        found: list[str | None] = [rng.choice(("luks", "luks", "aes")) for _ in range(self.depth)]
        for level in range(self.depth - 1):
            if rng.random() < 0.6:
                found[level] = None
        if any(found[:-1]) and rng.random() < 0.3:
            found[-1] = None
        return tuple(found)

    @property
    def compresses(self) -> bool:
        """Whether we can write compressed clusters."""
        return "compressed" in self.profile.can and not self.data_file and self.encryption[-1] is None

    def __str__(self) -> str:
        return (
            f"{self.profile.name}, seed {self.seed}: clusters of {self.cluster_size}, version {self.version}, "
            f"depth {self.depth}, {self.size} bytes, windows {self.windows}, encryption {self.encryption}"
        )


def _layout(rng: random.Random, cluster_size: int) -> tuple[int, tuple[Window, ...]]:
    """Size of the disk and its windows: all of a small disk, or the borders of L2 tables of a large one."""
    # With extended L2 entries a table has half as many: these are borders then too, and there are others.
    span = cluster_size * cluster_size // 8
    if cluster_size < 16 * KIB or rng.random() < 0.6:
        low, high = (128 * KIB, 2 * MIB) if cluster_size < 128 * KIB else (2 * MIB, 12 * MIB)
        size = rng.randrange(low, high) // 512 * 512
        return size, ((0, size),)
    borders = sorted({0, span, span * rng.randrange(2, 6)})
    size = (borders[-1] + rng.randrange(512 * KIB, 2 * MIB)) // 512 * 512
    half = min(max(4 * cluster_size, 512 * KIB), span) // 2
    return size, tuple((max(0, at - half), min(at + half, size) - max(0, at - half)) for at in borders)


@dataclasses.dataclass
class Chain:
    """The files of a scenario, the base first."""

    profile: FormatProfile
    key: Path
    """The file with the passphrase of all that is encrypted."""
    files: list[Path] = dataclasses.field(default_factory=list)
    formats: list[str] = dataclasses.field(default_factory=list)
    encrypted: list[bool] = dataclasses.field(default_factory=list)

    def add(self, path: Path, fmt: str, *, encrypted: bool = False) -> None:
        """Put an image on top."""
        self.files.append(path)
        self.formats.append(fmt)
        self.encrypted.append(encrypted)

    def read(self, windows: tuple[Window, ...], scratch: Path, copy: Path | None = None) -> tuple[list[bytes], int]:
        """Return what the judge reads in the active image, or in a copy of it, and the length of the disk."""
        if self.profile is not QCOW2:
            return self.profile.judge.read(copy or self.top, list(windows), scratch)
        found = []
        for offset, count in windows:
            window = {"driver": "raw", "offset": offset, "size": count, "file": self.theirs(copy)}
            qemu_img("convert", *SECRET, "-O", "raw", f"json:{json.dumps(window)}", scratch)
            found.append(scratch.read_bytes().ljust(count, b"\0"))
            scratch.unlink()
        information = json.loads(qemu_img("info", "--output=json", "-f", "qcow2", copy or self.top))
        return found, information["virtual-size"]

    def check(self, copy: Path | None = None) -> dict[str, int]:
        """Return what the judge finds wrong with the active image, or with a copy of it; kinds without fault are left
        out."""
        if self.profile is not QCOW2:
            verdict = self.profile.judge.check(copy or self.top)
            report = {"corruptions": verdict.corruptions, "leaks": verdict.leaks}
        else:
            report = json.loads(qemu_img("check", "--output=json", *SECRET, self.name(copy), check=False))
        return {key: report[key] for key in ("corruptions", "leaks", "check-errors") if report.get(key)}

    @property
    def top(self) -> Path:
        """The active image."""
        return self.files[-1]

    def theirs(self, path: Path | None = None) -> dict[str, Any]:
        """QEMU's options for the active image, or for a copy of it."""
        return self._options(path or self.top, len(self.files) - 1, {"encrypt.key-secret": "key"})

    def ours(self) -> dict[str, Any]:
        """fusedisk's options for the active image."""
        return self._options(self.top, len(self.files) - 1, {"encrypt.key-file": str(self.key)})

    def _options(self, path: Path, level: int, key: dict[str, Any]) -> dict[str, Any]:
        options: dict[str, Any] = {
            "driver": self.formats[level],
            "file": {"driver": "file", "filename": str(path)},
        }
        if self.encrypted[level]:
            options |= key
        if any(self.encrypted[:level]):
            # What the header says does not lead to the keys.
            options["backing"] = self._options(self.files[level - 1], level - 1, key)
        return options

    def name(self, path: Path | None = None) -> str:
        """For QEMU's tools, together with :data:`SECRET`: the active image, or a copy of it."""
        return f"json:{json.dumps(self.theirs(path))}"

    def fingerprints(self) -> list[tuple[int, int]]:
        """Of everything below the active image, which nobody may change: lengths and times of the last write."""
        return [(found.st_size, found.st_mtime_ns) for found in map(os.stat, self.files[:-1])]


SECRET = ("--object", "secret,id=key,data=secret")
"""What QEMU's tools need to open an image of a chain."""


async def build(scenario: Scenario, directory: Path) -> Chain:
    """Make the chain: that of qcow2 with QEMU's tools."""
    rng = random.Random(f"chain {scenario.seed}")
    chain = Chain(scenario.profile, directory / "key")
    if scenario.profile is not QCOW2:
        await _build_other(scenario, chain, directory, rng)
        return chain
    chain.key.write_text("secret")
    for level in range(scenario.depth):
        top = level == scenario.depth - 1
        if level == 0 and not top:
            _add_base(scenario, chain, directory, rng)
        else:
            _add_overlay(scenario, chain, directory, rng, top=top)
    return chain


async def _build_other(scenario: Scenario, chain: Chain, directory: Path, rng: random.Random) -> None:
    """An image, perhaps over a raw file; where QEMU's tools know the format, they write to it first."""
    profile = scenario.profile
    if scenario.depth > 1:
        chain.add(_raw(scenario, directory, rng, _length(scenario, rng) + rng.randrange(512)), "raw")
    path = directory / f"disk.{profile.name}"
    options = profile.block(scenario.cluster_size) | rng.choice([*profile.variants.values()])
    await profile.create(path, scenario.size, options, (chain.files[0], "raw") if chain.files else None)
    chain.add(path, profile.name)
    if isinstance(profile.judge, QemuJudge):
        commands = qemu_commands(rng, _windows(scenario, scenario.size), scenario.cluster_size, count=8)
        qemu_io(path, *commands, fmt=profile.name, options="-d unmap")


def _raw(scenario: Scenario, directory: Path, rng: random.Random, length: int) -> Path:
    """A raw file with data here and there."""
    raw = directory / "base.raw"
    with raw.open("wb") as file:
        file.truncate(length)
        for offset, count in _windows(scenario, length):
            for _ in range(4):
                start = offset + rng.randrange(count)
                file.seek(start)
                # Compressible, and no two blocks the same.
                part = rng.randbytes(8 * KIB) + bytes(4 * KIB)
                file.write((part * (count // len(part) + 1))[: min(count // 3 + 1, offset + count - start)])
        file.truncate(length)
    return raw


def _length(scenario: Scenario, rng: random.Random) -> int:
    """Of a lower layer: shorter than the disk, longer, or the same."""
    factor = rng.choice((1.0, rng.uniform(0.3, 1.0), rng.uniform(1.0, 1.6)))
    return max(int(scenario.size * factor) // 512 * 512, 512)


def _windows(scenario: Scenario, length: int) -> list[Window]:
    """The windows as far as an image of ``length`` bytes has them; what is behind the disk's end is the last one's."""
    found = []
    for offset, count in scenario.windows:
        end = length if offset + count == scenario.size else min(offset + count, length)
        if end > offset:
            found.append((offset, min(end - offset, 2 * count)))
    return found


def _add_base(scenario: Scenario, chain: Chain, directory: Path, rng: random.Random) -> None:
    kind = rng.choice(("raw", "raw-odd", "compressed", "qcow2", "snapshots"))
    length = _length(scenario, rng)
    if kind in ("qcow2", "snapshots"):
        _add_overlay(scenario, chain, directory, rng, top=False)
        return
    length += rng.randrange(1, 512) if kind == "raw-odd" else 0
    raw = _raw(scenario, directory, rng, length)
    if kind != "compressed":
        chain.add(raw, "raw")
        return
    path = directory / "base.qcow2"
    version = rng.choice(VERSIONS)
    options = f"compat={version},cluster_size={_cluster_size(scenario, rng)}"
    if version == "1.1":
        options += f",compression_type={rng.choice(('zlib', 'zstd'))}"
    qemu_img("convert", "-q", "-c", "-O", "qcow2", "-o", options, raw, path)
    raw.unlink()
    chain.add(path, "qcow2")


def _cluster_size(scenario: Scenario, rng: random.Random) -> int:
    """Of a lower layer: its own, but not so small that the L1 table of a large disk gets too long."""
    return rng.choice([size for size in CLUSTER_SIZES if size >= min(scenario.cluster_size, 64 * KIB) // 8])


def _add_overlay(scenario: Scenario, chain: Chain, directory: Path, rng: random.Random, *, top: bool) -> None:
    path = directory / f"layer{len(chain.files)}.qcow2"
    version = scenario.version if top else rng.choice(VERSIONS)
    cluster_size = scenario.cluster_size if top else _cluster_size(scenario, rng)
    length = scenario.size if top else _length(scenario, rng)
    options = [f"compat={version}", f"cluster_size={cluster_size}"]
    if version == "1.1" and rng.random() < 0.3:
        options.append(f"refcount_bits={rng.choice((8, 32, 64))}")
    if version == "1.1" and rng.random() < 0.2:
        options.append("compression_type=zstd")
    if version == "1.1" and rng.random() < 0.2:
        options.append("lazy_refcounts=on")
    external = top and scenario.data_file
    if external:
        raw = not chain.files and rng.random() < 0.5
        options.append(f"data_file={directory / 'data'},data_file_raw={'on' if raw else 'off'}")
    if version == "1.1" and cluster_size >= MIN_EXTENDED_L2_CLUSTER and rng.random() < 0.5:
        options.append("extended_l2=on")
    preallocated = not chain.files and rng.random() < 0.2 and scenario.windows == ((0, scenario.size),)
    if preallocated:
        options.append(f"preallocation={rng.choice(('metadata', 'falloc', 'full'))}")
    encryption = scenario.encryption[len(chain.files)]
    if encryption:
        options += _encryption_options(scenario, encryption, len(chain.files))
    args: list[str | os.PathLike[str]] = ["create", "-q", *SECRET, "-f", "qcow2", "-o", ",".join(options)]
    if chain.files:
        args += ["-b", chain.files[-1].name, "-F", chain.formats[-1]]
    qemu_img(*args, path, str(length))
    chain.add(path, "qcow2", encrypted=bool(encryption))
    for number in range(rng.choice((1, 1, 2, 3))):
        commands = qemu_commands(rng, _windows(scenario, length), cluster_size, count=rng.randrange(2, 14))
        if not preallocated and not external:
            commands = _compressed(rng, _windows(scenario, length), cluster_size) + commands if not number else commands
        qemu_io(chain.name(), *commands, options=" ".join(("-d unmap", *SECRET)))
        if rng.random() < 0.3 and not external:
            qemu_img("snapshot", "-q", *SECRET, "-c", f"s{number}", chain.name())


def _encryption_options(scenario: Scenario, kind: str, level: int) -> list[str]:
    options = {"format": kind, "key-secret": "key"}
    if kind == "luks":
        ciphers: tuple[dict[str, str], ...] = (
            {},
            {"cipher-alg": "aes-128"},
            {"cipher-mode": "cbc", "ivgen-alg": "essiv", "ivgen-hash-alg": "sha256"},
            {"cipher-mode": "cbc", "ivgen-alg": "plain"},
        )
        options["iter-time"] = "10"
        options |= random.Random(f"cipher {scenario.seed} {level}").choice(ciphers)
    return [f"encrypt.{key}={value}" for key, value in options.items()]


def qemu_commands(rng: random.Random, windows: list[Window], cluster_size: int, *, count: int) -> list[str]:
    """Commands for qemu-io that change content or mapping."""
    commands = []
    for _ in range(count):
        offset, length = random_range(rng, windows, cluster_size)
        offset, end = offset // 512 * 512, -(-(offset + length) // 512) * 512
        kind = rng.choice(("write -P {}", "write -P {}", "write -P {}", "write -z", "write -z -u", "discard"))
        commands.append(f"{kind.format(rng.randrange(1, 256))} {offset} {end - offset}")
    return [_inside(command, windows) for command in commands]


def _inside(command: str, windows: list[Window]) -> str:
    """Cut a command that was widened to sectors back to the disk's end."""
    *words, offset, length = command.split()
    end = max(start + count for start, count in windows)
    return " ".join((*words, offset, str(max(min(int(length), end // 512 * 512 - int(offset)), 0))))


def _compressed(rng: random.Random, windows: list[Window], cluster_size: int) -> list[str]:
    """Commands that write whole compressed clusters, each once."""
    clusters = {(offset + rng.randrange(count)) // cluster_size for offset, count in windows for _ in range(3)}
    end = max(start + count for start, count in windows)
    return [
        f"write -c -P {rng.randrange(1, 256)} {cluster * cluster_size} {cluster_size}"
        for cluster in sorted(clusters)
        if (cluster + 1) * cluster_size <= end
    ]


def random_range(rng: random.Random, windows: list[Window] | tuple[Window, ...], unit: int) -> Window:
    """A range inside a window: of all lengths, mostly short, often starting or ending at a border of ``unit``."""
    offset, count = rng.choice(windows)
    length = rng.choice(
        (1, 511, 512, unit // 2, unit, unit + 1, rng.randrange(1, 3 * unit), rng.randrange(1, 8 * unit))
    )
    length = min(max(length, 1), count, 3 * MIB)
    start = rng.randrange(count - length + 1)
    if rng.random() < 0.4:
        start = max(0, (offset + start) // unit * unit - offset)
    if rng.random() < 0.1:
        start = count - length
    return offset + start, length


def open_options(scenario: Scenario, chain: Chain, rng: random.Random) -> dict[str, Any]:
    """Options to open the chain with fusedisk, each time others."""
    ours = chain.ours()
    options: dict[str, Any] = {
        **ours,
        "file": {"driver": "jitter", "seed": scenario.seed, "file": ours["file"]},
        "discard": rng.choice(("unmap", "unmap", "unmap", "ignore")),
        "detect-zeroes": rng.choice(("off", "off", "on", "unmap")),
        "copy-on-read": rng.random() < 0.2,
        "cache": {"no-flush": rng.random() < 0.9},
    }
    if scenario.profile is not QCOW2:
        return options | scenario.profile.open_options(rng)
    options |= {
        "overlap-check": rng.choice(("constant", "cached", "cached", "all")),
        "pass-discard-other": rng.random() < 0.3,
        "discard-no-unref": scenario.version == "1.1" and rng.random() < 0.2,
    }
    if rng.random() < 0.4:
        # The fewest tables that the driver can do with.
        options |= {"l2-cache-size": 0, "refcount-cache-size": 0}
    return options

"""Damaged images of every feature set: ``fusedisk check`` finds what ``qemu-img check`` does, and repairs lose nothing.

``scripts/mutate`` does the same for longer.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import qemu_io
from tests.mutation.guest import Guest
from tests.mutation.images import ALL_SETS, FEATURE_SETS, OTHER_SETS
from tests.mutation.judge import Verdict
from tests.mutation.runs import MEMORY, run
from tests.support.thinning import thinned

# Each found a fault once: (set, seed).
FOUND = [
    ("v2", 5),  # the length of the last header extension
    ("extended-l2", 229),  # an L2 table that an entry of its own leads to was taken for data
    ("data-file", 2319),  # entries behind the end of the file that led into new refcount blocks after a repair
    ("lazy-refcounts-dirty", 2895),  # less room than one header extension takes
    ("data-file-raw", 24),  # an L1 table that runs into an L2 table
    ("snapshots-v2", 141),  # a snapshot's L1 table over the header, which was overwritten
    ("snapshots-v2", 234),  # a snapshot's L1 table that runs into L2 tables
    ("bitmaps", 27),  # a bitmap's cluster behind the end of the file
    ("bitmaps", 256),  # the length of a bitmap's table
    ("luks", 279),  # the length of a LUKS header
    ("luks-refcounts-1", 8),  # a cluster that was copied to where it cannot be decrypted
]


ENCRYPTED = ("luks", "luks-refcounts-1", "aes")


async def _run(name: str, seeds: range, folder: Path) -> None:
    def report(seed: int, done: list[str], verdict: Verdict) -> None:
        wrong.append(f"scripts/mutate --set {name} --seed {seed} --count 1: {done}: {verdict.wrong}")

    wrong: list[str] = []
    tally = await run(name, seeds, folder, report)
    assert not wrong, "\n".join(wrong)
    assert tally.images == len(seeds)
    assert tally.grown < MEMORY


@pytest.mark.parametrize("name", [*thinned(FEATURE_SETS), *OTHER_SETS])
async def test_a_few(name: str, tmp_path: Path) -> None:
    await _run(name, range(4 if name in FEATURE_SETS else 100), tmp_path)


@pytest.mark.parametrize(("name", "seed"), thinned(FOUND))
async def test_found_once(name: str, seed: int, tmp_path: Path) -> None:
    await _run(name, range(seed, seed + 1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_SETS)
async def test_many(name: str, tmp_path: Path) -> None:
    await _run(name, range(1000, 1060), tmp_path)


@pytest.mark.parametrize(
    "name", [name for name in FEATURE_SETS if "luks" not in name and name not in ("aes", "backing")]
)
def test_the_oracle_reads_what_qemu_does(name: str, tmp_path: Path) -> None:
    sample = FEATURE_SETS[name](tmp_path)
    data = sample.data_file.read_bytes() if sample.data_file else None
    guest = Guest(sample.content, sample, data)
    disk = guest.disks()[b"", b""]
    flat = bytearray(guest.disk_size)
    for place, content in disk.items():
        assert content != "unreadable"
        if isinstance(content, bytes):
            flat[place : place + len(content)] = content
    runs = _runs(flat)
    qemu_io(sample.path, *(f"read -P {byte} {start} {length}" for start, length, byte in runs), fmt="qcow2")


def _runs(flat: bytearray) -> list[tuple[int, int, int]]:
    """Start, length and byte of all stretches of one byte, in whole sectors."""
    runs: list[tuple[int, int, int]] = []
    for start in range(0, len(flat), 512):
        byte = flat[start]
        if runs and runs[-1][2] == byte:
            runs[-1] = (runs[-1][0], runs[-1][1] + 512, byte)
        else:
            runs.append((start, 512, byte))
    return runs

"""``fusedisk check`` finds and repairs what ``qemu-img check`` does."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import pytest

from tests.conftest import qemu_img, qemu_io, require_tool
from tests.support.commands import Outcome, fusedisk

NUMBERS = ("check-errors", "corruptions", "leaks")
CODES = {"sound": 0, "leak": 3, "shared": 2, "lost table": 2}


def _theirs(image: Path) -> tuple[int, dict[str, int]]:
    command = [require_tool("qemu-img"), "check", "--output=json", str(image)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout)


def _ours(image: Path, *args: str) -> tuple[int, dict[str, int]]:
    done = fusedisk("check", "--output", "json", *args, image)
    return done.code, json.loads(done.out)


def _entry(image: Path, offset: int) -> int:
    return int.from_bytes(image.read_bytes()[offset : offset + 8], "big")


def _put(image: Path, offset: int, data: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def image(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """An image with data, a backing reference and a snapshot, then damaged as the parameter says."""
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    qemu_io(path, "write -P 1 0 1M", "write -P 2 5M 64k", "write -z 2M 64k", fmt="qcow2")
    qemu_img("snapshot", "-c", "first", path)
    qemu_io(path, "write -P 3 4k 32k", fmt="qcow2")
    l2 = _entry(path, _entry(path, 40)) & 0x00FF_FFFF_FFFF_FE00
    match request.param:
        case "leak":
            with path.open("ab") as file:
                file.truncate(-(-path.stat().st_size // 4096) * 4096 + 4096)
            block = _entry(path, _entry(path, 48))
            _put(path, block + 2 * (path.stat().st_size // 4096 - 1), (1).to_bytes(2, "big"))
        case "shared":
            _put(path, l2 + 8, _entry(path, l2).to_bytes(8, "big"))
        case "lost table":
            _put(path, _entry(path, 48), bytes(8))
        case "sound":
            pass
    return path


every_damage = pytest.mark.parametrize("image", CODES, indirect=True)


@every_damage
def test_finds_and_counts_what_qemu_does(image: Path, request: pytest.FixtureRequest) -> None:
    before = image.read_bytes()
    code, found = _ours(image)
    their_code, theirs = _theirs(image)
    assert code == their_code == CODES[request.node.callspec.params["image"]]
    keys = (*NUMBERS, "total-clusters", "allocated-clusters", "fragmented-clusters", "image-end-offset")
    assert {key: found.get(key) for key in keys} == {key: theirs.get(key) for key in keys}
    assert found["filename"] == str(image)
    assert image.read_bytes() == before


@every_damage
def test_a_dry_run_changes_nothing(image: Path, request: pytest.FixtureRequest) -> None:
    before = image.read_bytes()
    done = fusedisk("check", "-r", "all", "--dry-run", image)
    assert done.code == CODES[request.node.callspec.params["image"]]
    assert ("What repairing would do:" in done.out) is (done.code != 0)
    assert image.read_bytes() == before


@every_damage
def test_repairing_leaves_nothing(image: Path) -> None:
    code, found = _ours(image, "-r", "all")
    assert code == 0, found
    assert _theirs(image)[0] == 0
    assert _ours(image)[0] == 0
    assert fusedisk("info", image).code == 0
    qemu_io(image, "read -P 2 5M 64k", "read -P 0 2M 64k", fmt="qcow2")
    qemu_img("snapshot", "-a", "first", image)
    qemu_io(image, "read -P 2 5M 64k", fmt="qcow2")


@every_damage
def test_repairing_leaks_touches_no_corruption(image: Path, request: pytest.FixtureRequest) -> None:
    code, found = _ours(image, "-r", "leaks")
    assert code == {"leak": 0}.get(request.node.callspec.params["image"], code)
    assert found.get("corruptions-fixed", 0) == 0
    assert _theirs(image)[0] in (0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_damage_at_random(tmp_path: Path, seed: int) -> None:
    """A few bits of metadata flipped: we and QEMU agree on whether it is sound, and once we repaired it, on that."""
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4096", path, "8M")
    for _ in range(6):
        qemu_io(path, f"write -P {rng.randrange(1, 256)} {rng.randrange(2000) * 4096} 40k", fmt="qcow2")
    l1 = _entry(path, 40)
    l2 = next(entry for index in range(4) if (entry := _entry(path, l1 + 8 * index) & 0x00FF_FFFF_FFFF_FE00))
    block = _entry(path, _entry(path, 48))
    for _ in range(rng.randrange(1, 4)):
        table, length = rng.choice(((l2, 4096), (block, 256), (l1, 32)))
        at = table + rng.randrange(length)
        _put(path, at, bytes([path.read_bytes()[at] ^ 1 << rng.randrange(8)]))
    (code, _), (their_code, _) = _ours(path), _theirs(path)
    assert (code == 0) == (their_code == 0)
    assert _ours(path, "-r", "all")[0] == 0
    assert _theirs(path)[0] == 0


def _refused(done: Outcome, code: int, *words: str) -> None:
    assert done.code == code
    for word in words:
        assert word in done.err
    assert done.err.count("fusedisk: ") == 1
    assert not done.out


def test_what_cannot_be_checked(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    _refused(fusedisk("check", raw), 63, str(raw), "raw")
    _refused(fusedisk("check", tmp_path / "none"), 1, "none")
    _refused(fusedisk("check", "--dry-run", raw), 2, "--repair")
    _refused(fusedisk("check", "-U", "-r", "all", raw), 2, "cannot be repaired")
    cut = tmp_path / "cut.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", cut, "1M")
    with cut.open("r+b") as file:
        file.truncate(60)
    _refused(fusedisk("check", cut), 1, str(cut))


@pytest.mark.parametrize("image", ["sound"], indirect=True)
def test_text_for_people(image: Path) -> None:
    done = fusedisk("check", image)
    assert done.code == 0
    assert "No errors were found." in done.out
    assert "of 2048 clusters allocated" in done.out


def test_a_repair_keeps_the_snapshots_of_an_image_with_unknown_autoclear_bits(tmp_path: Path) -> None:
    image = tmp_path / "image.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", image, "10M")
    qemu_io(image, "write -P 5 0 1M")
    qemu_img("snapshot", "-c", "first", image)
    _put(image, 88, (1 << 50).to_bytes(8, "big"))
    _put(image, 0x20000 + 2 * 40, b"\0\7")  # a leak
    done = fusedisk("check", "-r", "all", image)
    assert done.code == 0, done
    assert _theirs(image)[0] == 0
    assert "first" in qemu_img("snapshot", "-l", image)
    qemu_io(image, "write -P 6 0 1M")
    qemu_img("snapshot", "-a", "first", image)
    qemu_io(image, "read -P 5 0 1M")

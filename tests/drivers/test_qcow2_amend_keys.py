"""``amend`` on encrypted qcow2 images: passphrases come and go, and what the disk holds stays."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from fusedisk.block.graph.graph import Graph
from fusedisk.block.image.amend import amend_image, amend_node
from fusedisk.core.errors import FusediskError, NotSupportedError, OptionError, PassphraseError
from fusedisk.drivers.table import DRIVERS
from tests.conftest import qemu_img
from tests.crash.recording import Guest, record
from tests.crash.replay import Crash, power_cuts, prefixes
from tests.crypto.images import (
    PASSPHRASE,
    create_qcow2,
    passphrase_opens,
    run_qemu_io,
    secret,
)
from tests.support.memory import Store, stores
from tests.support.qcow2 import MEMORY_DRIVERS, opened

NEW = "another one"


class Keys:
    """Files with passphrases."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, passphrase: str) -> str:
        path = self._folder / f"{passphrase}.key"
        path.write_text(passphrase)
        return str(path)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


@pytest.fixture(scope="module")
def made_by_qemu(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """An image with a passphrase in slot 0; QEMU takes seconds to make one."""
    path = create_qcow2(tmp_path_factory.mktemp("luks") / "disk.qcow2", "luks")
    run_qemu_io(path, "qcow2", "write -P 5 0 300k")
    return path.read_bytes()


@pytest.fixture
def image(tmp_path: Path, made_by_qemu: bytes) -> Path:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(made_by_qemu)
    return path


async def amend(image: Path, key: str | None = None, *, force: bool = False, **options: Any) -> None:
    """Amend with our driver; ``state`` is ``encrypt.state``. New slots take the least time."""
    given = {f"encrypt.{name.replace('_', '-')}": value for name, value in options.items()}
    if options.get("state") == "active":
        given.setdefault("encrypt.iter-time", "10")
    await amend_image(DRIVERS, str(image), given, key_file=key, force=force)


def opening(image: Path, *passphrases: str) -> list[str]:
    """Those of the passphrases with which QEMU opens the image."""
    return [passphrase for passphrase in passphrases if passphrase_opens(image, passphrase, "qcow2")]


# --- passphrases ----------------------------------------------------------------------------------------


async def test_a_passphrase_takes_the_place_of_another(image: Path, keys: Keys) -> None:
    await amend(image, keys(PASSPHRASE), state="active", new_key_file=keys(NEW))
    assert opening(image, PASSPHRASE, NEW, "neither") == [PASSPHRASE, NEW]
    await amend(image, state="inactive", old_key_file=keys(PASSPHRASE))
    assert opening(image, PASSPHRASE, NEW) == [NEW]
    run_qemu_io(image, "qcow2", "read -P 5 0 300k", "write -P 6 1M 64k", passphrase=NEW)
    qemu_img("check", *secret(NEW), "--image-opts", f"driver=qcow2,encrypt.key-secret=sec0,file.filename={image}")


async def test_qemu_adds_and_removes_and_we_open(image: Path, keys: Keys) -> None:
    options = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={image}"
    both = [*secret(), *secret(NEW, "sec1"), "--image-opts", options]
    qemu_img("amend", *both, "-o", "encrypt.state=active,encrypt.new-secret=sec1,encrypt.iter-time=10")
    for passphrase in (PASSPHRASE, NEW):
        unlocking: dict[str, Any] = {"encrypt.key-file": keys(passphrase)}
        async with opened(image, **unlocking) as disk:
            assert bytes(await disk.read(0, 300 << 10)) == b"\x05" * (300 << 10)
    await amend(image, state="inactive", old_key_file=keys(PASSPHRASE))
    assert opening(image, PASSPHRASE, NEW) == [NEW]


@pytest.mark.slow
async def test_every_slot(image: Path, keys: Keys) -> None:
    for slot in range(1, 8):
        await amend(image, keys(PASSPHRASE), state="active", new_key_file=keys(f"number {slot}"), keyslot=str(slot))
    with pytest.raises(OptionError, match="All 8 key slots are in use"):
        await amend(image, keys(PASSPHRASE), state="active", new_key_file=keys(NEW))
    await amend(image, state="inactive", keyslot="6")
    assert opening(image, *(f"number {slot}" for slot in range(4, 8))) == ["number 4", "number 5", "number 7"]
    await amend(image, state="inactive", keyslot="7", old_key_file=keys("number 7"))
    await amend(image, keys("number 1"), state="active", new_key_file=keys(NEW))  # the first free one
    assert opening(image, NEW, "number 6", "number 7") == [NEW]


async def test_a_slot_in_use_is_overwritten_by_force_only(image: Path, keys: Keys) -> None:
    await amend(image, keys(PASSPHRASE), state="active", new_key_file=keys("second"), keyslot="3")
    before = image.read_bytes()
    with pytest.raises(OptionError, match="Key slot 3 is in use"):
        await amend(image, keys(PASSPHRASE), state="active", new_key_file=keys(NEW), keyslot="3")
    assert image.read_bytes() == before
    await amend(image, keys(PASSPHRASE), force=True, state="active", new_key_file=keys(NEW), keyslot="3")
    assert opening(image, PASSPHRASE, "second", NEW) == [PASSPHRASE, NEW]
    await amend(image, state="inactive", keyslot="3")
    with pytest.raises(OptionError, match="only one in use"):
        await amend(image, keys(PASSPHRASE), force=True, state="active", new_key_file=keys(NEW), keyslot="0")
    assert opening(image, PASSPHRASE, NEW) == [PASSPHRASE]


@pytest.mark.parametrize("by_slot", [False, True])
async def test_the_last_passphrase_goes_by_force_only(image: Path, keys: Keys, by_slot: bool) -> None:
    chosen: dict[str, Any] = {"keyslot": "0"} if by_slot else {"old_key_file": keys(PASSPHRASE)}
    before = image.read_bytes()
    with pytest.raises(OptionError, match="lose all data"):
        await amend(image, state="inactive", **chosen)
    assert image.read_bytes() == before
    await amend(image, state="inactive", force=True, **chosen)
    assert opening(image, PASSPHRASE) == []


REFUSED: list[tuple[dict[str, str], type[FusediskError], str]] = [
    ({"state": "active"}, OptionError, "not encrypt.new-key-file"),
    ({"state": "active", "new_key_file": NEW, "old_key_file": PASSPHRASE}, OptionError, "only adds a passphrase"),
    ({"state": "active", "new_key_file": NEW, "keyslot": "8"}, OptionError, "the key slot is 8"),
    ({"state": "active", "new_key_file": NEW, "iter_time": "0"}, OptionError, "iter-time is 0"),
    ({"state": "inactive"}, OptionError, "neither encrypt.old-key-file"),
    ({"state": "inactive", "keyslot": "5"}, OptionError, "Key slot 5 is not in use"),
    ({"state": "inactive", "keyslot": "0", "new_key_file": NEW}, OptionError, "only removes a passphrase"),
    ({"state": "inactive", "keyslot": "0", "iter_time": "10"}, OptionError, "only removes a passphrase"),
    ({"state": "inactive", "old_key_file": NEW}, PassphraseError, "opens none of the key slots"),
    ({"state": "inactive", "old_key_file": NEW, "keyslot": "0"}, PassphraseError, "opens none of the key slots"),
    ({"state": "gone"}, OptionError, "active, inactive"),
    ({"keyslot": "1"}, OptionError, "not encrypt.state"),
]


@pytest.mark.parametrize(("options", "error", "words"), REFUSED, ids=lambda value: str(value)[:50])
async def test_refused_with_nothing_changed(
    image: Path, keys: Keys, options: dict[str, str], error: type[FusediskError], words: str
) -> None:
    before = image.read_bytes()
    given: dict[str, Any] = {name: keys(value) if name.endswith("file") else value for name, value in options.items()}
    with pytest.raises(error, match=words):
        await amend(image, keys(PASSPHRASE), **given)
    assert image.read_bytes() == before


@pytest.mark.parametrize("key", [None, "wrong"])
async def test_adding_needs_a_passphrase_that_opens(image: Path, keys: Keys, key: str | None) -> None:
    before = image.read_bytes()
    with pytest.raises(PassphraseError):
        await amend(image, key and keys(key), state="active", new_key_file=keys(NEW))
    assert image.read_bytes() == before


async def test_a_wrong_passphrase_leaves_the_other_settings_too(image: Path, keys: Keys) -> None:
    before = image.read_bytes()
    options = {"refcount_bits": 64, "size": "8M", "encrypt.state": "inactive", "encrypt.old-key-file": keys(NEW)}
    with pytest.raises(PassphraseError):
        await amend_image(DRIVERS, str(image), options)
    assert image.read_bytes() == before


async def test_old_images_have_no_key_slots(tmp_path: Path, keys: Keys) -> None:
    image = create_qcow2(tmp_path / "disk.qcow2", "aes")
    before = image.read_bytes()
    with pytest.raises(NotSupportedError, match="only luks"):
        await amend(image, keys(PASSPHRASE), state="active", new_key_file=keys(NEW))
    assert image.read_bytes() == before


# --- other settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("encryption", ["luks", "aes"])
async def test_zero_clusters_over_a_backing_file(tmp_path: Path, keys: Keys, encryption: str) -> None:
    """Host clusters of version 2 that read as zeroes hold what the cipher makes of zeroes."""
    base = tmp_path / "base.raw"
    base.write_bytes(b"base" * (1 << 20))
    image = tmp_path / "disk.qcow2"
    time = ",encrypt.iter-time=10" if encryption == "luks" else ""
    encrypt = f"cluster_size=4096,encrypt.format={encryption},encrypt.key-secret=sec0{time}"
    qemu_img("create", "-q", *secret(), "-f", "qcow2", "-o", encrypt, "-b", base, "-F", "raw", image)
    run_qemu_io(image, "qcow2", "write -P 7 0 64k", "write -z 40k 300k", "write -z -u 3M 9k")
    options = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={image}"
    qemu_img("snapshot", "-c", "one", *secret(), "--image-opts", options)
    run_qemu_io(image, "qcow2", "write -P 8 100k 4k", "write -z 500k 8k")
    expected = bytearray(base.read_bytes())
    for start, end, byte in ((0, 40, 7), (40, 340, 0), (100, 104, 8), (500, 508, 0), (3072, 3081, 0)):
        expected[start << 10 : end << 10] = bytes([byte]) * (end - start << 10)
    before = image.read_bytes()
    with pytest.raises(PassphraseError):
        await amend_image(DRIVERS, str(image), {"compat": "0.10"})
    assert image.read_bytes() == before
    for change in ({"compat": "0.10"}, {"compat": "1.1"}, {"refcount_bits": "64"}):
        await amend_image(DRIVERS, str(image), change, key_file=keys(PASSPHRASE))
        out = tmp_path / "out.raw"
        qemu_img("convert", *secret(), "--image-opts", options, "-O", "raw", out)
        assert out.read_bytes() == expected
        qemu_img("check", *secret(), "--image-opts", options)
    unlocking: dict[str, Any] = {"encrypt.key-file": keys(PASSPHRASE)}
    async with opened(image, **unlocking) as disk:
        await disk.apply_snapshot(disk.list_snapshots()[0].id)
        expected[100 << 10 : 104 << 10] = bytes(4 << 10)
        expected[500 << 10 : 508 << 10] = base.read_bytes()[500 << 10 : 508 << 10]
        assert await disk.read(0, disk.length) == expected


# --- crashes --------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_crashes_leave_a_passphrase_that_opens(image: Path, keys: Keys) -> None:
    """One is added, another replaced, one removed: at each instant the one that nobody touches opens the image."""

    async def changes(guest: Guest) -> None:
        node = guest.backend.node
        added = {"encrypt.state": "active", "encrypt.iter-time": "10"}
        for slot in ("6", "7"):
            await amend_node(node, added | {"encrypt.new-key-file": keys(f"in {slot}"), "encrypt.keyslot": slot})
        again = {"encrypt.new-key-file": keys("again"), "encrypt.keyslot": "6"}
        await amend_node(node, added | again, force=True)
        await amend_node(node, {"encrypt.state": "inactive", "encrypt.old-key-file": keys("in 7")})

    unlocking: dict[str, Any] = {"encrypt.key-file": keys(PASSPHRASE)}
    recording = await record(image, changes, **unlocking)
    assert opening(image, PASSPHRASE, "in 6", "in 7", "again") == [PASSPHRASE, "again"]
    cuts = power_cuts(recording.base, recording.log, random.Random(1), 4)
    seen = set()
    for crash in itertools.chain(prefixes(recording.base, recording.log, 1), cuts):
        if crash.image not in seen:
            seen.add(crash.image)
            assert await _content(crash, keys(PASSPHRASE)) == b"\x05" * 4096, (crash.cut, crash.what)
    assert len(seen) > 10


@pytest.mark.slow
async def test_power_cuts_while_one_takes_the_place_of_the_other(image: Path, keys: Keys) -> None:
    """Once the new one is answered it opens the image, whatever becomes of the old one."""

    async def changes(guest: Guest) -> None:
        node, state = guest.backend.node, "encrypt.state"
        await amend_node(node, {state: "active", "encrypt.new-key-file": keys(NEW), "encrypt.iter-time": "10"})
        await guest.write(2 << 20, b"x" * 512)  # which marks this place in the log
        await amend_node(node, {state: "inactive", "encrypt.old-key-file": keys(PASSPHRASE)})

    unlocking: dict[str, Any] = {"encrypt.key-file": keys(PASSPHRASE)}
    recording = await record(image, changes, **unlocking)
    answered = next(at for at, operation in enumerate(recording.log) if operation.kind == "mark")
    checked = set()
    for crash in power_cuts(recording.base, recording.log, random.Random(1), 6):
        if crash.cut > answered and crash.image not in checked:
            checked.add(crash.image)
            assert await _content(crash, keys(NEW)) == b"\x05" * 4096, (crash.cut, crash.what)
    assert len(checked) > 3


async def _content(crash: Crash, key: str) -> bytes:
    graph = Graph(MEMORY_DRIVERS)
    store = Store(0)
    store.data = bytearray(crash.image)
    with stores(image=store):
        try:
            spec = {"driver": "qcow2", "file": {"driver": "memory", "filename": "image"}, "encrypt": {"key-file": key}}
            disk = await graph.open_backend(spec)
            return bytes(await disk.read(0, 4096))
        finally:
            await graph.close()

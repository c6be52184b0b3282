"""The files that the pages of the documentation take for granted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from tests.conftest import qemu_img, run_tool

MIB = 1 << 20
SECTOR = 512
BOOT, ROOT_START = (2048, 16 * MIB // SECTOR), 34816
"""Start and length of the first partition, and start of the second one, in sectors."""
SIZE = 128 * MIB


def vm_disk(folder: Path) -> Path:
    """``vm.qcow2``: a GPT with a FAT and an ext4 filesystem, as a small virtual machine has them."""
    files = folder / "content"
    for name, text in (
        ("etc/hostname", "web1\n"),
        ("etc/hosts", "127.0.0.1 localhost web1\n"),
        ("home/ada/notes.txt", "Remember the milk.\n"),
        ("var/log/syslog", "".join(f"line {number}\n" for number in range(50_000))),
    ):
        path = files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    raw = folder / "vm.raw"
    with raw.open("wb") as file:
        file.truncate(SIZE)
    table = f"label: gpt\nstart={BOOT[0]},size={BOOT[1]},type=uefi,name=boot\nstart={ROOT_START},type=linux,name=root\n"
    (folder / "table").write_text(table)
    run_tool("sh", "-c", f"sfdisk -q '{raw}' <'{folder}/table'")
    run_tool("mkfs.vfat", "--offset", str(BOOT[0]), "-n", "BOOT", raw, str(BOOT[1] // 2))
    (folder / "config").write_text("default linux\n")
    run_tool("mcopy", "-i", f"{raw}@@{BOOT[0] * SECTOR}", folder / "config", "::/loader.conf")
    length = SIZE // SECTOR - 2048 - ROOT_START
    offset = f"offset={ROOT_START * SECTOR}"
    run_tool("mkfs.ext4", "-q", "-L", "root", "-d", files, "-E", offset, raw, f"{length // 2}k")
    image = folder / "vm.qcow2"
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, image)
    shutil.rmtree(files)
    for path in (raw, folder / "table", folder / "config"):
        path.unlink()
    return image


def dirty_disk(folder: Path, vm: Path) -> None:
    """``evidence.qcow2``: the same, but its ext4 filesystem was never unmounted, so its journal is to be replayed."""
    raw = folder / "evidence.raw"
    qemu_img("convert", "-f", "qcow2", "-O", "raw", vm, raw)
    part = f"{raw}?offset={ROOT_START * SECTOR}"
    run_tool("debugfs", "-w", "-R", "feature needs_recovery", part)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, folder / "evidence.qcow2")
    os.unlink(raw)

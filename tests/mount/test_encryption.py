"""Encrypted images through the mount and the command line."""

from __future__ import annotations

import os
from pathlib import Path

from tests.conftest import qemu_img
from tests.crypto.images import PASSPHRASE, secret
from tests.support.commands import fusedisk, fusedisk_process
from tests.support.mounts import Mounts


def test_a_mount_with_its_key_and_without(mounts: Mounts, tmp_path: Path) -> None:
    key, image = tmp_path / "key", tmp_path / "vm.qcow2"
    key.write_text(PASSPHRASE)
    options = f"encrypt.format=luks,encrypt.iter-time=10,encrypt.key-file={key}"
    assert fusedisk("create", "-f", "qcow2", "-o", options, image, "4M").code == 0
    on = mounts.mount("--key-file", key, image)
    with (on / "vm").open("r+b") as file:
        file.seek(12345)
        file.write(b"through the mount")
        file.flush()
        os.fsync(file.fileno())
    mounts.umount(on)
    source = f"driver=qcow2,encrypt.key-secret=sec0,file.filename={image}"
    qemu_img("check", *secret(), "--image-opts", source)
    qemu_img("convert", *secret(), "--image-opts", source, "-O", "raw", tmp_path / "plain")
    assert (tmp_path / "plain").read_bytes()[12345:12362] == b"through the mount"
    failed = fusedisk_process("mount", image, on)
    assert failed.code == 1
    assert "is encrypted, but no key was given" in failed.err
    assert "Traceback" not in failed.err


def test_a_key_from_standard_input(mounts: Mounts, tmp_path: Path) -> None:
    key, image = tmp_path / "key", tmp_path / "vm.qcow2"
    key.write_text(PASSPHRASE)
    options = f"encrypt.format=luks,encrypt.iter-time=10,encrypt.key-file={key}"
    assert fusedisk("create", "-f", "qcow2", "-o", options, image, "4M").code == 0
    on = mounts.directory()
    done = fusedisk_process("mount", "--key-file", "-", image, on, stdin=PASSPHRASE + "\n")
    assert done.code == 0, done
    assert (on / "vm").read_bytes() == bytes(4 << 20)
    mounts.umount(on)


def test_a_key_from_a_pipe_that_only_the_command_has(mounts: Mounts, tmp_path: Path) -> None:
    """As the shell's ``<(command)`` gives it: the daemon has not got that descriptor."""
    key, image = tmp_path / "key", tmp_path / "vm.qcow2"
    key.write_text(PASSPHRASE)
    options = f"encrypt.format=luks,encrypt.iter-time=10,encrypt.key-file={key}"
    assert fusedisk("create", "-f", "qcow2", "-o", options, image, "4M").code == 0
    on = mounts.directory()
    done = fusedisk_process("mount", "--key-file", "/dev/stdin", image, on, stdin=PASSPHRASE)
    assert done.code == 0, done
    assert (on / "vm").read_bytes() == bytes(4 << 20)
    mounts.umount(on)

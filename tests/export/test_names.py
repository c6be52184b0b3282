"""File names and inode numbers of exports."""

from __future__ import annotations

import pytest

from fusedisk.core.errors import OptionError
from fusedisk.export import names
from fusedisk.export.names import check_name, check_unique, default_name, inode_number


@pytest.mark.parametrize(
    ("filename", "name"),
    [
        ("/a/vm.qcow2", "vm"),
        ("vm.QCOW2", "vm"),
        ("disk.tar.img", "disk.tar"),
        ("backup.2024", "backup.2024"),
        ("/dev/sda1", "sda1"),
        (".qcow2", ".qcow2"),
        ("./proto:x.raw", "proto:x"),
        (None, "disk"),
        ("", "disk"),
    ],
)
def test_default_names(filename: str | None, name: str) -> None:
    assert default_name(filename) == name


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "ä" * 128])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(OptionError, match="with name="):
        check_name(name)


def test_names_that_files_can_have() -> None:
    for name in ("a", "a b,c", "ä" * 127, "-", "\udcff"):
        assert check_name(name) == name


def test_collisions_name_both_images() -> None:
    check_unique([("a", "x"), ("b", "x")])
    with pytest.raises(OptionError, match="'x' and 'y' would both be the file 'a'"):
        check_unique([("a", "x"), ("b", "z"), ("a", "y")])


def test_inodes_depend_on_the_name_alone() -> None:
    numbers = {inode_number(str(name)) for name in range(1000)}
    assert len(numbers) == 1000
    assert all(1 < number < 1 << 48 for number in numbers)
    assert inode_number("vm") == 83304275388948


def test_names_with_one_inode_number_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "inode_number", lambda name: 7)
    with pytest.raises(OptionError, match="'x' and 'y' would both have the inode number 7, give one of them another"):
        check_unique([("a", "x"), ("b", "y")])

"""Names that users give, also where the working directory has been removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fusedisk.core import paths
from fusedisk.core.errors import HostError


@pytest.fixture
def gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The former name of the working directory. Another directory has taken it."""
    old = tmp_path / "gone"
    old.mkdir()
    monkeypatch.chdir(old)
    old.rmdir()
    old.mkdir()
    return old


@pytest.mark.parametrize("function", [paths.absolute, paths.real])
def test_in_a_removed_directory(gone: Path, function: object) -> None:
    assert callable(function)
    with pytest.raises(FileNotFoundError):
        os.getcwd()
    (gone / "disk").touch()
    (gone.parent / "folder").mkdir()
    for given, expected in (
        ("../disk", "disk"),
        ("..", ""),
        ("../", ""),
        ("../folder/.", "folder"),
        ("../folder/../x", "x"),
    ):
        assert function(given) == str(gone.parent / expected)
    assert function("/a/b") == "/a/b"
    for inside in ("disk", ".", "./disk"):
        with pytest.raises(HostError, match="the working directory has been removed") as caught:
            function(inside)
        assert caught.value.errno == errno.ENOENT
    with pytest.raises(HostError, match=r"Could not find '\.\./none/disk': No such file or directory"):
        function("../none/disk")


def test_links_are_followed_by_one_of_them(gone: Path) -> None:
    (gone.parent / "link").symlink_to("target")
    assert paths.absolute("../link") == str(gone.parent / "link")
    assert paths.real("../link") == str(gone.parent / "target")


def test_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/target")
    assert paths.absolute("a/../b") == str(tmp_path / "b")
    assert paths.real("link/x") == "/target/x"

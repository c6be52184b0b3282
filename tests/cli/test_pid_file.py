"""The pid file, where others can write, too."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fusedisk.cli.pid_file import PidFile
from fusedisk.core.errors import FusediskError, HostError, OptionError
from tests.conftest import require_root

NOBODY = 65534
PID = f"{os.getpid()}\n"


@pytest.fixture
def sticky(tmp_path: Path) -> Path:
    """A directory as /tmp is."""
    path = tmp_path / "sticky"
    path.mkdir()
    path.chmod(0o1777)
    return path


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A file that nobody else is to change."""
    path = tmp_path / "private" / "conf"
    path.parent.mkdir()
    path.write_text("precious")
    return path


def _plant(link: Path, target: Path | str) -> None:
    require_root()
    link.symlink_to(target)
    os.lchown(link, NOBODY, NOBODY)


def test_it_is_written_and_removed(tmp_path: Path) -> None:
    pid_file = PidFile(str(tmp_path / "pid"))
    for _ in range(2):
        pid_file.write()
        assert (tmp_path / "pid").read_text() == PID
    pid_file.remove()
    assert list(tmp_path.iterdir()) == []


def test_it_does_not_follow_the_link_of_somebody_else(sticky: Path, conf: Path) -> None:
    _plant(sticky / "pid", conf)
    pid_file = PidFile(str(sticky / "pid"))
    with pytest.raises(OptionError) as caught:
        pid_file.write()
    assert str(caught.value) == (
        f"the pid file '{sticky}/pid' leads through '{sticky}/pid', a symbolic link of user {NOBODY}, expected one of "
        "user 0."
    )
    pid_file.remove()
    assert conf.read_text() == "precious"
    assert [conf] == list(conf.parent.iterdir())


def test_it_does_not_follow_a_chain_that_somebody_else_goes_on_with(sticky: Path, conf: Path, tmp_path: Path) -> None:
    _plant(sticky / "pid", conf)
    (tmp_path / "ours").symlink_to("sticky/pid")
    with pytest.raises(OptionError, match=f"leads through '{sticky}/pid'"):
        PidFile(str(tmp_path / "ours")).write()
    assert conf.read_text() == "precious"


def test_a_directory_of_somebody_else_may_be_a_link_where_only_they_can_make_one(
    sticky: Path, conf: Path, tmp_path: Path
) -> None:
    _plant(sticky / "folder", conf.parent)
    with pytest.raises(OptionError, match=f"leads through '{sticky}/folder'"):
        PidFile(str(sticky / "folder/pid")).write()
    assert [conf] == list(conf.parent.iterdir())
    _plant(tmp_path / "folder", conf.parent)
    PidFile(str(tmp_path / "folder/pid")).write()
    assert (conf.parent / "pid").read_text() == PID


def test_links_of_ours_are_followed_as_the_system_does(sticky: Path, conf: Path) -> None:
    below = sticky / "below"
    below.mkdir()
    (sticky / "pid").symlink_to(below / "up")
    (below / "up").symlink_to("../folder/./../private//file")
    (sticky / "folder").symlink_to(conf.parent)
    pid_file = PidFile(str(sticky / "pid"))
    pid_file.write()
    assert (conf.parent / "file").read_text() == PID
    pid_file.remove()
    assert [conf] == list(conf.parent.iterdir())


@pytest.mark.parametrize(
    ("target", "wanted"),
    [
        ("loop", "Could not write the pid file '{}': Too many levels of symbolic links"),
        ("none/file", "Could not write the pid file '{}': No such file or directory"),
        ("file/file", "Could not write the pid file '{}': Not a directory"),
        ("/", "the pid file '{}' exists and is not a regular file."),
    ],
)
def test_links_that_lead_nowhere_are_told(tmp_path: Path, target: str, wanted: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(FusediskError) as caught:
        PidFile(str(tmp_path / "loop")).write()
    assert str(caught.value) == wanted.format(tmp_path / "loop")


def test_a_file_under_the_name_of_the_temporary_one_is_left_alone(
    sticky: Path, conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "urandom", bytes)
    (sticky / "pid.00000000").symlink_to(conf)
    with pytest.raises(HostError, match="File exists"):
        PidFile(str(sticky / "pid")).write()
    assert conf.read_text() == "precious"


def test_only_what_was_written_is_removed(tmp_path: Path) -> None:
    """Neither another file with the same content, nor the same inode with another one's."""
    path = tmp_path / "pid"
    first = PidFile(str(path))
    first.write()
    second = PidFile(str(path))
    second.write()
    first.remove()
    assert path.read_text() == PID
    path.write_text("1\n")
    second.remove()
    assert path.read_text() == "1\n"
    PidFile(str(path)).remove()
    assert path.read_text() == "1\n"

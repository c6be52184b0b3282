"""The log of a daemon: where it is told to be, and for how long."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fusedisk.cli.daemon_log import DaemonLog, remove_old
from fusedisk.mount import runtime
from tests.mount.test_units import only_in, record_in
from tests.support.commands import fusedisk_process
from tests.support.mounts import Mounts

WEEK = 7 * 86400


def _listed(on: Path) -> dict[str, Any]:
    found: list[dict[str, Any]] = fusedisk_process("list", "--output", "json").json
    return next(mount for mount in found if mount["mountpoint"] == str(on))


def _aged(path: Path, seconds: float) -> Path:
    path.touch(exist_ok=True)
    then = time.time() - seconds
    os.utime(path, (then, then))
    return path


def _line(level: int) -> logging.LogRecord:
    return logging.LogRecord("x", level, "x.py", 1, "something", (), None)


def test_what_a_daemon_warns_of_before_it_is_ready_is_on_the_terminal(mounts: Mounts, raw: Path) -> None:
    on, done = mounts.try_mount("--partitions", "-f", "raw", raw)  # which has no table
    warning = "'disk' gets no files of partitions: there is no partition table."
    assert (done.code, done.out, done.err) == (0, "", f"fusedisk: {warning}\n")
    log = Path(str(_listed(on)["log"]))
    assert log.parent == Path(runtime.directory())
    assert log == Path(runtime.log_path(str(on)))
    assert warning in log.read_text()
    mounts.umount(on)
    assert not log.exists()


def test_a_daemon_with_nothing_to_say_has_no_log(mounts: Mounts, raw: Path) -> None:
    on = mounts.mount(raw)
    assert _listed(on)["log"] is None
    mounts.umount(on)
    assert not os.path.exists(runtime.log_path(str(on)))


def test_a_clean_end_takes_away_what_holds_no_warning(mounts: Mounts, raw: Path) -> None:
    on = mounts.directory()
    mounts.adopt(on)
    assert fusedisk_process("-vv", "mount", raw, on).code == 0
    log = Path(str(_listed(on)["log"]))
    assert log.exists()
    mounts.umount(on)
    assert not log.exists()


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING])
@pytest.mark.parametrize("before", [None, "", "what another daemon said\n"])
def test_what_is_kept(tmp_path: Path, level: int, before: str | None) -> None:
    path = tmp_path / "x.log"
    if before is not None:
        path.write_text(before)
    log = DaemonLog(str(path))
    log.emit(_line(logging.WARNING))
    assert log.hand_over() == ["something"]
    log.emit(_line(level))
    assert log.hand_over() == []
    log.end()
    assert path.exists() == (level == logging.WARNING or bool(before))


def test_old_logs_go_unless_their_daemon_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o700)
    only_in(tmp_path, monkeypatch)
    monkeypatch.setattr(runtime, "directory", lambda: str(tmp_path))
    record_in(tmp_path).write()  # of this process, which lives
    kept = [_aged(tmp_path / name, WEEK + 60) for name in ("record.log", "record.log.1", "other.txt")]
    kept.append(_aged(tmp_path / "young.log", WEEK - 60))
    gone = [_aged(tmp_path / name, WEEK + 60) for name in ("a.log", "a.log.1")]
    remove_old()
    assert [path for path in [*kept, *gone] if path.exists()] == kept


def test_a_new_daemon_removes_old_logs(mounts: Mounts, raw: Path) -> None:
    old = _aged(Path(runtime.directory()) / f"{os.getpid():016x}.log", WEEK + 60)
    mounts.umount(mounts.mount(raw))
    assert not old.exists()

"""What ``fusedisk list`` prints for people, and which log it names."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from fusedisk.mount import runtime
from fusedisk.mount.runtime import ExportRecord, MountRecord
from tests.support.commands import fusedisk

GIB = 1 << 30


def _show(monkeypatch: pytest.MonkeyPatch, *records: MountRecord) -> list[str]:
    monkeypatch.setattr(runtime, "records", lambda: list(records))
    done = fusedisk("list")
    assert (done.code, done.err) == (0, "")
    return done.out.splitlines()


def _record(tmp_path: Path, *exports: ExportRecord) -> MountRecord:
    pid = os.getpid()
    record = MountRecord("/mnt/disk", pid, runtime.process_started(pid) or "", list(exports))
    record.path, record.owner = str(tmp_path / "record.json"), os.geteuid()
    record.place, record.mounted = record.mountpoint, True
    return record


def test_parts_are_below_their_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, *lines = _show(
        monkeypatch,
        _record(
            tmp_path,
            ExportRecord("vm", "/srv/vm.qcow2", "qcow2", 10 * GIB, False, "throw-away"),
            ExportRecord("other", "/srv/other.raw", "raw", GIB, True),
            ExportRecord("vm.p1", "/srv/vm.qcow2", "qcow2", GIB, False, part_of="vm"),
            ExportRecord("vm@a", "/srv/vm.qcow2", "qcow2", 10 * GIB, True, part_of="vm"),
            ExportRecord("vm@a.p1", "/srv/vm.qcow2", "qcow2", GIB, True, part_of="vm@a"),
        ),
    )
    assert head.startswith(f"/mnt/disk:  pid {os.getpid()}  ")
    assert lines == [
        "  vm             10 GiB  qcow2, overlay  /srv/vm.qcow2",
        "    vm.p1         1 GiB",
        "    vm@a         10 GiB  read-only",
        "      vm@a.p1     1 GiB  read-only",
        "  other           1 GiB  raw, read-only  /srv/other.raw",
    ]


def test_lines_are_broken_between_cells_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, name = f"/srv/{'long/' * 20}vm.qcow2", "n" * 100
    record = _record(
        tmp_path,
        ExportRecord("vm", path, "qcow2", GIB, True),
        ExportRecord(name, "/srv/\x1b[31mred", "raw", GIB, False),
        ExportRecord("short", f"/srv/{'x' * 30}.raw", "raw", GIB, True),
    )
    record.place = f"/mnt/{'y' * 70}"
    head, process, *lines = _show(monkeypatch, record)
    assert head == f"{record.place}:"
    assert process.startswith(f"    pid {os.getpid()}  ")
    assert lines == [
        "  vm        1 GiB  qcow2, read-only",
        f"        {path}",
        f"  {name}",
        "        1 GiB  raw  /srv/\\x1b[31mred",
        f"  short     1 GiB  raw, read-only  /srv/{'x' * 30}.raw",
    ]


def test_the_log_is_that_of_the_daemon(tmp_path: Path) -> None:
    """An older daemon at the same place may have left one."""
    record = _record(tmp_path)
    assert not record.has_log()
    log = Path(record.log)
    log.write_text("something")
    assert record.has_log()
    before = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) - 1
    os.utime(log, (before, before))
    assert not record.has_log()
    record.started = "nonsense"
    assert not record.has_log()

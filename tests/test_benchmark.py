"""The bench measures, compares and cleans up; what it finds is not judged here."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from scripts.benchmark import servers
from scripts.benchmark.__main__ import compare, measure_once
from scripts.benchmark.images import make_images
from scripts.benchmark.report import Result, as_json, print_results
from scripts.benchmark.servers import SERVERS, Served, ServerError
from scripts.benchmark.workloads import OURS, THEIRS, WORKLOADS, Contender
from tests.conftest import qemu_img, require_fuse, require_tool

READ = WORKLOADS["randread-4k-d1"]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two servers that offer the image file itself; the list fills with who was asked, in order."""
    asked: list[str] = []

    def serve(name: str) -> servers.Server:
        @contextmanager
        def served(image: Path, fmt: str, folder: Path) -> Iterator[Served]:
            asked.append(name)
            yield Served(image, psutil.Process())

        return served

    contenders = {name: Contender(serve(name)) for name in SERVERS}
    monkeypatch.setattr("scripts.benchmark.__main__.CONTENDERS", contenders)
    return asked


def test_ratio_is_ours_divided_by_theirs() -> None:
    result = Result("raw", READ, runs={OURS: [100.0, 300.0, 200.0], THEIRS: [50.0, 400.0, 100.0]})
    assert result.median(OURS) == 200.0
    assert result.ratio == 2.0
    result.errors[OURS] = "it ended"
    assert result.ratio is None


def test_missed_goals_are_told() -> None:
    result = Result("raw", READ, runs={OURS: [199.0], THEIRS: [100.0]}, cpu={OURS: [3.0], THEIRS: [2.0]})
    assert result.missed == [
        "raw, randread-4k-d1: the ratio is 1.99, the goal at least 2.00",
        "raw, randread-4k-d1: the CPU ratio is 1.50, the goal at most 1.00",
    ]
    output = io.StringIO()
    print_results(Console(file=output, width=200), [result])
    assert "≥ 2.00 MISSED" in output.getvalue()
    reached = Result("raw", READ, runs={OURS: [200.0], THEIRS: [100.0]}, cpu={OURS: [2.0], THEIRS: [2.0]})
    assert reached.missed == []


def test_compressed_image_is_compressed_about_two_to_one(tmp_path: Path) -> None:
    require_tool("qemu-img")
    image = make_images(tmp_path, 1 << 20, ("compressed",))["compressed"].path
    assert 0.4 < (image.stat().st_size - (4 << 16)) / (1 << 20) < 0.7
    assert list(tmp_path.iterdir()) == [image]


def test_servers_take_turns(plain: list[str], tmp_path: Path) -> None:
    require_tool("fio")
    console = Console(file=io.StringIO())
    results = compare(console, tmp_path, [OURS, THEIRS], (READ.name,), ("raw",), runs=2, runtime=0.05, size=1)
    assert plain == [OURS, THEIRS, THEIRS, OURS]
    assert [len(results[0].runs[server]) for server in (OURS, THEIRS)] == [2, 2]
    assert min(results[0].runs[OURS]) > 0


def test_a_failed_run_is_told_and_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(servers, "FUSEDISK", ["false"])
    image = make_images(tmp_path, 1 << 20, ("raw",))["raw"]
    result = Result("raw", READ)
    measure_once(result, OURS, image, tmp_path, 0.05)
    assert "exited 1" in result.errors[OURS]
    output = io.StringIO()
    print_results(Console(file=output, width=200), [result])
    assert "failed: fusedisk, raw, randread-4k-d1: fusedisk mount" in output.getvalue()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.raw"]


def test_images_of_all_formats_hold_the_same(tmp_path: Path) -> None:
    require_tool("qemu-img")
    images = make_images(tmp_path, 1 << 20, ("raw", "qcow2"))
    qemu_img("compare", "-f", "raw", "-F", "qcow2", images["raw"].path, images["qcow2"].path)
    assert '"zero": true' not in qemu_img("map", "--output=json", images["qcow2"].path)


@pytest.mark.parametrize("server", [OURS, THEIRS])
def test_a_served_image_is_flat_and_goes_away(server: str, tmp_path: Path) -> None:
    require_fuse()
    require_tool("qemu-storage-daemon")
    images = make_images(tmp_path, 1 << 20, ("raw", "qcow2"))
    with SERVERS[server](images["qcow2"].path, "qcow2", tmp_path) as served:
        assert served.path.read_bytes() == images["raw"].path.read_bytes()
        pid = served.process.pid
    with pytest.raises(RuntimeError, match="interrupted"), SERVERS[server](images["qcow2"].path, "qcow2", tmp_path):
        raise RuntimeError("interrupted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image.qcow2", "image.raw"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_json_holds_all_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scripts.benchmark.report.versions", dict)
    result = Result("raw", READ, runs={OURS: [1.0, 3.0, 2.0]}, errors={THEIRS: "gone"})
    written = as_json([result], {}, {"runs": 3})
    assert written["results"][0]["runs"] == {OURS: [1.0, 3.0, 2.0]}
    assert written["results"][0]["median"] == {OURS: 2.0}
    assert written["results"][0]["errors"] == {THEIRS: "gone"}


def test_a_command_that_hangs_is_told() -> None:
    with pytest.raises(ServerError, match="sleep 60 did not end within 0 seconds"):
        servers.run(["sleep", "60"], timeout=0.01)

"""The bench measures, compares and cleans up; what it finds is not judged here."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from scripts.benchmark import commands, images, jobs, machine, servers
from scripts.benchmark.__main__ import compare, measure_once
from scripts.benchmark.images import FORMATS, make_images
from scripts.benchmark.jobs import Fio, OnLoop, Tar, filesystem, loop_device
from scripts.benchmark.report import Result, as_json, print_results
from scripts.benchmark.servers import SERVERS, Served, ServerError
from scripts.benchmark.workloads import (
    CHAIN,
    HARDER,
    HOST_FILE,
    OURS,
    PASSTHROUGH,
    SINGLE,
    THEIRS,
    WORKLOADS,
    Contender,
)
from tests.conftest import qemu_img, require_fuse, require_root, require_tool, run_tool
from tests.support.mounts import wait_until

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


def test_images_that_need_more_work_have_a_goal_of_their_own() -> None:
    write = WORKLOADS["randwrite-4k-d1"]
    runs = {OURS: [101.0], THEIRS: [100.0]}
    assert Result("luks", write, runs=runs).missed == []
    assert Result("luks", write, runs={OURS: [99.0], THEIRS: [100.0]}).missed == [
        "luks, randwrite-4k-d1: the ratio is 0.99, the goal at least 1.00"
    ]
    assert Result("qcow2", write, runs=runs).missed == [
        "qcow2, randwrite-4k-d1: the ratio is 1.01, the goal at least 2.00"
    ]
    assert set(HARDER) < set(FORMATS)


def test_each_row_and_goal_is_described() -> None:
    text = (Path(__file__).parents[1] / "docs/explanation/measuring.md").read_text()
    text = text.partition("\n## Rows\n")[2].partition("\n## ")[0]
    for workload in WORKLOADS.values():
        start, _, depth = workload.name.rpartition("-")
        lines = [line for line in text.splitlines() if f"`{workload.name}`" in line]
        if depth == "d16" and not lines:
            lines = [line for line in text.splitlines() if f"`{start}-d1`, `-d16`" in line]
        assert len(lines) == 1, workload.name
        assert ("none" if workload.goal is None else f"{workload.goal:.2f}") in lines[0].split("|")[-2]


def test_fewer_seconds_are_better() -> None:
    result = Result("ext4", WORKLOADS["loop-tar"], runs={OURS: [2.0], THEIRS: [3.0]})
    assert result.ratio == 1.5
    assert result.missed == []
    output = io.StringIO()
    print_results(Console(file=output, width=200), [result])
    assert "2.00 s (2.00 – 2.00)" in output.getvalue()


def test_rows_of_other_pairs_have_tables_of_their_own_and_no_goal_for_cpu() -> None:
    chain = WORKLOADS["chain-randread-4k-d1"]
    result = Result(
        "chain", chain, chain.pair, runs={CHAIN: [80.0], SINGLE: [100.0]}, cpu={CHAIN: [3.0], SINGLE: [2.0]}
    )
    assert result.ratio == 0.8
    assert result.missed == ["chain, chain-randread-4k-d1: the ratio is 0.80, the goal at least 0.83"]
    output = io.StringIO()
    print_results(Console(file=output, width=200), [Result("raw", READ), result])
    lines = output.getvalue().splitlines()
    assert [line for line in lines if OURS in line and THEIRS in line] != []
    assert [line for line in lines if CHAIN in line and SINGLE in line and OURS not in line] != []


def test_own_rows_run_where_our_server_is_asked_for() -> None:
    chain = WORKLOADS["chain-randread-4k-d1"]
    assert chain.contenders([OURS]) == (CHAIN, SINGLE)
    assert chain.contenders([THEIRS]) == ()
    assert READ.contenders([THEIRS]) == (THEIRS,)


def test_what_cannot_run_here_is_skipped_and_told(
    plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.release", lambda: "6.8.12-generic")
    output = io.StringIO()
    names, formats = ("passthrough-seqread-1m",), ("raw",)
    assert compare(Console(file=output), tmp_path, [OURS], names, formats, runs=1, runtime=0.05, size=1) == []
    assert "skipped: passthrough-seqread-1m: passthrough needs root and Linux 6.9" in output.getvalue()
    monkeypatch.setattr("scripts.benchmark.workloads.DEVICE", str(tmp_path / "none"))
    names, formats = ("awake-loop-tar",), ("ext4",)
    assert compare(Console(file=output), tmp_path, [OURS], names, formats, runs=1, runtime=0.05, size=1) == []
    assert "skipped: awake-loop-tar: --low-latency needs root and" in output.getvalue()
    assert plain == []


def test_chain_shows_the_same_and_each_layer_has_its_part(tmp_path: Path) -> None:
    require_tool("qemu-img")
    made = make_images(tmp_path, 3 << 20, ("raw", "chain"))
    top = made["chain"]
    assert [len(json.loads(qemu_img("info", "--backing-chain", "--output=json", top.path))), top.depth] == [16, 16]
    qemu_img("compare", "-f", "raw", "-F", "qcow2", made["raw"].path, top.path)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", made["raw"].path, top.bottom.path)
    shown: dict[int, int] = {}
    for extent in json.loads(qemu_img("map", "--output=json", top.path)):
        shown[extent["depth"]] = shown.get(extent["depth"], 0) + extent["length"]
    assert shown == dict.fromkeys(range(16), (3 << 20) // 16)


def test_every_file_is_read_from_the_loop_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_root()
    require_tool("qemu-img")
    monkeypatch.setattr(images, "FILES", 200)
    monkeypatch.setattr(images, "FILES_SIZE", 32 << 20)
    image = make_images(tmp_path, 1 << 20, ("ext4",))["ext4"]
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", image.path, flat)
    run_tool("e2fsck", "-fn", flat)
    found = Tar().measure(flat, 0.0)
    assert 0 < found.value < jobs.PATIENCE
    assert 200 * (20 << 10) < found.served < 32 << 20
    assert jobs._devices_on(flat) == []


def test_a_damaged_filesystem_leaves_nothing_attached(tmp_path: Path) -> None:
    require_root()
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(1 << 20))
    with pytest.raises(ServerError, match="mount -t ext4"):
        Tar().measure(flat, 0.0)
    assert jobs._devices_on(flat) == []


def test_fio_runs_on_the_loop_device(tmp_path: Path) -> None:
    require_root()
    require_tool("fio")
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(1 << 20))
    assert OnLoop(Fio("randread", 4096, 16)).measure(flat, 0.05).value > 0
    assert jobs._devices_on(flat) == []


def test_an_interrupt_while_attaching_leaves_nothing_attached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_root()
    flat = tmp_path / "flat"
    flat.write_bytes(bytes(1 << 20))

    def interrupted(command: list[str], timeout: float = 60) -> str:
        text = servers.run(command, timeout)
        if "--find" in command:
            assert jobs._devices_on(flat) != []
            raise KeyboardInterrupt
        return text

    monkeypatch.setattr(jobs, "run", interrupted)
    with pytest.raises(KeyboardInterrupt), loop_device(flat):
        pass
    assert jobs._devices_on(flat) == []


@pytest.mark.parametrize("fmt", ["raw", "qcow2"])
def test_data_that_is_not_passed_through_is_noticed(fmt: str, tmp_path: Path) -> None:
    require_fuse()
    row = WORKLOADS["passthrough-seqread-1m"]
    if row.unable:
        pytest.skip(row.unable)
    image = make_images(tmp_path, 4 << 20, (fmt,))[fmt]
    result = Result(fmt, row, row.pair)
    measure_once(result, PASSTHROUGH, image, tmp_path, 0.2)
    if fmt == "raw":
        assert result.errors == {}
        measure_once(result, HOST_FILE, image, tmp_path, 0.05)
        assert result.ratio is not None
        assert result.cpu_ratio is None
    else:
        assert "was not passed through" in result.errors[PASSTHROUGH]


def test_compressed_image_holds_programs_compressed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_tool("qemu-img")
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "a").write_bytes(b"\x7fELF" + bytes(range(256)) * 1200)
    (programs / "b").write_bytes(b"#!/bin/sh\n")
    monkeypatch.setattr(images, "PROGRAMS", (programs,))
    folder = tmp_path / "images"
    folder.mkdir()
    image = make_images(folder, 1 << 20, ("compressed",))["compressed"].path
    assert list(folder.iterdir()) == [image]
    assert json.loads(qemu_img("check", "--output=json", image))["compressed-clusters"] == (1 << 20) // images.CLUSTER
    qemu_img("convert", "-O", "raw", image, tmp_path / "raw")
    program = (programs / "a").read_bytes()
    assert (tmp_path / "raw").read_bytes() == (program * 4)[: 1 << 20]


def test_without_programs_there_is_no_compressed_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(images, "PROGRAMS", (tmp_path,))
    with pytest.raises(ServerError, match="no programs to fill an image with"):
        make_images(tmp_path, 1 << 20, ("compressed",))


def test_servers_take_turns(plain: list[str], tmp_path: Path) -> None:
    require_tool("fio")
    console = Console(file=io.StringIO())
    results = compare(console, tmp_path, [OURS, THEIRS], (READ.name,), ("raw",), runs=2, runtime=0.05, size=1)
    assert plain == [OURS, THEIRS, THEIRS, OURS]
    assert [len(results[0].runs[server]) for server in (OURS, THEIRS)] == [2, 2]
    assert min(results[0].runs[OURS]) > 0


def test_a_run_in_pieces_takes_turns_more_often(
    plain: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_tool("fio")
    assert WORKLOADS["passthrough-seqread-1m"].pieces == 3
    monkeypatch.setitem(WORKLOADS, "pieces", dataclasses.replace(READ, name="pieces", pieces=2))
    console = Console(file=io.StringIO())
    (result,) = compare(console, tmp_path, [OURS, THEIRS], ("pieces",), ("raw",), runs=1, runtime=0.1, size=1)
    assert plain == [OURS, THEIRS, THEIRS, OURS]
    assert [len(result.runs[server]) for server in (OURS, THEIRS)] == [2, 2]


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
    made = make_images(tmp_path, 1 << 20, ("raw", "qcow2"))
    qemu_img("compare", "-f", "raw", "-F", "qcow2", made["raw"].path, made["qcow2"].path)
    assert '"zero": true' not in qemu_img("map", "--output=json", made["qcow2"].path)


@pytest.mark.parametrize("server", [OURS, THEIRS])
def test_a_served_image_is_flat_and_goes_away(server: str, tmp_path: Path) -> None:
    require_fuse()
    require_tool("qemu-storage-daemon")
    made = make_images(tmp_path, 1 << 20, ("raw", "qcow2"))
    with SERVERS[server](made["qcow2"].path, "qcow2", tmp_path) as served:
        assert served.path.read_bytes() == made["raw"].path.read_bytes()
        pid = served.process.pid
    with pytest.raises(RuntimeError, match="interrupted"), SERVERS[server](made["qcow2"].path, "qcow2", tmp_path):
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


@pytest.mark.parametrize(
    ("driver", "nanoseconds", "told"),
    [("haltpoll\n", "200000\n", "haltpoll for 200 µs"), ("haltpoll\n", "0\n", "haltpoll for 0 µs"),
     ("haltpoll\n", None, "haltpoll"), ("intel_idle\n", "200000\n", "intel_idle"), (None, None, "")],
)  # fmt: skip
def test_a_run_tells_how_processors_wait(
    driver: str | None, nanoseconds: str | None, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, content in (("_IDLE_DRIVER", driver), ("_HALT_POLL", nanoseconds)):
        path = tmp_path / name
        if content is not None:
            path.write_text(content)
        monkeypatch.setattr(machine, name, path)
    assert machine.describe()["idle"] == told
    assert machine.summary().endswith(f"processors, idle by {told}" if told else " processors")


def test_a_command_that_hangs_is_told() -> None:
    with pytest.raises(ServerError, match="sleep 60 did not end within 0 seconds"):
        servers.run(["sleep", "60"], timeout=0.01)


def test_what_a_hanging_command_started_ends_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    with pytest.raises(ServerError, match="did not end"):
        servers.run(["sh", "-c", f"sleep 60 & echo $! > {pid}; wait"], timeout=1.0)
    child = int(pid.read_text())

    def has_ended() -> bool:
        try:
            return psutil.Process(child).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(has_ended, "the child of the command has ended")


def test_a_busy_filesystem_hides_no_interrupt_and_goes_away(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    require_root()
    require_tool("qemu-img")
    monkeypatch.setattr(images, "FILES", 10)
    monkeypatch.setattr(images, "FILES_SIZE", 32 << 20)
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", make_images(tmp_path, 1 << 20, ("ext4",))["ext4"].path, flat)
    monkeypatch.setattr(jobs, "COMMAND_TIMEOUT", 0.5)
    mountpoints = []
    with ExitStack() as readers:

        def read_and_be_interrupted() -> None:
            with loop_device(flat) as device, filesystem(device) as files:
                mountpoints.append(files)
                readers.enter_context((files / "00" / "0").open("rb"))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            read_and_be_interrupted()
        devices = jobs._devices_on(flat)
        assert len(devices) == 1
    assert [path.exists() for path in mountpoints] == [False]
    jobs._wait_until_detached(devices[0])


@pytest.mark.slow
def test_commands_are_compared_with_qemu_img(tmp_path: Path) -> None:
    require_fuse()
    sides = {"fusedisk": commands.ROOT, "qemu-img": None}
    rows = list(commands.compare(tmp_path, "64k", "16M", sides, runs=1))
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[0] for row in cells] == [*commands.OPERATIONS, "mount, until it is ready"]
    assert all(float(row[1].split(" (")[0]) > 0 for row in cells)
    assert [row[2] == "–" for row in cells] == [False] * len(commands.OPERATIONS) + [True]

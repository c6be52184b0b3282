"""Running without an event loop, and modules that are imported late."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import trio

from fusedisk.core.alone import checkpoint, is_alone, run_alone, shield, sleep
from fusedisk.core.offload import run_cpu, run_host_io
from tests.support.commands import fusedisk, fusedisk_process, process_environment


def test_alone_everything_is_done_in_place() -> None:
    async def work() -> list[object]:
        with shield():
            await checkpoint()
            await sleep(0)
            return [await run_host_io(is_alone), await run_cpu(divmod, 7, 2)]

    assert run_alone(work()) == [True, (3, 1)]
    assert not is_alone()


async def test_in_a_task_it_is_trios() -> None:
    with trio.testing.assert_checkpoints():
        await checkpoint()
    with trio.testing.assert_checkpoints():
        await sleep(0)
    with trio.move_on_after(0) as scope, shield():
        await checkpoint()
    assert not scope.cancelled_caught
    assert await run_host_io(is_alone) is False


def test_errors_come_out_and_waiting_is_a_bug() -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async def wait() -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    with pytest.raises(ZeroDivisionError):
        run_alone(fail())
    with pytest.raises(RuntimeError):
        run_alone(wait())
    assert not is_alone()


def test_a_driver_that_waits_is_waited_for() -> None:
    done = fusedisk("map", "--output", "json", "driver=null-co,size=1M,latency-ns=1000000,read-zeroes=on")
    assert [entry["length"] for entry in done.json] == [1 << 20]


def test_a_late_module_is_the_module_once_it_is_used(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("print('imported')\nfrom package.part import value\n")
    (package / "part.py").write_text("value = 5\n")
    script = """
from fusedisk.cli.late import import_late
import_late("package")
import_late("missing")
import package
import package as again
print("named")
print(again.value, package.part.value, package.__name__)
from package import value
import sys
assert sys.modules["package"].value == value == 5
try: package.nothing
except AttributeError as exc: print(exc)
import missing
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=process_environment() | {"PYTHONPATH": f"{tmp_path}:{process_environment()['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )
    said = ["named", "imported", "5 5 package", "module 'package' has no attribute 'nothing'"]
    assert done.stdout.splitlines() == said
    assert done.stderr.splitlines()[-1] == "ModuleNotFoundError: No module named 'missing'"


def test_a_file_that_is_opened_in_place_has_its_errors(tmp_path: Path) -> None:
    assert fusedisk_process("info", tmp_path / "none").code == 1
    assert fusedisk_process("map", tmp_path).code == 1

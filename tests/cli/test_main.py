"""The command group: help, versions, lazy imports, and the border where exceptions become exit codes."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import fusedisk as package
from fusedisk.cli import main
from fusedisk.core.errors import FusediskError, ImageError, OptionError
from fusedisk.mount.runtime import ExportRecord, MountRecord
from tests.conftest import qemu_img
from tests.support.commands import (
    ROOT,
    fusedisk,
    fusedisk_process,
    process_command,
    process_environment,
)
from tests.support.images import MIB, make_qcow2, make_sparse_raw

HEAVY = ("trio", "pyfuse3", "rich", "psutil", "fusedisk.block", "fusedisk.drivers", "fusedisk.mount")


def _imported_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=process_environment(),
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "statement",
    [
        "import fusedisk",
        "from fusedisk.cli.main import run; run(['--help'])",
        "from fusedisk.cli.main import run; run(['--version'])",
        "from fusedisk.cli.main import run; run(['inof'])",
        *[f"from fusedisk.cli.main import run; run(['{name}', '--help'])" for name in main.COMMANDS],
    ],
)
def test_help_is_quick_since_it_imports_nothing_heavy(statement: str) -> None:
    assert not _imported_by(statement) & set(HEAVY)


NOT_FOR_READING = {
    *("trio._core", "pyfuse3", "rich", "psutil", "zstandard", "deflate", "asyncio", "multiprocessing", "subprocess"),
    *("socket", "ssl", "difflib", "hashlib", "fusedisk.crypto.ciphers", "fusedisk.crypto.libcrypto", "fusedisk.api"),
    *(f"fusedisk.drivers.format.qcow2.{name}" for name in ("create", "resize", "snapshot", "vmstate", "compressed")),
    *(f"fusedisk.drivers.format.qcow2.{name}" for name in ("amend", "check", "encryption")),
    *(
        "fusedisk.compression.inflate",
        "fusedisk.compression.inflate_pool",
        "fusedisk.block.image.check",
        "fusedisk.block.image.create",
    ),
    *("fusedisk.export", "fusedisk.mount", "fusedisk.sync"),
}
"""What commands that only read an image's metadata do without: half of their time went into importing it."""


@pytest.mark.parametrize("command", ["info", "info --output=json", "info --backing-chain", "map", "map --output=json"])
def test_commands_that_read_import_only_what_they_need(places: dict[str, Path], command: str) -> None:
    args = ["fusedisk", *command.split(), str(places["overlay"])]
    run = f"import sys\nsys.argv = {args!r}\nfrom fusedisk.cli.entry import main\ntry: main()\nexcept SystemExit: pass"
    imported = _imported_by(run)
    assert "fusedisk.drivers.format.qcow2.driver" in imported
    assert not imported & NOT_FOR_READING


def test_importing_the_package_imports_nothing_else_of_it() -> None:
    assert {name for name in _imported_by("import fusedisk") if name.startswith("fusedisk")} == {"fusedisk"}


def test_the_version_is_the_projects() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'\nversion = "{package.__version__}"\n' in text
    assert fusedisk("--version").out == f"fusedisk {package.__version__}\n"


def test_help_lists_every_command_with_examples() -> None:
    out = fusedisk("--help").out
    for name, text in main.COMMANDS.items():
        assert f"  {name}" in out
        assert text in out
    assert "Examples:" in out


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_teaches_by_example(name: str) -> None:
    done = fusedisk(name, "--help")
    assert done.code == 0
    assert f"fusedisk {name}" in done.out.split("Examples:")[1], "an example that can be copied"
    assert fusedisk(name, "-h").out == done.out
    assert max(map(len, done.out.splitlines())) <= 120


def test_every_option_has_its_help() -> None:
    for name in main.COMMANDS:
        command = main.cli.get_command(click.Context(main.cli), name)
        assert command is not None
        for param in command.params:
            assert not isinstance(param, click.Option) or param.help, f"{name} {param.opts}"


@pytest.mark.parametrize(
    ("typed", "meant"), [("inof", "info"), ("crate", "create"), ("unmount", "umount"), ("lst", "list")]
)
def test_a_mistyped_command_is_suggested(typed: str, meant: str) -> None:
    done = fusedisk(typed, "x")
    assert done.code == 2
    assert done.err.splitlines() == [
        f"fusedisk: there is no command '{typed}', did you mean '{meant}'?",
        "Try 'fusedisk --help' for help.",
    ]


def test_an_unknown_command_names_the_known_ones() -> None:
    done = fusedisk("frobnicate")
    assert done.code == 2
    assert f"there are {', '.join(main.COMMANDS)}." in done.err


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (["info"], "Missing argument 'IMAGE'."),
        (["info", "--bakcing-chain", "x"], "No such option '--bakcing-chain'"),
        (["info", "--output", "xml", "x"], "'xml' is not one of 'human', 'json'"),
        (["mount"], "Missing argument 'IMAGE...'."),
        (["mount", "a"], "Missing argument 'MOUNTPOINT'."),
        (["mount", "--overlay"], "Missing argument 'IMAGE...'."),
        (["create"], "Missing argument 'FILE'."),
        (["amend", "-o", "compat=v3"], "Missing argument 'IMAGE'."),
        (["measure"], "Missing argument 'IMAGE' or option '--size'."),
        (["completion"], "Missing argument 'SHELL'."),
        (["completion", "tcsh"], "'tcsh' is not one of 'bash', 'zsh', 'fish'"),
        (["info", "a", "b"], "unexpected extra argument"),
    ],
)
def test_wrong_usage(args: list[str], sentence: str) -> None:
    done = fusedisk(*args)
    assert done.code == 2
    assert done.out == ""
    first, second = done.err.splitlines()
    assert first.startswith("fusedisk: ")
    assert sentence in first
    assert second.startswith("Try 'fusedisk")


@pytest.mark.parametrize("command", ["umount", "detach"])
@pytest.mark.parametrize("timeout", ["nan", "-nan", "inf", "-inf", "infinity", "1e999", "-1", "-0.001", "soon", ""])
def test_a_time_that_is_none_is_wrong_usage(command: str, timeout: str, tmp_path: Path) -> None:
    done = fusedisk(command, f"--timeout={timeout}", tmp_path / "none")
    assert (done.code, done.out) == (2, "")
    assert f"'--timeout': it is '{timeout}', but must be a number of seconds," in done.err


@pytest.mark.parametrize("timeout", ["0", "1.5", "1e-3", "1e300"])
def test_a_time_may_be_short_or_long(timeout: str, tmp_path: Path) -> None:
    done = fusedisk("umount", "--timeout", timeout, tmp_path / "none")
    assert done == (1, "", f"fusedisk: nothing is mounted at '{tmp_path}/none'.\n")


def test_no_arguments_show_the_help() -> None:
    done = fusedisk()
    assert done.code == 2
    assert done.out == ""
    assert done.err == fusedisk("--help").out


# --- the border -----------------------------------------------------------------------------------------


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> list[BaseException]:
    """``fusedisk info x`` raises the one exception in the list."""
    causes: list[BaseException] = []

    @click.command()
    @click.argument("image")
    def command(image: str) -> None:
        raise causes[0]

    from fusedisk.cli import info

    monkeypatch.setattr(info, "command", command)
    return causes


def test_an_expected_error_is_one_sentence(raising: list[BaseException]) -> None:
    raising.append(ImageError("the image is odd."))
    assert fusedisk("info", "x") == (1, "", "fusedisk: the image is odd.\n")


def test_an_expected_error_inside_groups_is_the_same_sentence(raising: list[BaseException]) -> None:
    inner = ImageError("the image is odd.")
    raising.append(BaseExceptionGroup("outer", [ExceptionGroup("inner", [inner])]))
    assert fusedisk("info", "x") == (1, "", "fusedisk: the image is odd.\n")


def test_several_expected_errors_are_all_told(raising: list[BaseException]) -> None:
    raising.append(ExceptionGroup("both", [OptionError("one."), ImageError("two.")]))
    assert fusedisk("info", "x") == (1, "", "fusedisk: one.\nfusedisk: two.\n")


def test_verbose_tells_where_it_happened(raising: list[BaseException]) -> None:
    raising.append(FusediskError("no.").at("disk", "read", 512, 1024))
    assert fusedisk("-v", "info", "x").err == "fusedisk: no. (node 'disk', read of 1024 bytes at 512)\n"


def test_a_bug_is_told_as_one(raising: list[BaseException]) -> None:
    raising.append(ExceptionGroup("both", [OptionError("one."), ZeroDivisionError("division by zero")]))
    done = fusedisk("info", "x")
    assert done.code == 70
    assert done.err.startswith("fusedisk: internal error: ZeroDivisionError: division by zero; run with -v")
    assert len(done.err.splitlines()) == 1


def test_verbose_shows_the_traceback_of_a_bug(raising: list[BaseException]) -> None:
    raising.append(ZeroDivisionError("division by zero"))
    done = fusedisk("-v", "info", "x")
    assert done.code == 70
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1] == "fusedisk: internal error: ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    "cause",
    [KeyboardInterrupt(), BaseExceptionGroup("both", [KeyboardInterrupt(), OptionError("one.")]), click.Abort()],
)
def test_an_interrupt_is_quiet(raising: list[BaseException], cause: BaseException) -> None:
    raising.append(cause)
    assert fusedisk("info", "x") == (130, "", "")


def test_an_exit_keeps_its_code(raising: list[BaseException]) -> None:
    raising.append(SystemExit(3))
    assert fusedisk("info", "x").code == 3


# --- as a user runs it ----------------------------------------------------------------------------------


def test_as_a_module(tmp_path: Path) -> None:
    make_sparse_raw(tmp_path / "x.raw", MIB)
    done = fusedisk_process("info", "x.raw", cwd=tmp_path)
    assert done.code == 0
    assert done.out.startswith("image:")
    assert done.err == ""


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", 64 * MIB, *((at * 8192, 1) for at in range(8000)))
    process = subprocess.Popen(
        process_command("map", "-f", "raw", "--output", "json", image),
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(1) == b"["
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 141


PRINTING = [
    "--help",
    "--version",
    "list",
    "list --output json",
    "map --help",
    "info {image}",
    "map {image}",
    "map --output json {image}",
    "check {image}",
    "check {leaking}",
    "snapshot {image}",
    "measure --size 1M",
    "create --force {image}.new 1M",
    "resize {image} +1M",
    "create -o help",
    "completion bash",
]
"""A command line of every kind that prints."""


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What :data:`PRINTING` speaks of."""
    folder = tmp_path_factory.mktemp("printing")
    image = make_qcow2(folder / "x.qcow2", MIB)
    qemu_img("snapshot", "-c", "then", image)
    leaking = make_qcow2(folder / "leaking.qcow2", MIB, "write 0 64k")
    with open(leaking, "r+b") as file:
        file.truncate(os.path.getsize(leaking) + 65536)
        file.seek(0x20000 + 2 * 6)  # the refcount of a cluster that nothing refers to
        file.write(b"\0\1")
    overlay = make_qcow2(folder / "overlay.qcow2", None, backing=image)
    return {"image": image, "leaking": leaking, "overlay": overlay}


@pytest.mark.parametrize("line", PRINTING)
def test_an_output_that_is_full_is_an_error(places: dict[str, Path], line: str) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    command = process_command(*line.format(**places).split())
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, env=process_environment(), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "fusedisk: writing to standard output failed: No space left on device.\n"
    assert done.returncode == 1


@pytest.mark.parametrize("line", PRINTING)
def test_an_output_that_nobody_reads_ends_every_command_alike(places: dict[str, Path], line: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = process_command(*line.format(**places).split())
    done = subprocess.run(command, env=process_environment(), stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_list_of_mounts_that_nobody_reads_ends_as_all_do(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unread(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    record = MountRecord("/mnt", os.getpid(), "", [ExportRecord("x", "/x.raw", "raw", 512, False)])
    from fusedisk.cli import list as listing

    monkeypatch.setattr(listing, "_gather", lambda: [listing.describe(record)])
    assert "/x.raw" in fusedisk("list").out
    with contextlib.redirect_stdout(Unread()):
        assert main.run(["list"]) == 141


@pytest.mark.parametrize("verbose", [[], ["-v"]])
def test_an_error_that_cannot_be_told_is_one_all_the_same(verbose: list[str], tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    for args, code in ((["info", tmp_path / "none"], 1), (["info", "--none"], 2)):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(process_command(*verbose, *args), env=process_environment(), stderr=full)
        assert done.returncode == code


def test_a_signal_ends_it_quietly(tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", 256 * MIB, *((at * 8192, 1) for at in range(32000)))
    process = subprocess.Popen(
        process_command("map", "-f", "raw", "--output", "json", image),
        env=process_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"["
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == b""


@pytest.mark.parametrize("module", ["click", "fusedisk.cli.main"])
def test_an_interrupt_while_it_is_imported_is_quiet(module: str, tmp_path: Path) -> None:
    interrupt = (
        "import signal, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from fusedisk.cli.entry import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", interrupt, "list"], env=process_environment(), capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_as_good_as_none(closed: str, tmp_path: Path) -> None:
    image = make_sparse_raw(tmp_path / "x.raw", MIB)
    for args, code in ((["info", image], 0), (["list"], 0), (["info", tmp_path / "none"], 1), (["--version"], 0)):
        command = shlex.join(process_command(*args))
        done = subprocess.run(["sh", "-c", f"{command} {closed}"], env=process_environment(), capture_output=True)
        assert done.returncode == code, done
        assert b"Traceback" not in done.stderr
        assert b"internal" not in done.stderr


def test_file_names_that_are_no_text(tmp_path: Path) -> None:
    image = Path(os.fsdecode(os.fsencode(tmp_path) + b"/odd\xff.raw"))
    make_sparse_raw(image, MIB)
    for environment in ({}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
        human = fusedisk_process("info", image, env=environment)
        assert human.code == 0, human.err
        assert str(image) in human.out
    assert fusedisk_process("info", "--output", "json", image).json["filename"] == str(image)
    missing = fusedisk_process("info", f"{image}x")
    assert missing.err == f"fusedisk: Could not open '{image}x': No such file or directory\n"

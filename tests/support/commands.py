"""Running fusedisk's command line: in this process, or as a user does."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fusedisk.cli.main import run

ROOT = Path(__file__).resolve().parent.parent.parent
TIMEOUT = 120.0


class Outcome(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Its output, which must be one JSON document of a command that went well."""
        assert self.code == 0, self.err
        return json.loads(self.out)


def fusedisk(*args: str | os.PathLike[str]) -> Outcome:
    """Run a command line in this process, the error border included."""
    out, err = io.StringIO(), io.StringIO()
    with _logging_kept(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([os.fspath(arg) for arg in args])
    return Outcome(code, out.getvalue(), err.getvalue())


def fusedisk_process(
    *args: str | os.PathLike[str], cwd: Path | None = None, env: dict[str, str] | None = None, stdin: str = ""
) -> Outcome:
    """Run ``python -m fusedisk`` with ``args`` and wait for it; file names in its output may hold any byte."""
    done = subprocess.run(
        process_command(*args),
        cwd=cwd,
        env=process_environment() | (env or {}),
        input=stdin.encode(),
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )
    return Outcome(done.returncode, os.fsdecode(done.stdout), os.fsdecode(done.stderr))


def process_command(*args: str | os.PathLike[str]) -> list[str]:
    """The command line that runs fusedisk with ``args``."""
    return [sys.executable, "-m", "fusedisk", *map(os.fspath, args)]


def process_environment() -> dict[str, str]:
    """An environment in which :func:`process_command` finds this checkout, from any directory."""
    return os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "110", "LC_ALL": "C.UTF-8"}


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """The command sets logging up for itself; undo that."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

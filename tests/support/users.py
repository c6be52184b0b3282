"""Another user than root, for what must work without root."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT

BECOME = ["setpriv", "--reuid", "nobody", "--regid", "nogroup", "--clear-groups"]
_READ_ANYTHING = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
"""Where this Python lies below root's home, as with pyenv: the user may read everything, but write nothing more."""


class User:
    """Another user, with a directory of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.entry = pwd.getpwnam("nobody")
        self.become = BECOME
        os.chown(home, self.entry.pw_uid, self.entry.pw_gid)
        if self._reach().returncode:
            self.become = [*BECOME, *_READ_ANYTHING]
            if (done := self._reach()).returncode:
                pytest.skip(f"another user cannot reach this Python or /dev/fuse: {done.stderr}")

    def _reach(self) -> subprocess.CompletedProcess[str]:
        return self.run(
            sys.executable, "-c", "import os, fusedisk, pyfuse3; os.open('/dev/fuse', os.O_RDWR)", check=False
        )

    def start(self, *command: str | Path, **keywords: Any) -> subprocess.Popen[str]:
        """Start a command as that user."""
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8", "HOME": str(self.home)}
        full = [*self.become, "--", *map(str, command)]
        return subprocess.Popen(full, cwd=self.home, env=environment, text=True, **keywords)

    def run(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command as that user."""
        process = self.start(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=60)
        done = subprocess.CompletedProcess(command, process.returncode, out, err)
        assert not check or done.returncode == 0, done
        return done

    def fusedisk(self, *args: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run fusedisk as that user."""
        return self.run(sys.executable, "-m", "fusedisk", *args, check=check)

"""Adds manual pages and completion scripts to the package when it is built: see fusedisk/cli/manual.py."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CustomBuildHook(BuildHookInterface):
    """Called by hatchling for each wheel, editable ones included."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Write the files, and name them."""
        sys.path.insert(0, self.root)
        from fusedisk.cli.manual import write

        build_data["shared_data"].update(write(self._folder))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the files: they are in the wheel now."""
        shutil.rmtree(self._folder)

    @property
    def _folder(self) -> Path:
        return Path(self.directory) / "shared"

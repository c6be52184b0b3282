"""``python -m fusedisk``."""

from __future__ import annotations

from fusedisk.cli.main import main

main()

"""``python -m fusedisk``."""

from __future__ import annotations

from fusedisk.cli.entry import main

main()

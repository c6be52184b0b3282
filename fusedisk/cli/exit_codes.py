"""What every command's exit status means; ``check`` and ``mount.fuse.fusedisk`` have codes of their own besides."""

from __future__ import annotations

FAILED = 1
USAGE = 2
"""Wrong usage, or wrong values on the command line."""
BUG = 70
"""A bug in fusedisk (EX_SOFTWARE)."""
INTERRUPTED = 130
BROKEN_PIPE = 141
"""The reader of our output went away."""

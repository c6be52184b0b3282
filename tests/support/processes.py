"""Other processes that use an image."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import require_tool


@contextlib.contextmanager
def qemu_io_holding(image: Path, *options: str) -> Iterator[None]:
    """A qemu-io that has ``image`` open for writing while the block runs."""
    process = subprocess.Popen(
        [require_tool("qemu-io"), *options, image], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=0
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        # An answer to a command tells that the image is open.
        process.stdin.write("length\n")
        process.stdin.flush()
        answer = ""
        while "iB" not in answer and "bytes" not in answer:
            letter = process.stdout.read(1)
            assert letter, f"qemu-io ended: {answer}"
            answer += letter
        yield
        process.stdin.write("quit\n")
        process.stdin.close()

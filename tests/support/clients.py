"""A process that uses files for a test, as the test's own process must not use what it serves itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from typing import Any

import trio

_PROGRAM = """
import errno, json, mmap, os, sys, threading
names = {"os": os, "mmap": mmap, "threading": threading}
for line in sys.stdin:
    source = json.loads(line)
    try:
        try:
            code = compile(source, "<test>", "eval")
        except SyntaxError:
            exec(source, names)
            found = None
        else:
            found = eval(code, names)
    except OSError as exc:
        found = "error", exc.errno
    print(repr(found), flush=True)
"""


class Client:
    """Runs Python in a process of its own, one piece after the other; names stay."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    async def __call__(self, source: str) -> Any:
        """The value of an expression, None for statements; ``("error", errno)`` for an OSError."""
        with trio.fail_after(60):
            return await trio.to_thread.run_sync(self._run, source, abandon_on_cancel=True)

    def _run(self, source: str) -> Any:
        import json

        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(source) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise EOFError(f"the client ended: {self.process.wait(60)}")
        return ast.literal_eval(line)

    async def close(self) -> None:
        """End the process, and with it all that it has open."""
        self.process.kill()
        await trio.to_thread.run_sync(self.process.communicate)

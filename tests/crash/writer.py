"""A process that writes into images until it is killed, and keeps a journal of what was asked and answered.

``python -m tests.crash.writer`` reads jobs, one JSON object a line, runs each in a forked child of its own and prints
its process id, then ``ended`` when it is gone. The journal is written by plain system calls, so whatever is in it
survives the child; a byte on the job's pipe tells of each answered request.
"""

from __future__ import annotations

import json
import os
import random
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import trio

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.gate import Gate
from fusedisk.block.graph.graph import Graph
from fusedisk.drivers.table import DRIVERS
from tests.crash.replay import SECTOR

_RECORD = struct.Struct("<4sIQQ")
WRITERS = 3
CLUSTER = 4096


class Record(NamedTuple):
    """One line of the journal: ``what`` is writ, zero, size or flsh for a request, done for its answer."""

    what: str
    number: int
    offset: int = 0
    length: int = 0

    def encode(self) -> bytes:
        return _RECORD.pack(self.what.encode(), self.number, self.offset, self.length)


def read_journal(path: Path) -> Iterator[Record]:
    """All records; one that was cut short was not finished, so what it tells of did not begin."""
    data = path.read_bytes()
    for start in range(0, len(data) // _RECORD.size * _RECORD.size, _RECORD.size):
        what, number, offset, length = _RECORD.unpack_from(data, start)
        yield Record(what.decode(), number, offset, length)


def content(number: int, length: int) -> bytes:
    """What request ``number`` writes."""
    return b"".join(b"kill%08d%08d---" % (number, index) * 22 + b"....seen" for index in range(-(-length // SECTOR)))[
        :length
    ]


class Writer:
    """The requests of one job."""

    def __init__(self, backend: Backend, journal: int, pipe: int, random_: random.Random) -> None:
        self.backend = backend
        self.random = random_
        self._journal = journal
        self._pipe = pipe
        self._number = 0

    async def write(self, lane: int) -> None:
        """Requests without end, into sectors of its own; the lanes share clusters."""
        random_ = self.random
        while True:
            clusters = self.backend.length // CLUSTER
            first = random_.randrange(clusters) * CLUSTER
            what = random_.choice(("writ", "writ", "writ", "writ", "writ", "zero", "flsh"))
            offset, length = first + lane * (CLUSTER // 4), CLUSTER // 4
            await self._request(what, offset, length)
            await trio.lowlevel.checkpoint()

    async def clear(self) -> None:
        """The last quarters of the first clusters, written and zeroed; and resizes."""
        random_ = self.random
        while True:
            length = random_.randrange(1, 6) * CLUSTER // 8
            offset = random_.randrange(8) * CLUSTER + 3 * CLUSTER // 4
            what = random_.choice(("writ", "zero", "flsh"))
            await self._request(what, offset, min(length, CLUSTER // 4))
            if random_.random() < 0.02:
                await self._request("size", 0, self.backend.length + 16 * CLUSTER)
            await trio.lowlevel.checkpoint()

    async def _request(self, what: str, offset: int, length: int) -> None:
        self._number += 1
        number = self._number
        os.write(self._journal, Record(what, number, offset, length).encode())
        match what:
            case "writ":
                await self.backend.write(offset, content(number, length))
            case "zero":
                await self.backend.write_zeroes(offset, length, may_unmap=bool(number % 2))
            case "size":
                await self.backend.truncate(length)
            case "flsh":
                await self.backend.flush()
        os.write(self._journal, Record("done", number).encode())
        os.write(self._pipe, b".")


async def work(image: str, journal: str, pipe: str, seed: int) -> None:
    """Write until killed."""
    graph = Graph(DRIVERS, Gate(allow_any=True))
    backend = await graph.open_backend(
        {"driver": "qcow2", "file": {"driver": "file", "filename": image}}, writable=True
    )
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    writer = Writer(backend, os.open(journal, flags, 0o600), os.open(pipe, os.O_WRONLY), random.Random(seed))
    async with trio.open_nursery() as nursery:
        for lane in range(WRITERS):
            nursery.start_soon(writer.write, lane)
        nursery.start_soon(writer.clear)


def main() -> None:
    """Serve jobs from standard input."""
    for line in sys.stdin:
        job = json.loads(line)
        process = os.fork()
        if not process:
            trio.run(work, job["image"], job["journal"], job["pipe"], job["seed"])
            os._exit(1)
        print(process, flush=True)
        os.waitpid(process, 0)
        print("ended", flush=True)


if __name__ == "__main__":
    main()

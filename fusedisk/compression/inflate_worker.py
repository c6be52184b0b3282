"""A process that inflates for :mod:`fusedisk.compression.inflate_pool`, and ends with it.

It gets two descriptors: a socket, and memory that it shares with the pool. It sends READY and then answers messages. A
message is an array of unsigned 32-bit numbers: the codec (its index in CODECS); the inflated size of each piece; where
in the shared memory the compressed data begins; where to put the inflated pieces, one after the other; then for each
piece the offset, relative to that beginning, and the length of its compressed data. The answer has one byte for each
piece: 1 if it was inflated. The user of the pool finds out what is wrong with the others.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from contextlib import suppress
from itertools import islice

from fusedisk.compression.inflate import CODECS, InflateWithin

READY = b"ready"
MESSAGE_SIZE, ANSWER_SIZE = 96 << 10, 6 << 10
"""Bytes of the longest message and the longest answer: a batch of pieces of 512 bytes."""


def work(connection: socket.socket, memory: memoryview) -> None:
    """Answer until the other end is closed."""
    inflaters: dict[int, InflateWithin] = {}
    while message := connection.recv(MESSAGE_SIZE):
        numbers = iter(memoryview(message).cast("I"))
        codec, size, start, place = islice(numbers, 4)
        inflate = inflaters.get(codec)
        if inflate is None:
            inflate = inflaters[codec] = list(CODECS.values())[codec]().within(memory)
        done = bytearray()
        for offset, length in zip(numbers, numbers, strict=True):
            done.append(inflate(start + offset, length, place, size))
            place += size
        connection.send(done)


def main() -> None:
    """Work with the descriptors that the arguments name."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with suppress(OSError):
        # The process that waits for the result must be able to preempt this one.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    memory = memoryview(mmap.mmap(int(sys.argv[2]), 0))
    with suppress(ConnectionError):
        connection.send(READY)
        work(connection, memory)
    # There is nothing to clean up, and the pool may be waiting.
    os._exit(0)


if __name__ == "__main__":
    main()

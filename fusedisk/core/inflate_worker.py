"""A process that inflates for :mod:`fusedisk.core.inflate_pool`, and ends with it.

It has two descriptors: a socket, and memory that it shares with the pool. It sends READY, and then answers messages. A
message is an array of unsigned 32-bit numbers: the codec, by its place in CODECS; then for each piece the offset and
length of its compressed data in that memory, and the offset and length of what it inflates to. The answer has a byte
for each piece, 1 where it is there; what is wrong with the others is for the pool's user to find out.
"""

from __future__ import annotations

import mmap
import os
import socket
import sys
from contextlib import suppress

from fusedisk.core.inflate import CODECS, InflateError, InflateInto

READY = b"ready"
MESSAGE_SIZE, ANSWER_SIZE = 96 << 10, 6 << 10
"""Bytes of the longest message and the longest answer: a batch of pieces of 512 bytes."""


def work(connection: socket.socket, memory: memoryview) -> None:
    """Answer until the other end is closed."""
    inflaters: dict[int, InflateInto] = {}
    while message := connection.recv(MESSAGE_SIZE):
        numbers = iter(memoryview(message).cast("I"))
        codec = next(numbers)
        inflate = inflaters.get(codec)
        if inflate is None:
            inflate = inflaters[codec] = list(CODECS.values())[codec]().into
        done = bytearray()
        for source, length, place, size in zip(*[numbers] * 4, strict=True):
            try:
                inflate(memory[source : source + length], memory[place : place + size])
            except InflateError:
                done.append(0)
            else:
                done.append(1)
        connection.send(done)


def main() -> None:
    """Work with the descriptors that the arguments name."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    with suppress(OSError):
        # Whoever waits for what this makes is to be woken up for it.
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    memory = memoryview(mmap.mmap(int(sys.argv[2]), 0))
    with suppress(ConnectionError):
        connection.send(READY)
        work(connection, memory)
    # There is nothing to tidy up, and somebody may be waiting.
    os._exit(0)


if __name__ == "__main__":
    main()

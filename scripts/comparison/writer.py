"""``python -m scripts.comparison.writer IMAGE BLOCK FLUSH-EVERY FORMAT``: write where stdin says, through the library.

A line of stdin is an offset. Prints the seconds that it took, opening and closing left out.
"""

from __future__ import annotations

import sys
import time

import trio

import fusedisk


async def write(image: str, block: int, flush_every: int, format: str, offsets: list[int]) -> float:
    """Write ``block`` bytes at each offset, and flush after every ``flush_every`` writes (0: never)."""
    data = b"\x05" * block
    async with fusedisk.open(image, format=format, writable=True) as disk:
        start = time.perf_counter()
        for number, offset in enumerate(offsets, 1):
            await disk.write(offset, data)
            if flush_every and number % flush_every == 0:
                await disk.flush()
        return time.perf_counter() - start


if __name__ == "__main__":
    image, block, flush_every, format = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    print(trio.run(write, image, block, flush_every, format, [int(line) for line in sys.stdin]))

"""Random requests with an oracle: what the disk must hold afterwards."""

from __future__ import annotations

import random

from fusedisk.block.graph.backend import Backend


def random_bytes(rng: random.Random, length: int) -> bytes:
    """``length`` bytes that are different in every request and hardly ever zero."""
    return rng.randbytes(length) if length < 64 else (rng.randbytes(61) * (length // 61 + 1))[:length]


def random_range(rng: random.Random, size: int, longest: int) -> tuple[int, int]:
    """Offset and length of a range in a disk of ``size`` bytes: mostly odd, sometimes round, sometimes empty."""
    length = min(rng.choice((0, 1, 7, 511, 512, 513, 4096, rng.randrange(1, longest + 1))), size)
    offset = rng.randrange(size - length + 1)
    if rng.random() < 0.3:
        offset = offset // 512 * 512
    return offset, length


async def random_request(rng: random.Random, backend: Backend, oracle: bytearray, longest: int) -> None:
    """One read, write or write-zeroes; the read is compared with ``oracle``, the others change it."""
    offset, length = random_range(rng, len(oracle), longest)
    kind = rng.choice(("read", "write", "write", "zeroes"))
    if kind == "read":
        found = await backend.read(offset, length)
        assert found == oracle[offset : offset + length], f"read of {length} at {offset}"
    elif kind == "write":
        content = random_bytes(rng, length)
        await backend.write(offset, content)
        oracle[offset : offset + length] = content
    else:
        await backend.write_zeroes(offset, length, may_unmap=rng.random() < 0.5)
        oracle[offset : offset + length] = bytes(length)

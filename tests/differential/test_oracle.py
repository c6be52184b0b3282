"""The judges of the random runs must see what is wrong."""

from __future__ import annotations

import pytest

from tests.differential.oracle import Mismatch, Oracle, Request, _unexplained


@pytest.mark.parametrize(
    ("found", "candidates", "expected"),
    [
        (b"abc", [(0, b"abc")], None),
        (b"abc", [(0, b"xbc")], 0),
        (b"abc", [(0, b"xbc"), (-1, b"zax")], None),
        (b"abc", [(0, b"ab")], 2),
        (b"abc", [(1, b"bcdef"), (-3, b"xyza")], None),
        (b"abc", [(1, b"xcdef"), (-3, b"xyza")], 1),
        (b"\0\0", [(0, b"\0\0")], None),
        (b"", [], None),
        (b"a", [], 0),
    ],
)
def test_unexplained(found: bytes, candidates: list[tuple[int, bytes]], expected: int | None) -> None:
    assert _unexplained(found, candidates) == expected


class _Lying:
    """A backend that does what it wants."""

    def __init__(self, content: bytes) -> None:
        self.content = bytearray(content)
        self.length = len(content)

    async def read(self, offset: int, length: int) -> bytearray:
        return self.content[offset : offset + length]

    async def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    async def write_zeroes(self, offset: int, length: int, *, may_unmap: bool) -> None:
        pass

    async def discard(self, offset: int, length: int) -> None:
        self.content[offset : offset + length] = b"old content"[:length]


async def test_lost_zeroes_and_old_data_are_seen() -> None:
    for request in (Request("zeroes", 1, 3), Request("discard", 1, 3)):
        for run in (Oracle.run_apart, Oracle.run_overlapping):
            oracle = Oracle(((0, 10),), [bytearray(b"0123456789")], 10)
            backend = _Lying(b"0123456789")
            if request.kind == "discard" or run is Oracle.run_overlapping:
                with pytest.raises(Mismatch, match="byte 1 is"):
                    await run(oracle, backend, [request])  # type: ignore[arg-type]
            else:
                await run(oracle, backend, [request])  # type: ignore[arg-type]
                with pytest.raises(Mismatch, match="at 1 there is 31"):
                    await oracle.compare_backend(backend)  # type: ignore[arg-type]


async def test_a_wrong_read_is_seen() -> None:
    oracle = Oracle(((0, 10),), [bytearray(b"0123456789")], 10)
    with pytest.raises((Mismatch, ExceptionGroup)):
        await oracle.run_apart(_Lying(b"01234x6789"), [Request("read", 3, 4)])  # type: ignore[arg-type]

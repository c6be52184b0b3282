"""libdeflate called directly: streams to where they are wanted, and their first parts."""

from __future__ import annotations

import random
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedisk.compression import inflate, libdeflate
from fusedisk.compression.inflate import InflateError, raw_deflate, zstd
from fusedisk.compression.libdeflate import PREFIX_MORE, Libdeflate

SIZE = 64 << 10


def deflated(content: bytes, level: int = 6) -> memoryview:
    packer = zlib.compressobj(level, zlib.DEFLATED, -12)
    return memoryview(bytearray(packer.compress(content) + packer.flush()))


def text(seed: int, size: int = SIZE) -> bytes:
    rng = random.Random(seed)
    words = [rng.randbytes(rng.randrange(2, 12)) for _ in range(500)]
    return b"".join(rng.choices(words, k=size))[:size]


def whole(library: Libdeflate, data: memoryview, size: int = SIZE) -> bytes | None:
    """What the data inflates to, in a memory with its target behind it and something around both."""
    place = 5 + len(data) + 7
    memory = bytearray(b"\xaa" * (place + size + 9))
    memory[5 : 5 + len(data)] = data
    there = library.within(memoryview(memory))(5, len(data), place, size)
    assert memory[:5] + memory[place - 7 : place] + memory[-9:] == b"\xaa" * 21, "nothing else is written to"
    return bytes(memory[place:-9]) if there else None


@pytest.fixture
def library() -> Libdeflate:
    found = libdeflate.libdeflate()
    assert found is not None, "the package 'deflate' has libdeflate's functions"
    return found


def test_a_stream_inflates_to_where_it_is_wanted(library: Libdeflate) -> None:
    content = text(1)
    assert whole(library, deflated(content)) == content
    assert whole(library, memoryview(bytes(deflated(content)) + b"what follows")) == content


def test_other_lengths_and_damage_are_told(library: Libdeflate) -> None:
    content = text(2)
    data = deflated(content)
    for size in (SIZE - 1, SIZE + 1):
        assert whole(library, data, size) is None
    assert whole(library, data[:100]) is None
    assert whole(library, data[:0]) is None
    assert whole(library, memoryview(b"\xff" * 100)) is None


def test_nothing_beyond_the_memory_is_touched(library: Libdeflate) -> None:
    into = library.within(memoryview(bytearray(1000)))
    for offset, length, place, size in ((900, 101, 0, 100), (0, 100, 900, 101), (2000, 1, 0, 100)):
        with pytest.raises(AssertionError):
            into(offset, length, place, size)


def test_a_part_takes_no_more_than_a_part(library: Libdeflate) -> None:
    content = text(3)
    data = deflated(content)
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    assert whole(library, data) is None, "it is damaged"
    for size in (1, 4096, SIZE // 4):
        assert library.prefix(data, size) == content[:size]


def test_a_part_that_ends_before_a_stored_block_is_another_way_s(library: Libdeflate) -> None:
    stored = random.Random(4).randbytes(44 << 10)
    content = text(4, 20_000) + stored
    packer = zlib.compressobj(6, zlib.DEFLATED, -12)
    packed = packer.compress(content[:20_000]) + packer.flush(zlib.Z_SYNC_FLUSH)
    packed += b"\1" + len(stored).to_bytes(2, "little") + (len(stored) ^ 0xFFFF).to_bytes(2, "little") + stored
    data = memoryview(bytearray(packed))
    assert whole(library, data, len(content)) == content
    assert library.prefix(data, 10_000) == content[:10_000]
    found = {size: library.prefix(data, size) for size in range(15_000, 40_000, 500)}
    assert None in found.values(), "libdeflate takes nothing of a stored block that has no room"
    assert all(part is None or part == content[:size] for size, part in found.items())
    assert library.prefix(deflated(content, 0), 30_000) is None, "all of it is stored"


def test_a_part_of_what_is_shorter_is_another_way_s(library: Libdeflate) -> None:
    assert library.prefix(deflated(text(5, 4096)), 8192) is None
    assert library.prefix(deflated(text(5, 4096)), 4096) is None
    assert library.prefix(deflated(text(5, 4096 + PREFIX_MORE)), 4096) is None


def cut_off(literals: int) -> memoryview:
    """A stream that ends amid a block in which zeroes are the longest match, of two bits."""
    bits: list[int] = []

    def number(value: int, width: int) -> None:
        bits.extend(value >> place & 1 for place in range(width))

    def code(text: str) -> None:
        bits.extend(map(int, text))

    def unused(count: int) -> None:
        while count:
            part = min(count, 138)
            code("0")
            number(part - 11, 7)
            count -= part

    for value, width in ((1, 1), (2, 2), (29, 5), (0, 5), (14, 4)):
        number(value, width)
    lengths = {18: 1, 1: 2, 2: 2}
    for symbol in (16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1):
        number(lengths.get(symbol, 0), 3)
    unused(ord("A"))
    code("11")
    unused(256 - ord("A") - 1)
    code("11")
    unused(28)
    code("10")  # length 258
    code("10")  # distance 1
    for _ in range(literals):
        code("10")
    bits += [0] * (-len(bits) % 8)
    return memoryview(bytearray(sum(bits[at + place] << place for place in range(8)) for at in range(0, len(bits), 8)))


def test_what_libdeflate_makes_up_behind_the_end_of_a_stream_is_no_part(library: Libdeflate) -> None:
    most = 0
    for literals in range(1, 10):
        data = cut_off(literals)
        content = zlib.decompressobj(-15).decompress(data)
        assert content.startswith(b"A" * literals)
        # So far it claims that there is more than it has room for.
        there = max(size for size in range(1, 6000) if library._call(data, bytearray(size)) == 3)
        most = max(most, there - len(content))
        for size in (1, literals, len(content) - 1, len(content)):
            assert library.prefix(data, size) in (None, content[:size])
        for size in range(len(content) + 1, len(content) + 2000):
            assert library.prefix(data, size) is None
    assert 1000 < most < PREFIX_MORE - 500, "the gap is wide enough"


blocks = st.one_of(
    st.binary(min_size=1, max_size=3000),
    st.builds(lambda seed, size: text(seed, size), st.integers(0, 50), st.integers(1, 20_000)),
    st.builds(lambda seed, size: random.Random(seed).randbytes(size), st.integers(0, 50), st.integers(1, 20_000)),
    st.builds(lambda byte, size: bytes([byte]) * size, st.integers(0, 255), st.integers(1, 30_000)),
)


@settings(max_examples=200)
@given(
    st.lists(st.tuples(blocks, st.sampled_from((zlib.Z_NO_FLUSH, zlib.Z_FULL_FLUSH))), min_size=1, max_size=8),
    st.integers(0, 9),
    st.lists(st.integers(1, 1 << 16), min_size=1, max_size=8),
)
def test_no_part_is_ever_wrong(parts: list[tuple[bytes, int]], level: int, sizes: list[int]) -> None:
    library = libdeflate.libdeflate()
    assert library is not None
    packer = zlib.compressobj(level, zlib.DEFLATED, -12)
    packed = b"".join(packer.compress(part) + packer.flush(flush) for part, flush in parts) + packer.flush()
    content = b"".join(part for part, _ in parts)
    data = memoryview(bytearray(packed))
    for size in sizes:
        if size <= len(content):
            found = library.prefix(data, size)
            assert found is None or found == content[:size]
        else:
            assert library.prefix(data, size) is None
    assert whole(library, data, len(content)) == content


def test_threads_do_not_share_a_decompressor(library: Libdeflate) -> None:
    contents = [text(seed) for seed in range(8)]
    data = [deflated(content) for content in contents]

    def work(number: int) -> bool:
        return library.prefix(data[number % 8], SIZE // 2) == contents[number % 8][: SIZE // 2]

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(400)))


def test_everybody_does_without_where_it_is_kept_private(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AttributeError):
        Libdeflate("libc.so.6")
    with pytest.raises(OSError):
        Libdeflate("there-is-no-such-library.so")
    monkeypatch.setattr(inflate, "libdeflate", lambda: None)
    codec = raw_deflate(12)
    content = text(6)
    data = deflated(content)
    memory = memoryview(bytearray(SIZE) + data)
    assert codec.within(memory)(SIZE, len(data), 0, SIZE)
    assert memory[:SIZE] == content
    assert codec.inflate(deflated(content), SIZE) == content
    assert codec.prefix(deflated(content), 100) is None


@pytest.mark.parametrize("codec", [raw_deflate(12), zstd()], ids=["deflate", "zstd"])
def test_what_does_not_inflate_is_an_error(codec: inflate.Codec) -> None:
    for data in (b"\xff" * 100, b"\x00" * 100, b"x"):
        with pytest.raises(InflateError):
            codec.inflate(data, SIZE)
        assert not codec.within(memoryview(bytearray(SIZE) + data))(SIZE, len(data), 0, SIZE)
        assert codec.prefix(memoryview(bytearray(data)), 4096) is None

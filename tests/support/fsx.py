"""A file exerciser: seeded random operations of every kind on one file, each checked against a copy in memory.

Written for files over the mount, in the manner of the fsx programs that file systems are tested with. What it does
depends on the seed alone, so two targets given one seed see the same operations. ``python -m tests.support.fsx FILE
SEED COUNT START STOP COPY`` exercises a part of a file as a process of its own, and leaves in COPY what the part must
hold afterwards.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import stat
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

PAGE = 4096
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
COLLAPSE_RANGE, INSERT_RANGE, UNSHARE_RANGE = 0x08, 0x20, 0x40
"""Modes of fallocate(2)."""

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_LONGEST = 200_000
_REMEMBERED = 25


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2); raises OSError."""
    if _LIBC.fallocate(descriptor, mode, offset, length):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def splice_range(source: int, offset: int, target: int, position: int, length: int) -> int:
    """splice(2) through a pipe until all is copied; returns how many bytes were."""
    receiving, sending = os.pipe()
    done = 0
    try:
        while done < length:
            count = os.splice(source, sending, length - done, offset_src=offset + done)
            if not count:
                break
            while count:
                moved = os.splice(receiving, target, count, offset_dst=position + done)
                done, count = done + moved, count - moved
    finally:
        os.close(receiving)
        os.close(sending)
    return done


def send_range(source: int, offset: int, length: int) -> bytes:
    """What sendfile(2) hands on."""
    target = os.memfd_create("sent")
    try:
        done = 0
        while done < length:
            count = os.sendfile(target, source, offset + done, length - done)
            if not count:
                break
            done += count
        return os.pread(target, length, 0)
    finally:
        os.close(target)


def copy_range(source: int, offset: int, target: int, position: int, length: int) -> int:
    """copy_file_range(2) until all is copied or nothing more is to be had; returns how many bytes were."""
    done = 0
    while done < length:
        count = os.copy_file_range(source, target, length - done, offset + done, position + done)
        if not count:
            break
        done += count
    return done


class Target(Protocol):
    """What is exercised. Offsets and lengths in bytes; every method but ``close`` may raise OSError."""

    def read(self, offset: int, length: int) -> bytes:
        """What is there; fewer bytes at the end."""

    def write(self, offset: int, data: bytes) -> None:
        """Write all of it."""

    def direct_read(self, offset: int, length: int) -> bytes:
        """Past the cache; everything is aligned."""

    def direct_write(self, offset: int, data: bytes) -> None:
        """Past the cache; everything is aligned."""

    def mapped_read(self, offset: int, length: int) -> bytes:
        """Through memory; within the file."""

    def mapped_write(self, offset: int, data: bytes) -> None:
        """Through memory; within the file."""

    def held_read(self, offset: int, length: int) -> bytes:
        """Through memory that was mapped long ago; within the file."""

    def sent_read(self, offset: int, length: int) -> bytes:
        """By sendfile(2); fewer bytes at the end."""

    def splice(self, offset: int, position: int, length: int) -> int:
        """Copy within the file by splice(2); returns how many bytes were copied."""

    def allocate(self, mode: int, offset: int, length: int) -> None:
        """As fallocate(2)."""

    def copy(self, offset: int, position: int, length: int) -> int:
        """Copy within the file; returns how many bytes were copied."""

    def holes(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Ranges within a part that are said to read as zeroes."""

    def resize(self, length: int) -> None:
        """Make it shorter or longer."""

    def flush(self) -> None:
        """To stable storage."""

    def reopen(self) -> None:
        """Close and open it again."""

    def forget(self) -> None:
        """Drop what is cached."""

    def close(self) -> None:
        """The end."""


class FileTarget:
    """A file by its path; the same bytes may also be reached by other paths, which then take turns.

    ``aliases`` are other files and where in the disk they lie: ``(path, start, stop)``.
    """

    def __init__(self, path: Path, aliases: tuple[tuple[Path, int, int], ...] = ()) -> None:
        self._views = ((path, 0, 1 << 62), *aliases)
        self._turn = 0
        self._open()

    def _open(self) -> None:
        self._files = [os.open(path, os.O_RDWR) for path, _, _ in self._views]
        self._direct = [os.open(path, os.O_RDWR | os.O_DIRECT) for path, _, _ in self._views]
        # A device has a page cache of its own, as everywhere, so it is used directly only.
        self._devices = [stat.S_ISBLK(os.fstat(file).st_mode) for file in self._files]
        self._held = [
            None if device else mmap.mmap(file, 0, flags=self._sharing(), prot=mmap.PROT_READ)
            for file, device in zip(self._files, self._devices, strict=True)
        ]

    def _view(self, offset: int, length: int, *, direct: bool = False) -> tuple[int, int]:
        """Which view a range is reached by this time, and where that begins."""
        self._turn += 1
        fitting = [
            (index, start)
            for index, (_, start, stop) in enumerate(self._views)
            if start <= offset and offset + length <= stop and (direct or not self._devices[index])
        ]
        return fitting[self._turn % len(fitting)]

    def read(self, offset: int, length: int) -> bytes:
        index, start = self._view(offset, length)
        return os.pread(self._files[index], length, offset - start)

    def write(self, offset: int, data: bytes) -> None:
        index, start = self._view(offset, len(data))
        written = os.pwrite(self._files[index], data, offset - start)
        assert written == len(data), f"only {written} of {len(data)} bytes written at {offset}"

    def direct_read(self, offset: int, length: int) -> bytes:
        index, start = self._view(offset, length, direct=True)
        with mmap.mmap(-1, length) as buffer:
            count = os.preadv(self._direct[index], [buffer], offset - start)
            return buffer[:count]

    def direct_write(self, offset: int, data: bytes) -> None:
        index, start = self._view(offset, len(data), direct=True)
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            written = os.pwritev(self._direct[index], [buffer], offset - start)
        assert written == len(data), f"only {written} of {len(data)} bytes written at {offset} directly"

    def _sharing(self) -> int:
        """How to map for reading: what several files show cannot be mapped shared."""
        return mmap.MAP_PRIVATE if len(self._views) > 1 else mmap.MAP_SHARED

    def _mapped(self, offset: int, length: int, flags: int) -> tuple[mmap.mmap, int]:
        index, start = self._view(offset, length)
        first = (offset - start) // PAGE * PAGE
        memory = mmap.mmap(self._files[index], offset - start + length - first, flags=flags, offset=first)
        return memory, offset - start - first

    def mapped_read(self, offset: int, length: int) -> bytes:
        memory, start = self._mapped(offset, length, self._sharing())
        with memory:
            return memory[start : start + length]

    def mapped_write(self, offset: int, data: bytes) -> None:
        memory, start = self._mapped(offset, len(data), mmap.MAP_SHARED)
        with memory:
            memory[start : start + len(data)] = data

    def held_read(self, offset: int, length: int) -> bytes:
        index, start = self._view(offset, length)
        memory = self._held[index]
        assert memory is not None
        first = offset - start
        # Of what was not there yet when it was mapped there is another way to read.
        return memory[first : first + length] if first + length <= len(memory) else self.read(offset, length)

    def sent_read(self, offset: int, length: int) -> bytes:
        index, start = self._view(offset, length)
        return send_range(self._files[index], offset - start, length)

    def splice(self, offset: int, position: int, length: int) -> int:
        source, start = self._view(offset, length)
        target, target_start = self._view(position, length)
        return splice_range(self._files[source], offset - start, self._files[target], position - target_start, length)

    def allocate(self, mode: int, offset: int, length: int) -> None:
        # A device punches and zeroes whole sectors.
        whole = bool(mode & (PUNCH_HOLE | ZERO_RANGE)) and not (offset | length) % 512
        index, start = self._view(offset, length, direct=whole)
        fallocate(self._files[index], mode, offset - start, length)

    def copy(self, offset: int, position: int, length: int) -> int:
        source, start = self._view(offset, length)
        target, target_start = self._view(position, length)
        return copy_range(self._files[source], offset - start, self._files[target], position - target_start, length)

    def holes(self, start: int, stop: int) -> list[tuple[int, int]]:
        found = []
        for data, begin, end in map_of(self._files[0], start, stop):
            if not data:
                found.append((begin, end))
        return found

    def resize(self, length: int) -> None:
        os.ftruncate(self._files[0], length)

    def flush(self) -> None:
        os.fsync(self._files[0])

    def reopen(self) -> None:
        self.close()
        self._open()

    def forget(self) -> None:
        for descriptor in self._files:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for memory in self._held:
            if memory is not None:
                memory.close()
        for descriptor in (*self._files, *self._direct):
            os.close(descriptor)


def map_of(descriptor: int, start: int, stop: int) -> list[tuple[bool, int, int]]:
    """Data and holes between two places by SEEK_DATA and SEEK_HOLE: ``(is data, begin, end)``, without gaps."""
    found: list[tuple[bool, int, int]] = []
    position = start
    while position < stop:
        try:
            data = min(os.lseek(descriptor, position, os.SEEK_DATA), stop)
        except OSError as exc:
            if exc.errno != errno.ENXIO:  # no more data
                raise
            data = stop
        if data > position:
            found.append((False, position, data))
        if data == stop:
            break
        position = min(os.lseek(descriptor, data, os.SEEK_HOLE), stop)
        assert position > data, f"data at {data} ends at {position}"
        found.append((True, data, position))
    return found


class Step(NamedTuple):
    """One operation as it was done."""

    number: int
    kind: str
    offset: int
    length: int
    more: int

    def __str__(self) -> str:
        end = self.offset + self.length
        return f"{self.number}: {self.kind} [{self.offset:#x}, {end:#x}) {self.length} bytes, {self.more:#x}"


_OFTEN = {
    "read": 12,
    "write": 14,
    "direct_read": 5,
    "direct_write": 6,
    "mapped_read": 5,
    "mapped_write": 5,
    "held_read": 4,
    "sent_read": 4,
    "splice": 3,
    "punch": 5,
    "zero": 4,
    "reserve": 4,
    "copy": 6,
    "holes": 1,
    "resize": 2,
    "grow": 2,
    "flush": 2,
    "reopen": 1,
    "forget": 2,
}
RESIZING = frozenset(("resize", "grow"))
CHANNEL_ONLY = frozenset(("punch", "zero", "reserve", "copy", "holes"))
"""What only the data channel serves."""


class Exerciser:
    """Seeded random operations on the part ``[start, start + len(content))`` of a target that holds ``content``.

    ``without`` names kinds of operations to leave out. With RESIZING left in, the target must be growable and the
    part the whole of it.
    """

    def __init__(
        self,
        target: Target,
        content: bytes,
        seed: int,
        *,
        start: int = 0,
        without: frozenset[str] = RESIZING,
        unit: int = 512,
    ) -> None:
        self.target = target
        self.content = bytearray(content)
        self.done = 0
        self._start = start
        self._seed = seed
        self._unit = unit
        """What sizes are multiples of."""
        self._longest_file = len(content) + len(content) // 2
        self._random = random.Random(seed)
        self._kinds = [kind for kind in _OFTEN if kind not in without]
        self._weights = [_OFTEN[kind] for kind in self._kinds]
        self._log: deque[Step] = deque(maxlen=_REMEMBERED)

    def run(self, count: int) -> None:
        """Do ``count`` operations, then compare everything; raises AssertionError with the last of them."""
        try:
            for number in range(count):
                self._one(number)
                self.done += 1
            self._compare(self.target.read(self._start, len(self.content)), 0, len(self.content))
        except (AssertionError, OSError) as exc:
            steps = "\n  ".join(map(str, self._log))
            raise AssertionError(f"seed {self._seed}, part at {self._start:#x}: {exc}; last:\n  {steps}") from exc

    def _one(self, number: int) -> None:
        kind = self._random.choices(self._kinds, self._weights)[0]
        offset, length = self._place()
        more = 0
        if kind.startswith("direct"):
            # Direct I/O to a page that is mapped elsewhere is aligned to pages, as databases do it.
            offset, length = offset // self._unit * self._unit, -(-max(length, 1) // self._unit) * self._unit
            length = min(length, (len(self.content) - offset) // self._unit * self._unit)
        if kind in ("copy", "splice"):
            length = min(length, len(self.content) // 3)
            more = self._elsewhere(offset, length)
        elif kind == "resize":
            offset, length = self._random.randrange(1, self._longest_file // self._unit) * self._unit, 0
        elif kind == "grow":
            offset = len(self.content) - self._random.randrange(0, min(70_000, len(self.content)))
            offset = max(0, offset)
            length = min(70_000, self._longest_file - offset) // self._unit * self._unit - offset % self._unit
            more = self._random.choice((-1, 0, ZERO_RANGE))
        elif kind in ("punch", "zero", "reserve"):
            # What must stay as long as it is may also be asked to do something past its end.
            more = KEEP_SIZE if kind == "punch" or self._random.random() < 0.5 else 0
        self._log.append(Step(number, kind, self._start + offset, length, more))
        if length > 0 or kind in ("resize", "flush", "reopen", "forget"):
            getattr(self, f"_do_{kind}")(offset, length, more)

    def _place(self) -> tuple[int, int]:
        random_, size = self._random, len(self.content)
        length = random_.choice((1, 511, 512, 4095, 4096, 65536, random_.randrange(1, _LONGEST), _LONGEST))
        length = min(length, size)
        offset = random_.randrange(size - length + 1)
        align = random_.choice((1, 1, 512, 4096, 65536))
        return offset // align * align, length

    def _elsewhere(self, offset: int, length: int) -> int:
        """Where ``length`` bytes may lie without touching those at ``offset``."""
        size = len(self.content)
        before, after = offset - length, size - (offset + 2 * length)
        places = [range(before + 1)] if before >= 0 else []
        if after >= 0:
            places.append(range(offset + length, offset + length + after + 1))
        return self._random.choice(self._random.choice(places)) if places else -1

    def _data(self, length: int) -> bytes:
        if self._random.random() < 0.05:
            return bytes(length)
        return (self._random.randbytes(251) * (length // 251 + 1))[:length]

    def _compare(self, found: bytes, offset: int, length: int) -> None:
        wanted = self.content[offset : offset + length]
        if found == wanted:
            return
        first = next((at for at, pair in enumerate(zip(found, wanted, strict=False)) if pair[0] != pair[1]), -1)
        different = sum(a != b for a, b in zip(found, wanted, strict=False))
        raise AssertionError(
            f"{len(found)} bytes at {self._start + offset:#x}, {len(wanted)} wanted, {different} differ, the first at "
            f"{self._start + offset + first:#x} ({found[first]:#x}, {wanted[first]:#x} wanted)"
        )

    # --- the operations ---------------------------------------------------------------------------------

    def _do_read(self, offset: int, length: int, more: int) -> None:
        self._compare(self.target.read(self._start + offset, length), offset, length)

    def _do_direct_read(self, offset: int, length: int, more: int) -> None:
        self._compare(self.target.direct_read(self._start + offset, length), offset, length)

    def _do_mapped_read(self, offset: int, length: int, more: int) -> None:
        self._compare(self.target.mapped_read(self._start + offset, length), offset, length)

    def _do_held_read(self, offset: int, length: int, more: int) -> None:
        self._compare(self.target.held_read(self._start + offset, length), offset, length)

    def _do_sent_read(self, offset: int, length: int, more: int) -> None:
        self._compare(self.target.sent_read(self._start + offset, length), offset, length)

    def _do_write(self, offset: int, length: int, more: int) -> None:
        data = self._data(length)
        self.target.write(self._start + offset, data)
        self.content[offset : offset + length] = data

    def _do_direct_write(self, offset: int, length: int, more: int) -> None:
        data = self._data(length)
        self.target.direct_write(self._start + offset, data)
        self.content[offset : offset + length] = data

    def _do_mapped_write(self, offset: int, length: int, more: int) -> None:
        data = self._data(length)
        self.target.mapped_write(self._start + offset, data)
        self.content[offset : offset + length] = data

    def _do_punch(self, offset: int, length: int, more: int) -> None:
        self.target.allocate(PUNCH_HOLE | KEEP_SIZE, self._start + offset, length)
        self.content[offset : offset + length] = bytes(length)

    def _do_zero(self, offset: int, length: int, more: int) -> None:
        self.target.allocate(ZERO_RANGE | more, self._start + offset, length)
        self.content[offset : offset + length] = bytes(length)

    def _do_reserve(self, offset: int, length: int, more: int) -> None:
        self.target.allocate(more, self._start + offset, length)

    def _do_splice(self, offset: int, length: int, more: int) -> None:
        self._do_copy(offset, length, more, self.target.splice)

    def _do_copy(self, offset: int, length: int, more: int, copy: Callable[[int, int, int], int] | None = None) -> None:
        if more < 0:
            return
        copied = (copy or self.target.copy)(self._start + offset, self._start + more, length)
        assert copied == length, f"{copied} of {length} bytes copied"
        self.content[more : more + length] = self.content[offset : offset + length]

    def _do_holes(self, offset: int, length: int, more: int) -> None:
        for begin, end in self.target.holes(self._start + offset, self._start + offset + length):
            found = self.content[begin - self._start : end - self._start]
            assert not any(found), f"the hole at {begin:#x} to {end:#x} holds data"

    def _do_resize(self, offset: int, length: int, more: int) -> None:
        self.target.resize(offset)
        self._set_length(offset)

    def _do_grow(self, offset: int, length: int, more: int) -> None:
        """Write, reserve or zero across the end."""
        if more < 0:
            data = self._data(length)
            self.target.write(offset, data)
        else:
            data = bytes(length)
            self.target.allocate(more, offset, length)
        if offset + length > len(self.content):
            self._set_length(offset + length)
        if more:
            self.content[offset : offset + length] = data

    def _set_length(self, length: int) -> None:
        del self.content[length:]
        self.content.extend(bytes(length - len(self.content)))

    def _do_flush(self, offset: int, length: int, more: int) -> None:
        self.target.flush()

    def _do_reopen(self, offset: int, length: int, more: int) -> None:
        self.target.reopen()

    def _do_forget(self, offset: int, length: int, more: int) -> None:
        self.target.forget()


def main() -> None:
    """Exercise a part of a file; the arguments are those of the module's docstring."""
    path, seed, count, start, stop, copy = Path(sys.argv[1]), *map(int, sys.argv[2:6]), Path(sys.argv[6])
    target = FileTarget(path)
    exerciser = Exerciser(target, target.read(start, stop - start), seed, start=start, unit=PAGE)
    exerciser.run(count)
    target.close()
    copy.write_bytes(exerciser.content)


if __name__ == "__main__":
    main()

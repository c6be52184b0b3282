"""What a partition table says, in bytes, whatever its kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable, Sequence

Read = Callable[[int, int], Awaitable[bytes | bytearray]]
"""``await read(offset, length)`` returns ``length`` bytes of the disk; the range must lie in it."""

SECTOR = 512
LAST_NUMBER = 255
"""The largest number of a partition that Linux gives a device."""
_MOST_NAMED = 8


@dataclasses.dataclass(slots=True)
class Partition:
    """One partition; ``start`` and ``length`` in bytes."""

    number: int
    """As Linux numbers it: the ``1`` of ``/dev/sda1``."""
    start: int
    length: int
    type: str
    """``0x83``, or a GUID."""
    uuid: str = ""
    """What Linux calls PARTUUID."""
    name: str = ""

    @property
    def end(self) -> int:
        """The first byte behind it."""
        return self.start + self.length


@dataclasses.dataclass(slots=True)
class Table:
    """The partitions of a disk, in the order of their numbers."""

    kind: str
    """``gpt`` or ``dos``."""
    sector_size: int
    """What the table counts in, in bytes."""
    partitions: list[Partition] = dataclasses.field(default_factory=list)
    remarks: list[str] = dataclasses.field(default_factory=list)
    """What is wrong and was coped with: parts of sentences that go on after the name of the disk and a colon."""

    def check(self, length: int) -> None:
        """Leave out what is no partition of a disk of ``length`` bytes, and remark on it and on what overlaps.

        As Linux does: one that begins in sector 0, over the table, is a partition (bootable ISO images have such), and
        one of an MBR that reaches past the end is cut there, whereas one of a GPT is none.
        """
        self._leave_out("of no length", lambda found: found.length <= 0)
        end = length // SECTOR * SECTOR
        if self.kind == "dos":
            self._leave_out(f"beginning past the disk's end at {length}", lambda found: found.start >= end)
            self._cut(end)
        else:
            self._leave_out(f"reaching past the disk's end at {length}", lambda found: found.end > length)
        self._leave_out(f"numbered above {LAST_NUMBER}", lambda found: found.number > LAST_NUMBER)
        overlapping = _overlapping(self.partitions)
        if overlapping:
            self.remarks.append(f"{_listed(overlapping)} overlapping others")

    def _leave_out(self, why: str, wrong: Callable[[Partition], bool]) -> None:
        bad = [found.number for found in self.partitions if wrong(found)]
        if bad:
            self.remarks.append(f"{_listed(bad)} left out, {why}")
            self.partitions = [found for found in self.partitions if not wrong(found)]

    def _cut(self, end: int) -> None:
        cut = [found.number for found in self.partitions if found.end > end]
        if cut:
            self.remarks.append(f"{_listed(cut)} cut at the disk's end at {end}")
            self.partitions = [
                dataclasses.replace(found, length=min(found.length, end - found.start)) for found in self.partitions
            ]


def _overlapping(partitions: Sequence[Partition]) -> list[int]:
    """Numbers of those that share bytes with one that starts before them (or with it)."""
    found = []
    end = 0
    for partition in sorted(partitions, key=lambda partition: (partition.start, partition.number)):
        if partition.start < end:
            found.append(partition.number)
        end = max(end, partition.end)
    return sorted(found)


def _listed(numbers: Sequence[int]) -> str:
    """``partition 1 is`` or ``partitions 1, 2 are``."""
    named = ", ".join(map(str, numbers[:_MOST_NAMED]))
    if len(numbers) > _MOST_NAMED:
        named += f" and {len(numbers) - _MOST_NAMED} more"
    return f"partition {named} is" if len(numbers) == 1 else f"partitions {named} are"

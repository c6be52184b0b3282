"""Which neighbours a map tells as one."""

from __future__ import annotations

from typing import Any, cast

import pytest

from fusedisk.block.graph.backend import Backend
from fusedisk.block.image.mapping import MapEntry, map_entries
from fusedisk.block.model.extent import BlockStatus
from fusedisk.core.errors import OptionError

UNIT = 512


class _Told:
    """A backend that answers one unit at a time from a list."""

    def __init__(self, *statuses: BlockStatus) -> None:
        self.statuses = statuses
        self.length = len(statuses) * UNIT

    async def block_status(self, offset: int, length: int) -> BlockStatus:
        status = self.statuses[offset // UNIT]
        inside = offset % UNIT
        place = None if status.offset is None else status.offset + inside
        return status._replace(length=min(length, UNIT - inside), offset=place)


def _status(**fields: Any) -> BlockStatus:
    return BlockStatus(UNIT, **{"data": True, "zero": False, "allocated": True, **fields})


async def _entries(told: _Told, *part: int) -> list[MapEntry]:
    return [entry async for entry in map_entries(cast(Backend, told), *part)]


FIRST: dict[str, Any] = {"offset": 4096, "filename": "a"}


@pytest.mark.parametrize(
    ("second", "together"),
    [
        ({"offset": 4096 + UNIT, "filename": "a"}, True),
        ({"offset": 4096, "filename": "a"}, False),
        ({"offset": 4096 + UNIT, "filename": "b"}, False),
        ({"offset": None, "filename": "a"}, False),
        ({"offset": 4096 + UNIT, "filename": "a", "zero": True}, False),
        ({"offset": 4096 + UNIT, "filename": "a", "data": False}, False),
        ({"offset": 4096 + UNIT, "filename": "a", "allocated": False}, False),
        ({"offset": 4096 + UNIT, "filename": "a", "depth": 1}, False),
        ({"offset": 4096 + UNIT, "filename": "a", "compressed": True}, False),
    ],
    ids=str,
)
async def test_neighbours(second: dict[str, Any], together: bool) -> None:
    entries = await _entries(_Told(_status(**FIRST), _status(**second)))
    assert [entry.length for entry in entries] == ([2 * UNIT] if together else [UNIT, UNIT])
    assert entries[0].offset == 4096


async def test_neighbours_without_a_place() -> None:
    compressed = _status(compressed=True)
    (entry,) = await _entries(_Told(compressed, compressed, compressed))
    assert entry == MapEntry(0, 3 * UNIT, 0, True, False, True, None, None, True)


async def test_a_part() -> None:
    told = _Told(_status(**FIRST), _status(**FIRST), _status(**FIRST))
    entries = await _entries(told, 100, 1000)
    assert [(entry.start, entry.length, entry.offset) for entry in entries] == [
        (100, 412, 4196),
        (512, 512, 4096),
        (1024, 76, 4096),
    ]
    assert await _entries(told, 3 * UNIT) == []
    assert sum(entry.length for entry in await _entries(told, UNIT, 1 << 60)) == 2 * UNIT
    for start in (-1, 3 * UNIT + 1):
        with pytest.raises(OptionError, match=f"the start of the map is {start}, expected 0 to the disk.s end at 1536"):
            await _entries(told, start)

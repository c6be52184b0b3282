"""Changes settings that an open driver takes for constant: the driver reads the image again after each change."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from fusedisk.core.errors import FusediskError

if TYPE_CHECKING:
    from fusedisk.drivers.format.qcow2.driver import Qcow2Driver

log = logging.getLogger(__name__)


@asynccontextmanager
async def changing(driver: Qcow2Driver) -> AsyncIterator[None]:
    """Run the block with all changes in the file and no other request; the driver agrees with the file afterwards.

    After an error the file may have either state of the header, so all state in memory is thrown away. That loses only
    refcounts of clusters that nothing refers to.
    """
    await driver.committer.finish()
    try:
        async with driver.committer.exclusive():
            yield
        await driver.committer.finish()
    except BaseException:
        with trio.CancelScope(shield=True):
            try:
                await driver.reload()
            except FusediskError as exc:
                log.warning("%s: %s", driver.image.filename, exc)
        raise
    await driver.reload()

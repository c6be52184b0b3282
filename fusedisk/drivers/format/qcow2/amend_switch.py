"""Changing what an open driver takes for constant: it reads the image anew behind each such change."""

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
    """Hold everybody off, with all of memory's changes in the file; whatever comes of it, the driver then agrees with
    the file.

    After an error nobody knows which of the header's states the file has, so memory is thrown away: what it alone had
    are refcounts of clusters that nothing refers to.
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

"""Looking at what a crash left: it opens, the judge of its format finds no corruption, and the guest's data is there.

Images whose dirty bit asks for it are repaired first, as every writable open does.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from fusedisk.block.graph.graph import Graph
from fusedisk.core.errors import FusediskError
from tests.crash.oracle import views
from tests.crash.recording import Recording
from tests.crash.replay import Crash
from tests.support.memory import Store, stores
from tests.support.profiles import QCOW2, FormatProfile, Verdict

_MEMORY = Path("/dev/shm")


class Checker:
    """The checks of judges, a few at a time, once for each different image."""

    def __init__(self, processes: int | None = None) -> None:
        self._pool = ThreadPoolExecutor(processes or os.cpu_count() or 1)
        self._known: dict[bytes, Future[Verdict]] = {}
        self._folder = tempfile.TemporaryDirectory(dir=_MEMORY if _MEMORY.is_dir() else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._folder.cleanup()

    @property
    def different(self) -> int:
        """How many different images there were."""
        return len(self._known)

    def check(self, image: bytes, profile: FormatProfile = QCOW2) -> Future[Verdict]:
        """Check ``image`` some time soon."""
        key = hashlib.blake2b(image, digest_size=16).digest()
        if key not in self._known:
            self._known[key] = self._pool.submit(self._run, image, key.hex(), profile)
        return self._known[key]

    def _run(self, image: bytes, name: str, profile: FormatProfile) -> Verdict:
        path = Path(self._folder.name) / name
        path.write_bytes(image)
        try:
            return profile.judge.check(path)
        finally:
            path.unlink()


class Content(NamedTuple):
    """What is in an image."""

    disk: bytes
    snapshots: dict[str, bytes]
    """By name."""


async def content_of(image: bytes, backing: Path | None, profile: FormatProfile = QCOW2) -> Content:
    """What a guest reads in the image and in its snapshots. Raises FusediskError where one cannot be read."""
    disk, names = await _read(image, backing, profile)
    return Content(disk, {name: (await _read(image, backing, profile, snapshot=name))[0] for name in names})


async def _read(
    image: bytes, backing: Path | None, profile: FormatProfile, *, snapshot: str | None = None
) -> tuple[bytes, list[str]]:
    """What the disk holds, or a snapshot of it, and the names of the snapshots."""
    graph = Graph(profile.drivers)
    store = Store(0)
    store.data = bytearray(image)
    spec: dict[str, Any] = {"driver": profile.name, "file": {"driver": "memory", "filename": "image"}}
    if snapshot is not None:
        spec["internal-snapshot"] = snapshot
    if backing is not None:
        below = Store(0)
        below.data = bytearray(backing.read_bytes())
        spec["backing"] = {"driver": "raw", "file": {"driver": "memory", "filename": "backing"}}
    else:
        below = store
    with stores(image=store, backing=below):
        try:
            backend = await graph.open_backend(spec)
            names = [found.name for found in backend.list_snapshots()]
            return bytes(await backend.read(0, backend.length)), names
        finally:
            await graph.close()


async def repaired(image: bytes, profile: FormatProfile = QCOW2) -> bytes:
    """What opening and closing leaves of an image that was not closed properly, and asks to be repaired."""
    if not profile.asks_for_repair(image):
        return image
    graph = Graph(profile.drivers)
    store = Store(0)
    store.data = bytearray(image)
    with stores(image=store):
        try:
            spec = {"driver": profile.name, "file": {"driver": "memory", "filename": "image"}, "backing": None}
            await graph.open_backend(spec, writable=True)
        finally:
            await graph.close()
    return bytes(store.data)


class Result(NamedTuple):
    """What replaying crashes of one recording has shown."""

    crashes: int
    different: int
    """Images that are not the same, byte for byte."""
    leaks: int
    """Most clusters leaked in one of them."""
    failures: list[str]


async def judge(
    recording: Recording,
    crashes: Iterable[Crash],
    checker: Checker,
    *,
    zeroes_too: bool = False,
    most_failures: int = 10,
) -> Result:
    """Look at every crash; see :meth:`Oracle.complaints` for ``zeroes_too``."""
    allowed, profile = views(recording.log), recording.profile
    failures: list[str] = []
    pending: list[tuple[Crash, Future[Verdict]]] = []
    contents: dict[bytes, Content | FusediskError] = {}
    count = 0
    for crash in crashes:
        count += 1
        where = f"after operation {crash.cut}, {crash.what}"
        key = hashlib.blake2b(crash.image, digest_size=16).digest()
        if key not in contents:
            try:
                pending.append(
                    (crash._replace(image=b""), checker.check(await repaired(crash.image, profile), profile))
                )
                contents[key] = await content_of(crash.image, recording.backing, profile)
            except FusediskError as exc:
                contents[key] = exc
        found = contents[key]
        if isinstance(found, FusediskError):
            failures.append(f"{where}: {found}")
        else:
            view, oracle = allowed[crash.cut], recording.oracle
            complaints = list(oracle.complaints(found.disk, view, zeroes_too=zeroes_too))
            complaints += oracle.snapshot_complaints(found.snapshots, view)
            if complaints:
                failures.append(f"{where}: {complaints[0]} ({len(complaints)} like it)")
        if len(failures) >= most_failures:
            break
    leaks = 0
    for crash, future in pending:
        verdict = future.result()
        leaks = max(leaks, verdict.leaks)
        if verdict.corruptions:
            failures.append(f"after operation {crash.cut}, {crash.what}: the judge: {verdict.text[:400]}")
    return Result(count, len(contents), leaks, failures)

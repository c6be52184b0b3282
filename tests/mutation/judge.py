"""Comparing ``fusedisk check`` with ``qemu-img check`` on one damaged image."""

from __future__ import annotations

import dataclasses
import json
import os
import select
import subprocess
import time
from pathlib import Path

from fusedisk.block.image.check import open_for_check
from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.core.errors import FusediskError, ImageError
from tests.conftest import require_tool
from tests.hostile.sentence import assert_sentence
from tests.mutation.guest import Disks, Guest, lost
from tests.mutation.images import Sample

PATIENCE = 1.0
"""Seconds of processor time that one check or repair may take."""

_QEMU_PATIENCE = 30
"""Seconds; it takes milliseconds."""

_QEMU_OUTPUT = 1 << 30
"""Bytes of complaints that come only from something endless."""

Numbers = tuple[int, int, int]
"""Check errors, corruptions, leaks."""


@dataclasses.dataclass(slots=True)
class Verdict:
    """How it went with one image."""

    state: str = "refused"
    """``clean``, ``leaky``, ``corrupt`` or ``refused``, as we see it."""
    exception: str | None = None
    """Why we and QEMU rightly differ, see :data:`EXCEPTIONS`."""
    wrong: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    """The longest check or repair of ours."""
    repaired: bool = False


EXCEPTIONS = {
    "key": "QEMU opens the LUKS header and wants a key even for a check, so damage to what leads to it stops it there",
    "data file": "the external data file is given here, so QEMU does not miss its name, and wants the feature bit",
    "no L1 table": "QEMU goes on without an L1 table that is not in the file, and calls an empty disk repaired",
    "LUKS header": "QEMU goes on where the header's length cannot be, and gives its clusters, the only key, away",
    "snapshots": "QEMU drops all snapshots when it repairs an image with autoclear bits that it does not know",
    "endless": "QEMU does not come to an end, as where a snapshot's L1 table runs into what a repair allocates",
    "crash": "QEMU is ended by a signal or an assertion",
}
"""Where QEMU is no judge."""


class Checks:
    """Our checks and repairs of copies of one sample, in a folder of its own."""

    def __init__(self, sample: Sample, folder: Path) -> None:
        self.sample = sample
        self.path = folder / f"damaged.{sample.profile.name}"

    async def _ours(self, repair: Repair, verdict: Verdict) -> CheckResult | FusediskError | None:
        """What our check says; None where it does what it never may."""
        start, profile = time.process_time(), self.sample.profile
        try:
            writable = repair is not Repair.NOTHING
            spec = {"driver": "file", "filename": str(self.path)}
            async with open_for_check(
                profile.drivers, {"driver": profile.name, "file": spec}, writable=writable
            ) as image:
                return await image.driver.check(image.files, repair, lambda done, total: None)
        except FusediskError as exc:
            self._assert_sentence(exc, verdict)
            return exc
        except Exception as exc:
            verdict.wrong.append(f"{repair.value}: {type(exc).__name__}: {exc}")
            return None
        finally:
            seconds = time.process_time() - start
            verdict.seconds = max(verdict.seconds, seconds)
            if seconds > PATIENCE:
                verdict.wrong.append(f"{seconds:.1f} s for one check or repair ({repair.value})")

    @staticmethod
    def _assert_sentence(exc: FusediskError, verdict: Verdict) -> None:
        try:
            assert_sentence(exc)
        except AssertionError as wrong:
            verdict.wrong.append(f"not a sentence: {wrong}")


class Judge(Checks):
    """Judges copies of one qcow2 sample."""

    def __init__(self, sample: Sample, folder: Path) -> None:
        super().__init__(sample, folder)
        self._out, self._err = folder / "out", folder / "err"
        self.data = sample.data_file.read_bytes() if sample.data_file else None
        self.metadata = Guest(sample.content, sample, self.data).metadata()

    async def judge(self, image: bytes) -> Verdict:
        """Check a damaged image both ways; repair it; check it again."""
        verdict = Verdict()
        self.path.write_bytes(image)
        with self._qemu("check", "--output=json") as process:
            found = await self._ours(Repair.NOTHING, verdict)
            theirs = self._answer(process, verdict)
        assert self.path.read_bytes() == image, "a check wrote"
        ours = _numbers(found)
        if isinstance(found, ImageError) and "an external data file and does not name it" in str(found):
            verdict.exception = "data file"
        if ours is not None:
            verdict.state = "corrupt" if ours[0] or ours[1] else "leaky" if ours[2] else "clean"
        if ours != theirs and verdict.exception is None:
            verdict.wrong.append(f"we found {_told(found)}, QEMU {theirs or 'refused'}")
        if ours is not None and any(ours):
            await self._repair(image, verdict)
        return verdict

    async def _repair(self, image: bytes, verdict: Verdict) -> None:
        result = await self._ours(Repair.ALL, verdict)
        if isinstance(result, FusediskError):
            if self.path.read_bytes() != image:
                verdict.wrong.append(f"refused to repair ({result}), but wrote")
            self._could_qemu(image, str(result), verdict)
            return
        if result is None:
            return
        after = self.path.read_bytes()
        verdict.repaired = True
        with self._qemu("check", "--output=json") as process:
            again = await self._ours(Repair.NOTHING, verdict)
            verdict.wrong += [f"the repair lost {line}" for line in self._lost(self._readable(image), after)[:3]]
            theirs = self._answer(process, verdict)
        if _numbers(result) != _numbers(again):
            verdict.wrong.append(f"our repair told {_told(result)}, but we then found {_told(again)}")
        if theirs != _numbers(again) and verdict.exception is None:
            verdict.wrong.append(f"after our repair we found {_told(again)}, QEMU {theirs or 'refused'}")
        if _numbers(again) != (0, 0, 0):
            self.path.write_bytes(image)
            self._could_qemu(image, f"we left {_told(again)}", verdict)

    def _could_qemu(self, image: bytes, why: str, verdict: Verdict) -> None:
        """We could not repair it, or not all: can QEMU, without losing what could be read?"""
        with self._qemu("check", "--output=json", "-r", "all") as process:
            self._answer(process, verdict)
        with self._qemu("check", "--output=json") as process:
            theirs = self._answer(process, verdict)
        if theirs != (0, 0, 0):
            return
        if "its header has the L1 table at" in why:
            verdict.exception = "no L1 table"
        elif "LUKS header" in why:
            verdict.exception = "LUKS header"
        elif _number_of_snapshots(image) and not _number_of_snapshots(self.path.read_bytes()) and _autoclear(image) > 3:
            verdict.exception = "snapshots"
        elif not self._lost(self._readable(image), self.path.read_bytes()):
            verdict.wrong.append(f"QEMU can repair what we could not: {why}")

    def _readable(self, image: bytes) -> Disks:
        return Guest(image, self.sample, self.data, self.metadata).disks()

    def _lost(self, before: Disks, after: bytes) -> list[str]:
        now = Guest(after, self.sample, self.data).disks()
        return lost(before, now, "unallocated" if self.sample.backed else "zeroes")

    def _qemu(self, command: str, *options: str) -> subprocess.Popen[bytes]:
        """Start qemu-img. It writes to files: line by line through a pipe would take longer than the check."""
        objects = self.sample.qemu_objects()
        args = [require_tool("qemu-img"), command, *objects, *options, self.sample.qemu_name(self.path)]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            return subprocess.Popen(args, stdout=out, stderr=err)

    def _answer(self, process: subprocess.Popen[bytes], verdict: Verdict) -> Numbers | None:
        """What qemu-img found; None where it refuses the image."""
        if not _ends(process, self._err):
            process.kill()
            process.wait()
            verdict.exception = "endless"
            return None
        out, err = self._out.read_text(errors="replace"), self._err.read_text(errors="replace")
        if process.returncode < 0:
            verdict.exception = "crash"
        if "key" in err or "LUKS" in err or "ncrypt" in err:
            verdict.exception = "key"
        if self.sample.data_file is not None and "'data-file' can only be set" in err:
            verdict.exception = "data file"
        if not out.startswith("{"):
            return None
        found = json.loads(out)
        return found["check-errors"], found.get("corruptions", 0), found.get("leaks", 0)


def _ends(process: subprocess.Popen[bytes], output: Path) -> bool:
    """Whether a process ends in time. (``Popen.wait`` would look by and by, up to 50 ms late.)"""
    descriptor = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        # Second by second, as this run may be stopped meanwhile.
        for _ in range(_QEMU_PATIENCE):
            if poll.poll(1000):
                process.wait()
                return True
            if output.stat().st_size > _QEMU_OUTPUT:
                break
        return False
    finally:
        os.close(descriptor)


def _number_of_snapshots(image: bytes) -> int:
    return int.from_bytes(image[60:64], "big")


def _autoclear(image: bytes) -> int:
    """Autoclear bits; 1 and 2 are those that mean something."""
    return int.from_bytes(image[88:96], "big") if image[7] > 2 else 0


def _numbers(found: CheckResult | FusediskError | None) -> Numbers | None:
    if not isinstance(found, CheckResult):
        return None
    return found.check_errors, found.corruptions, found.leaks


def _told(found: CheckResult | FusediskError | None) -> str:
    if isinstance(found, CheckResult):
        return f"{_numbers(found)} {found.findings[:4]}"
    return f"refused: {found}"

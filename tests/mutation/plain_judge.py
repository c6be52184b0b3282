"""Comparing our check of a damaged image with the judge of its format; our reading, too, and what a repair leaves."""

from __future__ import annotations

from fusedisk.block.graph.graph import Graph
from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.core.errors import FusediskError
from tests.mutation.judge import Checks, Verdict

_MOST_READ = 16 << 20
"""Bytes of a disk that are read and compared."""


class PlainJudge(Checks):
    """Judges copies of one sample of a format that has nothing but a profile."""

    async def judge(self, image: bytes) -> Verdict:
        """Check a damaged image both ways, read it both ways, repair it, check it again."""
        verdict = Verdict()
        self.path.write_bytes(image)
        found = await self._ours(Repair.NOTHING, verdict)
        content = await self._read(verdict)
        assert self.path.read_bytes() == image, "a check or a read wrote"
        if not isinstance(found, CheckResult):
            if content is not None:
                verdict.wrong.append(f"the check refused it ({found}), but it opens")
            return verdict
        verdict.state = "corrupt" if found.corruptions else "leaky" if found.leaks else "clean"
        theirs = self.sample.profile.judge.check(self.path)
        if bool(found.corruptions) < bool(theirs.corruptions):
            verdict.wrong.append(f"we found {found.findings[:3]}, the judge {theirs}")
        if not found.corruptions:
            self._compare(content, verdict)
        if not found.clean:
            await self._repair(content, verdict)
        return verdict

    def _compare(self, content: bytes | None, verdict: Verdict) -> None:
        """A clean image opens, and reads as the judge reads it."""
        if content is None:
            verdict.wrong.append("nothing is wrong with it, but it does not open")
            return
        scratch = self.path.with_name("scratch")
        (expected,), _ = self.sample.profile.judge.read(self.path, [(0, len(content))], scratch)
        if expected != content:
            verdict.wrong.append("the judge reads something else")

    async def _repair(self, content: bytes | None, verdict: Verdict) -> None:
        """A repair tells the truth, and changes nothing that could be read."""
        told = await self._ours(Repair.ALL, verdict)
        if not isinstance(told, CheckResult):
            verdict.wrong.append(f"the repair failed where the check did not: {told}")
            return
        verdict.repaired = True
        again = await self._ours(Repair.NOTHING, verdict)
        if not isinstance(again, CheckResult) or (again.corruptions, again.leaks) != (told.corruptions, told.leaks):
            verdict.wrong.append(f"our repair told {told}, but then we found {again}")
        if content is not None and await self._read(verdict) != content:
            verdict.wrong.append("the repair lost data")

    async def _read(self, verdict: Verdict) -> bytes | None:
        """What we read from the start of the disk; None if it does not open or cannot be read."""
        graph = Graph(self.sample.profile.drivers)
        try:
            spec = {"driver": self.sample.profile.name, "file": {"driver": "file", "filename": str(self.path)}}
            disk = await graph.open_backend(spec)
            return bytes(await disk.read(0, min(disk.length, _MOST_READ)))
        except FusediskError as exc:
            self._assert_sentence(exc, verdict)
            return None
        except Exception as exc:
            verdict.wrong.append(f"reading: {type(exc).__name__}: {exc}")
            return None
        finally:
            await graph.close()

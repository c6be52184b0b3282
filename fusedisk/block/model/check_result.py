"""What a check may change, and what it found."""

from __future__ import annotations

import dataclasses
import enum

MAX_FINDINGS = 1000
"""The most findings that are kept as sentences; all are counted."""


class Repair(enum.Enum):
    """What a check may change."""

    NOTHING = "nothing"
    LEAKS = "leaks"
    """Give leaked space back; nothing else."""
    REFCOUNTS = "refcounts"
    """Make writing safe: correct the refcounts and the flags that depend on them. Refused if anything else is wrong."""
    ALL = "all"
    """Everything that is wrong."""


@dataclasses.dataclass(slots=True)
class CheckResult:
    """What a check found, counted as ``qemu-img check`` counts it. Clusters are the format's units of allocation."""

    check_errors: int = 0
    """Things that could not be checked."""
    corruptions: int = 0
    leaks: int = 0
    """Clusters in use to which nothing refers."""
    corruptions_fixed: int = 0
    leaks_fixed: int = 0
    image_end_offset: int = 0
    """Host offset behind the last cluster in use; 0 if the format does not tell."""
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    findings: list[str] = dataclasses.field(default_factory=list)
    """The findings, a sentence each; at most :data:`MAX_FINDINGS`."""
    repairs: list[str] = dataclasses.field(default_factory=list)
    """What the repair did or, in a dry run, would do."""

    @property
    def clean(self) -> bool:
        """Whether nothing was found and everything was checked."""
        return not (self.check_errors or self.corruptions or self.leaks)

    def note(self, sentence: str) -> None:
        """Add a finding."""
        if len(self.findings) < MAX_FINDINGS:
            self.findings.append(sentence)

    def information(self) -> dict[str, int]:
        """Return the numbers by qemu-img's names, without zeroes except for ``check-errors``."""
        numbers = {
            field.name.replace("_", "-"): getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.type == "int"
        }
        return {name: value for name, value in numbers.items() if value or name == "check-errors"}

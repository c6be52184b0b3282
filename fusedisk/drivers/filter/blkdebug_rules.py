"""The rules of ``blkdebug``: what they say, how a configuration file spells them, and which one holds when. No I/O.

A rule waits for its event while the filter is in the rule's state. Events only arm rules: an armed error hits requests
until an event arms others. Several rules for one event act in the order in which they are given; options come after the
configuration file. Source: QAPI's BlkdebugEvent, BlkdebugIOType, BlkdebugInjectErrorOptions, BlkdebugSetStateOptions,
and docs/devel/blkdebug.txt of QEMU.
"""

from __future__ import annotations

import dataclasses
import errno
import re
from collections.abc import Mapping
from typing import Any, ClassVar

from fusedisk.core.errors import OptionError
from fusedisk.core.options import Options, option

NO_EVENT = "none"
"""Rules for it are armed from the start."""

EVENTS = (
    "l1_update",
    "l1_grow_alloc_table",
    "l1_grow_write_table",
    "l1_grow_activate_table",
    "l2_load",
    "l2_update",
    "l2_update_compressed",
    "l2_alloc_cow_read",
    "l2_alloc_write",
    "read_aio",
    "read_backing_aio",
    "read_compressed",
    "write_aio",
    "write_compressed",
    "vmstate_load",
    "vmstate_save",
    "cow_read",
    "cow_write",
    "reftable_load",
    "reftable_grow",
    "reftable_update",
    "refblock_load",
    "refblock_update",
    "refblock_update_part",
    "refblock_alloc",
    "refblock_alloc_hookup",
    "refblock_alloc_write",
    "refblock_alloc_write_blocks",
    "refblock_alloc_write_table",
    "refblock_alloc_switch_table",
    "cluster_alloc",
    "cluster_alloc_bytes",
    "cluster_free",
    "flush_to_os",
    "flush_to_disk",
    "pwritev_rmw_head",
    "pwritev_rmw_after_head",
    "pwritev_rmw_tail",
    "pwritev_rmw_after_tail",
    "pwritev",
    "pwritev_zero",
    "pwritev_done",
    "empty_image_prepare",
    "l1_shrink_write_table",
    "l1_shrink_free_l2_clusters",
    "cor_write",
    "cluster_alloc_space",
    NO_EVENT,
)
"""All event names, as QAPI's BlkdebugEvent has them."""

IO_TYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")
"""The kinds of requests that an error can hit."""

_UNLESS_NAMED = frozenset(IO_TYPES) - {"block-status"}
_SECTOR = 512
_MAX_ERRNO = 511
"""Linux's own errors are lower, and it accepts no higher ones from a filesystem."""


@dataclasses.dataclass(slots=True)
class _RuleOptions(Options):
    """The options that all rules have."""

    name_separator: ClassVar[str] = "_"

    event: str = option("", help="the event that arms the rule", choices=EVENTS)
    state: int = option(0, kind="int", help="the state in which the rule holds; 0 is any")

    @classmethod
    def read(cls, given: object, owner: str) -> Any:
        """Parse one rule. Raises OptionError if it is not a group of options, names no event, or has an invalid
        number."""
        if not isinstance(given, Mapping):
            raise OptionError(f"{owner} is '{given}', expected a group of options.")
        rule = cls.parse(given, owner)
        if not rule.event:
            raise OptionError(f"{owner} has no event, expected one of {', '.join(EVENTS)}.")
        if rule.state < 0:
            raise OptionError(f"{owner} has the state {rule.state}, expected 0 (any) or a number above.")
        return rule


@dataclasses.dataclass(slots=True)
class InjectError(_RuleOptions):
    """Let a request fail."""

    errno: int = option(errno.EIO, kind="int", help="the error number; 0 lets the request pass after all")
    iotype: str = option("", help="the kind of request to hit (default: all but block-status)", choices=IO_TYPES)
    sector: int = option(-1, kind="int", help="hit only requests that touch this sector of 512 bytes")
    once: bool = option(False, kind="bool", help="forget the rule once it has hit")
    immediately: bool = option(False, kind="bool", help="fail without letting other tasks run first")

    @classmethod
    def read(cls, given: object, owner: str) -> Any:
        """Parse one rule, as for all rules. Raises OptionError also for a number that no error has."""
        # By name: a class with slots is not the one that super() without arguments looks for.
        rule = super(InjectError, cls).read(given, owner)
        if not 0 <= rule.errno <= _MAX_ERRNO:
            raise OptionError(f"{owner} has the errno {rule.errno}, expected 0 to {_MAX_ERRNO}.")
        return rule

    def hits(self, iotype: str, offset: int, length: int) -> bool:
        """Whether a request is one that the rule is for; flushes have no place, so no sector touches them."""
        if iotype != self.iotype and (self.iotype or iotype not in _UNLESS_NAMED):
            return False
        return self.sector < 0 or offset <= self.sector * _SECTOR < offset + length


@dataclasses.dataclass(slots=True)
class SetState(_RuleOptions):
    """Go to another state."""

    new_state: int = option(0, kind="int", help="the state to go to")


RULE_TYPES: dict[str, type[InjectError] | type[SetState]] = {"inject-error": InjectError, "set-state": SetState}
"""By the name of their group, in options and configuration files alike."""


class Rules:
    """The rules of one filter and what is armed. All methods are synchronous."""

    def __init__(self, errors: list[InjectError], changes: list[SetState]) -> None:
        self.state = 1
        self._errors: dict[str, list[InjectError]] = {}
        self._changes: dict[str, list[SetState]] = {}
        for error in errors:
            self._errors.setdefault(error.event, []).append(error)
        for change in changes:
            self._changes.setdefault(change.event, []).append(change)
        self._armed: list[InjectError] = []
        self.happen(NO_EVENT)

    def happen(self, event: str) -> None:
        """Arm what waits for ``event``, then change the state. Errors armed before stay armed unless this event arms
        others."""
        armed = [rule for rule in self._errors.get(event, ()) if rule.state in (0, self.state)]
        if armed:
            self._armed = armed
        for change in self._changes.get(event, ()):
            if change.state in (0, self.state):
                self.state = change.new_state
                break

    def strike(self, iotype: str, offset: int, length: int) -> InjectError | None:
        """The error that a request meets; one that hits only once is forgotten."""
        for rule in self._armed:
            if rule.hits(iotype, offset, length):
                if not rule.errno:
                    return None
                if rule.once:
                    self._armed.remove(rule)
                    waiting = self._errors[rule.event]
                    if rule in waiting:
                        waiting.remove(rule)
                return rule
        return None


_GROUP = re.compile(r"\[([\w-]+)(?:\s+\"[^\"]*\")?\]")
_PAIR = re.compile(r"([\w.-]+)\s*=\s*\"([^\"]*)\"")


def parse_config(text: str, filename: str) -> dict[str, list[dict[str, str]]]:
    """Groups of a configuration file by name: ``[inject-error]`` or ``[set-state]``, then lines ``key = "value"``.

    Empty lines and lines that start with ``#`` do not count. Raises OptionError naming the line.
    """
    groups: dict[str, list[dict[str, str]]] = {name: [] for name in RULE_TYPES}
    current: dict[str, str] | None = None
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        place = f"'{filename}', line {number}"
        if (group := _GROUP.fullmatch(line)) is not None:
            if group[1] not in groups:
                raise OptionError(f"{place}: there is no group '{group[1]}', expected {' or '.join(groups)}.")
            current = {}
            groups[group[1]].append(current)
        elif (pair := _PAIR.fullmatch(line)) is not None:
            if current is None:
                raise OptionError(f"{place}: '{pair[1]}' stands outside of any group, such as [inject-error].")
            current[pair[1]] = pair[2]
        else:
            raise OptionError(f'{place} is neither a [group] nor key = "value".')
    return groups

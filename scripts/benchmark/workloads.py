"""What is measured: a table of jobs, the images they run on, the servers compared, and the goals."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial

from fusedisk.mount.wakefulness import DEVICE
from scripts.benchmark.images import MIB
from scripts.benchmark.jobs import Dd, Fio, Job, OnLoop, Tar
from scripts.benchmark.servers import SERVERS, Server, awake, fusedisk, host_file, passed_through

OURS, THEIRS = SERVERS
PASSTHROUGH, HOST_FILE = "passthrough", "host file"
CHAIN, SINGLE = "chain of 16", "single image"
AWAKE = "fusedisk --low-latency"
HARDER = frozenset({"subclusters", "empty-subclusters", "overlay", "luks"})


@dataclass(frozen=True)
class Contender:
    """One side of a comparison."""

    server: Server
    bottom: bool = False
    """Whether it is given the lowest image of a chain."""


CONTENDERS = {
    **{name: Contender(server) for name, server in SERVERS.items()},
    PASSTHROUGH: Contender(passed_through),
    HOST_FILE: Contender(host_file),
    CHAIN: Contender(fusedisk),
    SINGLE: Contender(fusedisk, bottom=True),
    AWAKE: Contender(awake),
}


@dataclass(frozen=True)
class Workload:
    """A row of the table for each image."""

    name: str
    job: Job
    goal: float | None = None
    """The ratio, the first contender's rate divided by the second's, to be reached; None where nothing is promised. On
    images that need more work than others, ``HARDER``, it is not to be slower."""
    images: tuple[str, ...] = ("raw", "qcow2")
    """The keys of images.FORMATS that it runs on."""
    pair: tuple[str, str] = (OURS, THEIRS)
    """The keys of CONTENDERS that are compared."""
    pieces: int = 1
    """Each run is cut into so many, which take turns with the other side's: where something that both depend on, such
    as the host's disk, gets faster and slower from one second to the next."""

    @property
    def unit(self) -> str:
        """The unit of its results."""
        return self.job.unit

    def goal_on(self, image: str) -> float | None:
        """The goal on an image, a key of images.FORMATS."""
        return 1.0 if self.goal is not None and image in HARDER else self.goal

    def contenders(self, servers: Collection[str]) -> tuple[str, ...]:
        """The contenders if only *servers*, keys of SERVERS, are asked for. Our own rows run on fusedisk alone."""
        if self.pair == (OURS, THEIRS):
            return tuple(name for name in self.pair if name in servers)
        return self.pair if OURS in servers else ()

    @property
    def unable(self) -> str | None:
        """Why it cannot run on this machine, as a clause; None where it can."""
        root = os.geteuid() == 0
        if self.job.needs_root and not root:
            return "loop devices need root"
        if PASSTHROUGH in self.pair and not (root and _kernel() >= (6, 9)):
            return "passthrough needs root and Linux 6.9"
        if AWAKE in self.pair and not os.access(DEVICE, os.W_OK):
            return f"--low-latency needs root and {DEVICE}"
        return None


def _kernel() -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)", platform.release())
    return tuple(map(int, found.groups())) if found else ()


_compressed = partial(Workload, images=("compressed",))
_passthrough = partial(Workload, goal=0.95, images=("raw",), pair=(PASSTHROUGH, HOST_FILE), pieces=3)
_chain = partial(Workload, goal=1 / 1.2, images=("chain",), pair=(CHAIN, SINGLE))
_awake = partial(Workload, images=("qcow2",), pair=(AWAKE, OURS))

_WRITTEN = ("raw", "qcow2", "subclusters", "luks")
_NEW = ("empty", "empty-subclusters", "overlay")
_FOUR = ("--numjobs=4", "--group_reporting")
_MIXED = ("--rwmixread=70",)
_LOCAL = Fio("randread", 4096, options=("--random_distribution=zoned:90/10:10/90",))
"""Nine of ten requests go to a tenth of the disk, which a cache of inflated clusters can hold."""

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("randread-4k-d1", Fio("randread", 4096), goal=2.0),
        Workload("randread-4k-d16", Fio("randread", 4096, 16), goal=1.25),
        Workload("randwrite-4k-d1", Fio("randwrite", 4096), goal=2.0, images=_WRITTEN),
        Workload("randwrite-4k-d16", Fio("randwrite", 4096, 16), goal=2.0, images=_WRITTEN),
        Workload("randwrite-4k-4x8", Fio("randwrite", 4096, 8, options=_FOUR)),
        Workload("turns-4k-d16", Fio("randrw", 4096, 16, options=("--rwmixread=50",)), goal=3.0),
        Workload("fsync-4k", Fio("randwrite", 4096, options=("--fsync=1",)), goal=1.2),
        Workload("randrw-4k-d1", Fio("randrw", 4096, options=_MIXED), goal=1.25),
        Workload("randrw-4k-d16", Fio("randrw", 4096, 16, options=_MIXED), goal=1.25),
        Workload("firstwrite-4k-d1", Fio("randwrite", 4096), goal=1.5, images=_NEW),
        Workload("firstwrite-4k-d16", Fio("randwrite", 4096, 16), goal=1.5, images=_NEW),
        Workload("firstwrite-1m", Fio("write", MIB), goal=1.6, images=("empty",)),
        Workload("seqread-1m", Fio("read", MIB), goal=2.5),
        Workload("seqwrite-1m", Fio("write", MIB), goal=1.5),
        Workload("dd-1m", Dd(), goal=2.3),
        _compressed("compressed-seqread-1m", Fio("read", MIB), goal=3.0),
        _compressed("compressed-randread-4k-local", _LOCAL, goal=10.0),
        Workload("loop-randread-4k-d16", OnLoop(Fio("randread", 4096, 16)), goal=1.0),
        Workload("loop-randwrite-4k-d16", OnLoop(Fio("randwrite", 4096, 16)), goal=1.0),
        Workload("loop-tar", Tar(), goal=1.2, images=("ext4",)),
        # Direct, both end at the host's disk; buffered, both in its page cache, where the way there shows most.
        _passthrough("passthrough-randread-4k-d1", Fio("randread", 4096)),
        _passthrough("passthrough-randwrite-4k-d1", Fio("randwrite", 4096)),
        _passthrough("passthrough-seqread-1m", Fio("read", MIB)),
        _passthrough("passthrough-buffered-randread-4k", Fio("randread", 4096, direct=False)),
        _passthrough("passthrough-buffered-seqread-1m", Fio("read", MIB, direct=False)),
        _chain("chain-randread-4k-d1", Fio("randread", 4096)),
        _chain("chain-randread-4k-d16", Fio("randread", 4096, 16)),
        _awake("awake-randread-4k-d1", Fio("randread", 4096)),
        _awake("awake-randwrite-4k-d1", Fio("randwrite", 4096)),
        _awake("awake-compressed-randread-4k-local", _LOCAL, images=("compressed",)),
        _awake("awake-loop-tar", Tar(), images=("ext4",)),
    )
}

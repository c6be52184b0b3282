"""``check``: analyse the image, repair it if that is asked for, and analyse it again."""

from __future__ import annotations

from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.block.model.node import Node
from fusedisk.core.errors import ImageError
from fusedisk.core.progress import Progress
from fusedisk.drivers.format.qcow2 import repair as repairing
from fusedisk.drivers.format.qcow2.check_analysis import analyse
from fusedisk.drivers.format.qcow2.check_open import CheckedImage, open_image
from fusedisk.drivers.format.qcow2.check_snapshots import SnapshotTable, read_snapshot_table


async def check(file: Node, repair: Repair, progress: Progress, *, dry_run: bool = False) -> CheckResult:
    """Check the image in ``file``, see :meth:`fusedisk.block.model.driver.Driver.check`."""
    image = await open_image(file)
    snapshots = await _read_snapshots(image, repair)
    analysis = await analyse(image, snapshots, progress)
    result = analysis.result
    result.corruptions += snapshots.dropped + snapshots.shortened
    if repair is Repair.NOTHING:
        return result
    plan = repairing.plan(analysis, repair)
    if plan and not dry_run:
        result = await repairing.repair(analysis, repair, progress)
    result.repairs = plan
    return result


async def _read_snapshots(image: CheckedImage, repair: Repair) -> SnapshotTable:
    try:
        return await read_snapshot_table(image, repair=False)
    except ImageError:
        if repair is not Repair.ALL:
            raise
    return await read_snapshot_table(image, repair=True)

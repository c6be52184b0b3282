"""Measuring what a new image would take, by the name of its format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fusedisk.block.graph.backend import Backend
from fusedisk.block.graph.registry import Registry
from fusedisk.block.image.measure import Measurement, measure_raw
from fusedisk.core.errors import NotSupportedError
from fusedisk.core.progress import Progress, no_progress
from fusedisk.drivers.format.qcow2 import measure as qcow2

TARGETS = ("raw", "qcow2")
"""Formats that are known here."""


def target_options(drivers: Registry, format: str, given: Mapping[str, Any]) -> qcow2.MeasureOptions | None:
    """The creation options of qcow2; None for raw, which has none that matter. Raises OptionError, and
    NotSupportedError for another format."""
    kind = drivers.load_format(format)
    if format not in TARGETS:
        raise NotSupportedError(f"{format} images cannot be measured, known are {', '.join(TARGETS)}.")
    if format == "qcow2":
        return qcow2.MeasureOptions.parse(given, format)
    assert kind.create_options_type is not None
    kind.create_options_type.parse(given, format)
    return None


def measure_new(options: qcow2.MeasureOptions | None, size: int) -> Measurement:
    """An empty image with a disk of ``size`` bytes."""
    return measure_raw(size) if options is None else qcow2.measure_size(options, size)


async def measure_copy(
    options: qcow2.MeasureOptions | None, backend: Backend, progress: Progress = no_progress
) -> Measurement:
    """An image that holds what ``backend`` does."""
    if options is None:
        return measure_raw(backend.length)
    return await qcow2.measure_copy(options, backend, progress)

"""The library for whole images: check, map, measure and resize one without opening it as a disk.

``image``, ``format``, ``force_share``, ``allow_paths`` and ``allow_any_reference`` are those of :func:`fusedisk.open`,
and so are the errors, to which each function adds its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args

from fusedisk import api
from fusedisk.api import Image, Preallocation, callback, gate_for, need_trio, specification, text_or_none
from fusedisk.arguments import AnyPath, choice, flag, mapping, text, whole_number
from fusedisk.block.image.check import open_for_check
from fusedisk.block.image.mapping import MapEntry
from fusedisk.block.image.measure import Measurement
from fusedisk.block.image.resize import resize_image
from fusedisk.block.model.check_result import CheckResult, Repair
from fusedisk.core.errors import NotSupportedError, OptionError
from fusedisk.core.options import parse_size
from fusedisk.drivers.measure import measure_copy, measure_new, target_options
from fusedisk.drivers.table import DRIVERS


async def check(
    image: Image,
    *,
    format: str | None = None,
    repair: Literal["leaks", "all"] | None = None,
    dry_run: bool = False,
    force_share: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckResult:
    """Check the metadata of an image, and repair it: ``"leaks"`` gives leaked space back, ``"all"`` corrects everything
    that is wrong. ``dry_run`` only tells what repairing would do (:attr:`CheckResult.repairs`). ``progress`` is called
    with how much is done and how much there is to do.

    Raises NotSupportedError for a format that has nothing to check.
    """
    need_trio("check")
    mode = Repair.NOTHING if repair is None else Repair(choice("repair", repair, ("leaks", "all")))
    writable = not flag("dry_run", dry_run) and mode is not Repair.NOTHING
    if flag("force_share", force_share) and writable:
        raise OptionError("force_share is for images that another process may write to, which cannot be repaired.")
    advance = callback(progress)
    opening = open_for_check(
        DRIVERS, specification(image), format=text_or_none("format", format), writable=writable, force_share=force_share
    )
    async with opening as found:
        if not found.supported:
            raise NotSupportedError(f"'{found.storage.filename}' is {found.driver.name}, which has nothing to check.")
        return await found.driver.check(found.files, mode, advance, dry_run=dry_run)


async def map(
    image: Image,
    start: int = 0,
    length: int | None = None,
    *,
    format: str | None = None,
    force_share: bool = False,
    allow_paths: Iterable[AnyPath] = (),
    allow_any_reference: bool = False,
) -> list[MapEntry]:
    """Where the bytes of a range lie, by default of the whole disk: the entries of ``qemu-img map``, in order and
    without gaps. :meth:`fusedisk.Disk.extents` gives them one by one.

    Raises OptionError for a start past the end.
    """
    need_trio("map")
    opening = api.open(
        image,
        format=format,
        force_share=force_share,
        allow_paths=allow_paths,
        allow_any_reference=allow_any_reference,
    )
    async with opening as disk:
        return [entry async for entry in disk.extents(start, length)]


async def measure(
    target_format: str,
    size: int | str | None = None,
    *,
    image: Image | None = None,
    options: Mapping[str, Any] | None = None,
    format: str | None = None,
    force_share: bool = False,
    allow_paths: Iterable[AnyPath] = (),
    allow_any_reference: bool = False,
) -> Measurement:
    """How much space a new image would take: one with a disk of ``size`` bytes (or text such as ``"10G"``), or a copy
    of ``image``. ``options`` are the creation options of ``target_format``.

    Raises NotSupportedError for formats other than raw and qcow2, OptionError where not exactly one of ``size`` and
    ``image`` is given.
    """
    need_trio("measure")
    if (image is None) is (size is None):
        raise OptionError("measure needs the size of a new disk or the image to copy, and not both.")
    given = {} if options is None else mapping("options", options)
    target = target_options(DRIVERS, text("target_format", target_format), given)
    if image is None:
        assert size is not None
        return measure_new(target, parse_size(size if isinstance(size, str) else whole_number("size", size)))
    opening = api.open(
        image,
        format=format,
        force_share=force_share,
        allow_paths=allow_paths,
        allow_any_reference=allow_any_reference,
    )
    async with opening as disk:
        return await measure_copy(target, disk._backend)


async def resize(
    image: Image,
    size: int | str,
    *,
    format: str | None = None,
    preallocation: Preallocation = "off",
    shrink: bool = False,
    allow_paths: Iterable[AnyPath] = (),
    allow_any_reference: bool = False,
) -> None:
    """Give the disk of an image that nobody uses another size, in bytes or as text: ``"10G"``, or a difference such as
    ``"+1G"``. What is added reads as zeroes. ``shrink`` allows a smaller size, which loses what lies behind it.

    Raises WouldLoseDataError, NotSupportedError where the format or mode cannot, NoSpaceError.
    """
    need_trio("resize")
    await resize_image(
        DRIVERS,
        specification(image),
        text("size", size) if isinstance(size, str) else whole_number("size", size),
        format=text_or_none("format", format),
        preallocation=choice("preallocation", preallocation, get_args(Preallocation)),
        shrink=flag("shrink", shrink),
        gate=gate_for(allow_paths, allow_any_reference),
    )

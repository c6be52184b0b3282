"""What an image is: the keys and values of ``qemu-img info --output=json`` (QAPI's ImageInfo)."""

from __future__ import annotations

from typing import Any

from fusedisk.block.filenames import resolve_reference
from fusedisk.block.node import Node
from fusedisk.core.errors import FusediskError, OptionError


async def image_information(node: Node) -> dict[str, Any]:
    """One image, without what lies below it; values are JSON's.

    Raises the driver's errors for what has to be asked of the host.
    """
    driver = node.driver
    information: dict[str, Any] = {
        "filename": node.filename,
        "format": driver.name,
        "virtual-size": node.length,
        "dirty-flag": False,
        **driver.information(),
    }
    allocated = await driver.allocated_size()
    if allocated is not None:
        information["actual-size"] = allocated
    information |= _backing_information(node)
    specific = driver.specific_information()
    if specific is not None:
        information["format-specific"] = {"type": driver.name, "data": specific}
    return information


async def chain_information(node: Node) -> tuple[list[dict[str, Any]], FusediskError | None]:
    """The image and each of its backing files, from the top down, and why the next one is not open, if there is one."""
    chain = [await image_information(node)]
    while (below := _below_filters(node)).backing is not None:
        node = below.backing.node
        chain.append(await image_information(node))
    return chain, below.missing_backing


def _below_filters(node: Node) -> Node:
    while node.driver.is_filter:
        node = node.children["file"].node
    return node


def _backing_information(node: Node) -> dict[str, Any]:
    """What the image's header says about its backing file, whether or not that is there."""
    reference = node.driver.backing_reference() if node.driver.supports_backing else None
    if reference is None:
        return {}
    information: dict[str, Any] = {"backing-filename": reference.filename}
    if reference.format is not None:
        information["backing-filename-format"] = reference.format
    storage = node.children.get("file")
    place = storage.node.exact_filename() if storage else None
    try:
        information["full-backing-filename"] = resolve_reference(reference.filename, place)
    except OptionError:
        pass  # a relative name of an image that has no place of its own
    return information

"""Information about an image: the keys and values of ``qemu-img info --output=json`` (QAPI's ImageInfo)."""

from __future__ import annotations

from typing import Any

from fusedisk.block.graph.filenames import resolve_reference
from fusedisk.block.model.node import Node
from fusedisk.core.errors import FusediskError, OptionError


async def image_information(node: Node) -> dict[str, Any]:
    """Return the information about one image, without its backing files, as JSON values.

    Raises the driver's errors from system calls.
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
    """Return the information about the image and each of its backing files, from the top down, and the error that kept
    the next one from being opened, if any."""
    chain = [await image_information(node)]
    while (below := node.unfiltered).backing is not None:
        node = below.backing.node
        chain.append(await image_information(node))
    return chain, below.missing_backing


def _backing_information(node: Node) -> dict[str, Any]:
    """Return the header's data about the backing file, whether or not that file exists."""
    reference = node.driver.backing_reference() if node.driver.supports_backing else None
    if reference is None:
        return {}
    information: dict[str, Any] = {"backing-filename": reference.filename}
    if reference.format is not None:
        information["backing-filename-format"] = reference.format
    storage = node.storage
    place = storage.node.exact_filename() if storage else None
    try:
        information["full-backing-filename"] = resolve_reference(reference.filename, place)
    except OptionError:
        pass  # a relative name in an image without a directory of its own
    return information

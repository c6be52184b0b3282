"""Options for opening and serving images, which command line and library share, and which of them go together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypedDict

from fusedisk.arguments import AnyPath
from fusedisk.core.errors import OptionError


class AccessOptions(TypedDict, total=False):
    """How to open images; see ``fusedisk mount --help``."""

    format: str
    read_only: bool
    overlay: bool
    overlay_file: AnyPath
    key_file: AnyPath
    copy_on_read: bool
    detect_zeroes: Literal["off", "on", "unmap"]
    discard: Literal["ignore", "unmap"]
    cache: Literal["writeback", "writethrough", "none", "directsync", "unsafe"]
    force_share: bool


class ServingOptions(TypedDict, total=False):
    """What a mount does with all of its files; see ``fusedisk mount --help``."""

    kernel_cache: Literal["auto", "off"]
    passthrough: Literal["off", "auto", "on"]
    channel: Literal["auto", "off"]
    allow_path: Iterable[AnyPath]
    allow_any_reference: bool


def check_access(given: Mapping[str, Any], spelt: Callable[[str], str]) -> None:
    """Raise OptionError for options that do not go together. ``spelt`` returns the name that the user
    knows an option by."""
    layered = given.get("overlay") or given.get("overlay_file") is not None
    read_only = spelt("read_only")
    if given.get("overlay") and given.get("overlay_file") is not None:
        raise OptionError(f"{spelt('overlay')} and {spelt('overlay_file')} cannot be combined.")
    if given.get("force_share") and not given.get("read_only"):
        raise OptionError(f"{spelt('force_share')} is for reading images that others may write to: add {read_only}.")
    if not given.get("read_only"):
        return
    if layered:
        raise OptionError(f"an overlay takes writes, which {read_only} forbids: choose one of them.")
    if given.get("copy_on_read"):
        raise OptionError(
            f"{spelt('copy_on_read')} writes what it reads into the image, which {read_only} forbids: "
            "choose one of them."
        )
    if given.get("growable"):
        raise OptionError(f"{spelt('growable')} is about writes, which {read_only} forbids.")

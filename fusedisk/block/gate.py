"""The gate for implicit file references.

An image is input of unknown origin, yet its header may name other files to open: a backing file, a data file. By
default only files in the directory tree of the image that names them may be opened that way, or what the user named;
everything else is refused with a sentence that says which reference it was.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fusedisk.block.filenames import check_filename
from fusedisk.core import paths
from fusedisk.core.errors import GateError


class Gate:
    """Decides which references of images may be followed.

    ``allowed`` are files and directories (with everything below) that the user named; ``allow_any`` opens the gate.
    """

    def __init__(self, allowed: Iterable[str] = (), *, allow_any: bool = False) -> None:
        self.allow_any = allow_any
        self._allowed = [paths.real(path) for path in allowed]

    def allow(self, path: str) -> None:
        """The user named this file or directory."""
        self._allowed.append(paths.real(path))

    def check(self, options: Mapping[str, Any], image: str, reference: str) -> None:
        """Raise GateError unless everything that ``options`` would open may be opened for ``image``.

        What no file can be called is an OptionError.

        ``options`` are nested and normalised, ``reference`` is what the image says, for the message.
        """
        if self.allow_any:
            return
        for name in _node_names(options):
            raise GateError(
                f"'{image}' refers to '{reference}', which uses the node '{name}'; images may name local files only "
                "(allow it with --allow-any-reference if you trust the image)."
            )
        for driver, filename in _leaves(options):
            if filename is None:
                if driver != "null-co":
                    raise GateError(
                        f"'{image}' refers to '{reference}', which uses the protocol '{driver}'; images may name local "
                        "files only (allow it with --allow-any-reference if you trust the image)."
                    )
            elif not self._is_allowed(filename, image):
                place = os.path.dirname(paths.real(filename))
                raise GateError(
                    f"'{image}' refers to '{reference}', which lies outside the image's own directory "
                    f"(allow it with --allow-path {place} if you trust the image)."
                )

    def _is_allowed(self, filename: str, image: str) -> bool:
        check_filename(filename)
        path = paths.real(filename)
        home = os.path.dirname(paths.real(image))
        return any(path == root or path.startswith(root.rstrip("/") + "/") for root in (home, *self._allowed))


_CHILDREN = frozenset(("file", "image", "backing", "data-file", "raw", "test", "log", "target", "vmstate"))
"""Every option, of whatever driver, that may be the name of an open node instead of options; lists always may."""


def _node_names(options: Mapping[str, Any]) -> Iterator[str]:
    """What names nodes that are open already: other people's disks, for all the image knows."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            yield from _node_names(value)
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, str))
            yield from _node_names({str(index): item for index, item in enumerate(value) if isinstance(item, Mapping)})
        elif isinstance(value, str) and key in _CHILDREN:
            yield value


def _leaves(options: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """Every protocol-level opening below ``options``: driver and local file name, None where it is no local file."""
    children = [value for value in options.values() if isinstance(value, Mapping)]
    children += [
        item for value in options.values() if isinstance(value, list) for item in value if isinstance(item, Mapping)
    ]
    driver = options.get("driver")
    filename = options.get("filename")
    if isinstance(filename, str):
        yield str(driver), filename if driver in (None, "file", "host_device") else None
    elif not children:
        yield str(driver), None
    if isinstance(config := options.get("config"), str):
        yield "file", config
    for child in children:
        yield from _leaves(child)

"""Finding drivers by name, by protocol prefix and by probing. The table itself is in the drivers package."""

from __future__ import annotations

import importlib
from collections.abc import Mapping

from fusedisk.block.model.driver import Driver
from fusedisk.core.errors import OptionError


class Registry:
    """Drivers by name, loaded when first needed.

    ``table`` maps a driver's name to ``package.module:Class`` in probe order; ``prefixes`` maps protocol prefixes to
    names; ``probed`` are the names to ask when probing, which are the image formats.
    """

    def __init__(self, table: Mapping[str, str], prefixes: Mapping[str, str], probed: tuple[str, ...]) -> None:
        self._table = table
        self.prefixes = prefixes
        self._probed = probed
        self._loaded: dict[str, type[Driver]] = {}

    @property
    def names(self) -> list[str]:
        """The names of all drivers, in the table's order."""
        return list(self._table)

    @property
    def formats(self) -> tuple[str, ...]:
        """The names of the image formats."""
        return self._probed

    def load(self, name: str) -> type[Driver]:
        """Return the driver class. Raises OptionError for an unknown name."""
        driver = self._loaded.get(name)
        if driver is None:
            place = self._table.get(name)
            if place is None:
                raise OptionError(f"there is no driver '{name}', known image formats are {', '.join(self.formats)}.")
            module, _, attribute = place.partition(":")
            driver = self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return driver

    def load_format(self, name: str) -> type[Driver]:
        """Return the driver class of an image format. Raises OptionError for any other name."""
        if name not in self._table or (driver := self.load(name)).is_protocol or driver.is_filter:
            raise OptionError(f"there is no image format '{name}', known are {', '.join(self.formats)}.")
        return driver

    def by_prefix(self, prefix: str) -> type[Driver] | None:
        """Return the driver for ``prefix:…`` file names."""
        name = self.prefixes.get(prefix)
        return self.load(name) if name else None

    def probe(self, head: bytes, filename: str) -> str:
        """Return the format with the highest score for an image that starts with ``head``; the first wins a tie."""
        scores = {name: self.load(name).probe(head, filename) for name in self._probed}
        return max(scores, key=lambda name: scores[name])

"""What a driver says of its children: their roles, those that the graph opens, the one that an image names."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any, NamedTuple


class Role(enum.Enum):
    """What a child is for its parent."""

    FILE = "file"
    """The protocol-level storage of a format."""
    BACKING = "backing"
    """Holds the data that this layer does not have."""
    DATA_FILE = "data-file"
    """Guest data of a format whose metadata lies in ``file``."""
    DATA = "data"
    """An image or a file with guest data, one of several."""
    FILTERED = "filtered"
    """The child of a filter: same data, same length."""


class ChildSpec(NamedTuple):
    """A child that the graph opens from the options before the driver's ``open`` runs."""

    name: str
    """Also the option that describes the child; ``children.0`` is the first item of the list ``children``."""
    role: Role
    required: bool = True


def children_in_list(options: Mapping[str, Any], name: str, role: Role) -> tuple[ChildSpec, ...]:
    """Return a spec for each item of the list option ``name``."""
    items = options.get(name)
    if not isinstance(items, list) or not items:
        return (ChildSpec(f"{name}.0", role),)  # opening says what is missing
    return tuple(ChildSpec(f"{name}.{index}", role) for index in range(len(items)))


class BackingReference(NamedTuple):
    """A backing file, as named in an image's header."""

    filename: str
    format: str | None

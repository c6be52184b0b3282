"""Fewer parameters for quick runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(values: Iterable[Any], one_in: int = 4) -> list[Any]:
    """The same parameters, a tuple for more than one name; all but one in so many, beginning with the first, are for
    slow runs."""
    return [
        value
        if index % one_in == 0
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.slow)
        for index, value in enumerate(values)
    ]

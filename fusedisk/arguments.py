"""Arguments of the library: what is of a type that cannot be meant is refused before anything is done with it."""

from __future__ import annotations

import operator
import os
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NoReturn, TypeAlias

from fusedisk.block.graph.filenames import check_filename
from fusedisk.core.errors import OptionError

AnyPath: TypeAlias = str | bytes | os.PathLike[str] | os.PathLike[bytes]


def whole_number(name: str, value: Any) -> int:
    """What counts as an int, such as numpy's integers."""
    try:
        return operator.index(value)
    except TypeError:
        _refuse(name, value, "a whole number")


def number_below(name: str, value: Any, limit: int) -> int:
    """A whole number from 0 that is less than ``limit``."""
    number = whole_number(name, value)
    if not 0 <= number < limit:
        raise OptionError(f"{name} is {number}, but it must lie between 0 and {limit - 1}.")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False: of a word nobody knows which one it means."""
    if not isinstance(value, bool):
        _refuse(name, value, "True or False")
    return value


def text(name: str, value: Any) -> str:
    """A string that has bytes, as names in images and on the host do."""
    if not isinstance(value, str):
        _refuse(name, value, "text")
    try:
        os.fsencode(value)
    except UnicodeEncodeError as exc:
        raise OptionError(f"{name} is {value!a}, which has characters that no name can have.") from exc
    return value


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """One of a few words."""
    if text(name, value) not in choices:
        raise OptionError(f"{name} is '{value}', expected one of {', '.join(choices)}.")
    return str(value)


def path(name: str, value: Any) -> str:
    """A path as text, from whatever Python's own functions take for a path."""
    try:
        found = os.fsdecode(value)
    except TypeError:
        _refuse(name, value, "a path")
    return text(name, found)


def paths(name: str, value: Iterable[Any]) -> list[str]:
    """Several paths. One alone, whose characters are paths too, is a mistake."""
    if isinstance(value, str | bytes | os.PathLike | Mapping) or not isinstance(value, Iterable):
        _refuse(name, value, "a list of paths")
    found = [path(f"an item of {name}", item) for item in value]
    for item in found:
        check_filename(item)
    return found


def mapping(name: str, value: Any) -> dict[str, Any]:
    """Options by name."""
    if not isinstance(value, Mapping):
        _refuse(name, value, "a mapping of names to values")
    _check_text(name, value)
    return dict(value)


def _check_text(name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_text(f"the option '{text(f'a name in {name}', key)}'", item)
    elif isinstance(value, list):
        for item in value:
            _check_text(name, item)
    elif isinstance(value, str):
        text(name, value)


def readable(name: str, value: Any) -> memoryview:
    """Bytes of a buffer, whatever its items are."""
    try:
        view = memoryview(value)
    except TypeError:
        _refuse(name, value, "bytes, or an object that holds them as bytes and bytearray do")
    if not view.c_contiguous:
        raise ValueError(f"{name} is a view of bytes that do not lie in one piece; bytes({name}) does.")
    try:
        return view.cast("B")
    except (TypeError, ValueError):
        raise ValueError(f"{name} has items of the format '{view.format}', expected plain bytes.") from None


def fillable(name: str, value: Any) -> memoryview:
    """Bytes of a buffer that can be changed."""
    view = readable(name, value)
    if view.readonly:
        _refuse(name, value, "a buffer that can be written to, such as a bytearray")
    return view


def _refuse(name: str, value: object, wanted: str) -> NoReturn:
    raise TypeError(f"{name} is of the type {type(value).__name__}, expected {wanted}.") from None

"""Options: dotted keys, JSON, sizes, and the dataclasses that drivers declare.

A driver declares one dataclass whose fields carry type, default and help; parsing, the command line's ``-o``
and the documentation come from it. Names are QMP's (``lazy-refcounts``); fields use underscores.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from fusedisk.core.errors import OptionError

_SIZE = re.compile(r"([0-9]{1,20})(?:\.([0-9]{1,20}))?([bkmgtpe]?)(?:i?b)?", re.IGNORECASE | re.ASCII)
_HEXADECIMAL = re.compile(r"0x[0-9a-f]{1,16}", re.IGNORECASE | re.ASCII)
_WHOLE = re.compile(r"-?[0-9]{1,20}")
_SIZE_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}
_PARTS = re.compile(r"((?:[^,]|,,)*),")
_TRUE = frozenset(("on", "true", "yes", "y", "1"))
_FALSE = frozenset(("off", "false", "no", "n", "0"))
_MAX_SIZE = (1 << 63) - 1


def parse_size(text: str | int, what: str = "size") -> int:
    """Bytes from ``10G``, ``512k``, ``1.5T`` or a plain number, decimal or ``0x200``; units are powers of 1024.

    Raises OptionError for anything else, a part of a byte, a negative size, or one of 2**63 and more.
    """
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif _HEXADECIMAL.fullmatch(str(text)):
        size = int(str(text), 16)
    else:
        match = _SIZE.fullmatch(str(text))
        if match is None:
            raise OptionError(f"{what} is '{text}', expected a number of bytes, such as 4096, 512M or 10G.")
        whole, part, unit = match.groups(default="")
        factor = _SIZE_UNITS[unit.lower()]
        if factor == 1 and part.strip("0"):
            raise OptionError(f"{what} is '{text}', expected a whole number of bytes.")
        size = int(whole + part) * factor // 10 ** len(part)
    if not 0 <= size <= _MAX_SIZE:
        raise OptionError(f"{what} is {text}, but it must lie between 0 and 2^63 - 1.")
    return size


def parse_int(value: object, what: str) -> int:
    """A whole number of 64 bits from ``12``, ``-1``, ``0x200`` or JSON's own. Raises OptionError."""
    if isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and _WHOLE.fullmatch(value):
        number = int(value)
    elif isinstance(value, str) and _HEXADECIMAL.fullmatch(value):
        number = int(value, 16)
    else:
        raise OptionError(f"{what} is '{value}', expected a whole number.")
    if not -(1 << 63) <= number < 1 << 64:
        raise OptionError(f"{what} is {number}, expected a whole number of 64 bits.")
    return number


def parse_bool(value: object, what: str) -> bool:
    """``on``/``off`` and their kin, or a JSON boolean."""
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise OptionError(f"{what} is '{value}', expected 'on' or 'off'.")


def split_dotted(text: str) -> dict[str, str]:
    """Flat keys of ``driver=qcow2,file.filename=x``; a doubled comma is a literal one.

    A key without ``=`` is refused; the same key twice is refused.
    """
    flat: dict[str, str] = {}
    for part in _PARTS.findall(f"{text},") if text else []:
        key, equals, value = part.replace(",,", ",").partition("=")
        if not equals or not key:
            raise OptionError(f"'{part}' is not an option, expected KEY=VALUE.")
        if key in flat:
            raise OptionError(f"option '{key}' is given twice.")
        flat[key] = value
    return flat


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested dictionaries, numbered keys (``children.0``) into lists.

    Values that are dictionaries already are nested in turn. Raises OptionError where a key is both a value
    and a prefix of another.
    """
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        if isinstance(value, Mapping):
            value = nest(value)
        *parents, last = key.split(".")
        place = tree
        for name in parents:
            below = place.setdefault(name, {})
            if not isinstance(below, dict):
                raise OptionError(f"option '{name}' is given as a value and as the group of '{key}'.")
            place = below
        group = place.get(last)
        if isinstance(value, dict) and isinstance(group, dict):
            for twice in value.keys() & group.keys():
                raise OptionError(f"option '{key}.{twice}' is given twice.")
            group.update(value)
        elif last in place:
            raise OptionError(f"option '{key}' is given as a value and as a group.")
        else:
            place[last] = value
    return {key: _lists(value) for key, value in tree.items()}


def _lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    value = {key: _lists(item) for key, item in value.items()}
    if value and all(key.isdigit() for key in value):
        indices = [str(index) for index in range(len(value))]
        if value.keys() != set(indices):
            raise OptionError(f"list indices {', '.join(value)} do not run from 0 without gaps.")
        return [value[index] for index in indices]
    return value


def parse_options(text: str) -> dict[str, Any]:
    """Nested options from a command-line argument: a JSON object or dotted keys."""
    if text.lstrip().startswith("{"):
        return parse_json(text)
    return nest(split_dotted(text))


def parse_json(text: str) -> dict[str, Any]:
    """Nested options from a JSON object, whose keys may be dotted too."""
    try:
        value = json.loads(text)
        if isinstance(value, dict):
            return nest(value)
    except (ValueError, RecursionError) as exc:
        raise OptionError(f"the JSON options could not be read: {exc}.") from exc
    raise OptionError(f"the JSON options are a {type(value).__name__}, expected an object.")


def option(
    default: Any = None, *, help: str, kind: str = "str", choices: tuple[str, ...] = (), name: str | None = None
) -> Any:
    """A field of an options dataclass; ``kind`` is one of str, int, bool, size, and file: the path of a file that is
    read beside the image. ``name``: what the option is called where the field's name does not say it, as with dots."""
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind, "choices": choices, "name": name})


@dataclasses.dataclass(slots=True)
class Options:
    """Base of all option dataclasses."""

    name_separator: ClassVar[str] = "-"

    @classmethod
    def names(cls) -> dict[str, dataclasses.Field[Any]]:
        """Option name (QMP's spelling) to its field."""
        return {
            field.metadata.get("name") or field.name.replace("_", cls.name_separator): field
            for field in dataclasses.fields(cls)
        }

    @classmethod
    def parse(cls, given: Mapping[str, Any], owner: str) -> Self:
        """Build from nested options. ``owner`` names the driver in errors. None keeps a default.

        Raises OptionError for unknown names and values of the wrong kind.
        """
        names = cls.names()
        values: dict[str, Any] = {}
        for key, value in flatten(given).items():
            field = names.get(key)
            if field is None:
                known = ", ".join(sorted(names)) or "none"
                raise OptionError(f"{owner} has no option '{key}' (it has: {known}).")
            if value is not None:
                values[field.name] = _convert(value, field, f"{owner} option '{key}'")
        return cls(**values)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults, by QMP name."""
        return {
            name: getattr(self, field.name)
            for name, field in self.names().items()
            if getattr(self, field.name) != field.default
        }


@dataclasses.dataclass(slots=True)
class CreateOptions(Options):
    """Base of creation options, named with underscores as ``qemu-img create -o`` does."""

    name_separator: ClassVar[str] = "_"


def _convert(value: Any, field: dataclasses.Field[Any], what: str) -> Any:
    kind = field.metadata.get("kind", "str")
    if kind == "size":
        return parse_size(value, what)
    if kind == "bool":
        return parse_bool(value, what)
    if kind == "int":
        return parse_int(value, what)
    if not isinstance(value, str):
        raise OptionError(f"{what} is a {type(value).__name__}, expected a string.")
    choices = field.metadata.get("choices") or ()
    if choices and value not in choices:
        raise OptionError(f"{what} is '{value}', expected one of {', '.join(choices)}.")
    return value


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The inverse of :func:`nest`."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        elif isinstance(value, list):
            flat.update(flatten({str(i): item for i, item in enumerate(value)}, f"{name}."))
        else:
            flat[name] = value
    return flat

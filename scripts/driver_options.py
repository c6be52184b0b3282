"""Write the tables of docs/reference/drivers.md from what the drivers declare: ``python -m scripts.driver_options``."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from fusedisk.core.options import Options
from fusedisk.drivers.table import DRIVERS

PAGE = Path(__file__).resolve().parent.parent / "docs/reference/drivers.md"
_TABLE = re.compile(r"(<!-- (\S+) (open|create|amend) -->\n).*?(<!-- end -->)", re.DOTALL)


def page(text: str) -> str:
    """Return the page with each table between its comments made anew."""
    return _TABLE.sub(lambda match: f"{match[1]}{_table(match[2], match[3])}{match[4]}", text)


def tables() -> set[tuple[str, str]]:
    """Return driver and occasion of every table that there is something to put in."""
    return {(name, kind) for name in DRIVERS.names for kind in ("open", "create", "amend") if _options(name, kind)}


def shown(text: str) -> set[tuple[str, str]]:
    """Return driver and occasion of every table of a page."""
    return {(match[2], match[3]) for match in _TABLE.finditer(text)}


def _options(name: str, kind: str) -> dict[str, dataclasses.Field[object]]:
    driver = DRIVERS.load(name)
    declared: type[Options] | None = {
        "open": driver.options_type,
        "create": driver.create_options_type,
        "amend": driver.amend_options_type,
    }[kind]
    return {} if declared is None else declared.names()


def _table(name: str, kind: str) -> str:
    rows = [f"| `{option}` | {_default(field)} | {_help(field)} |\n" for option, field in _options(name, kind).items()]
    return f"\n| option | default | |\n| --- | --- | --- |\n{''.join(rows)}\n"


def _default(field: dataclasses.Field[object]) -> str:
    match field.default:
        case None | "":
            return ""
        case bool() as value:
            return "`on`" if value else "`off`"
        case value:
            return f"`{value}`"


def _help(field: dataclasses.Field[object]) -> str:
    text = str(field.metadata["help"]).replace("|", "\\|")
    missing = [choice for choice in field.metadata["choices"] if choice not in text]
    if missing:
        text += f" ({', '.join(f'`{choice}`' for choice in field.metadata['choices'])})"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text()))

"""The arrows between packages point down, and only fusedisk/mount knows pyfuse3.

Every module is parsed, never imported, so that lazy imports inside functions and behind TYPE_CHECKING count
too, as do literal names given to importlib.import_module.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LEVELS: tuple[frozenset[str], ...] = (
    frozenset({"core"}),
    frozenset({"compression", "crypto"}),
    frozenset({"block", "block/model"}),
    frozenset({"block/request"}),
    frozenset({"block/graph"}),
    frozenset({"block/image"}),
    frozenset({"drivers"}),
    frozenset({"export", "jobs"}),
    frozenset({"__init__", "access", "api", "arguments", "errors", "forgotten", "images", "mounts", "sync"}),
    frozenset({"mount", "qmp"}),
    frozenset({"cli", "__main__"}),
)
"""Parts of the package, lowest first. A part imports itself and lower levels, never a sibling."""

ONE_UNIT = {
    **dict.fromkeys(("__init__", "access", "arguments", "errors", "forgotten", "images", "mounts", "sync"), "api"),
    "__main__": "cli",
}
"""Single modules that belong to another part of their level: the public API, and `python -m fusedisk`."""

ONLY_IN = {"pyfuse3": "mount"}
"""Outside packages that one part alone may import."""

LEVEL_OF = {part: level for level, parts in enumerate(LEVELS) for part in parts}


def part_of(module: str) -> str:
    """The part that a dotted name inside the package belongs to: ``fusedisk.crypto.luks`` is in ``crypto``, and
    ``fusedisk.block.request.io`` in ``block/request``, one of the four floors of ``block``."""
    pieces = module.split(".")
    if pieces[1:2] == ["block"] and len(pieces) > 2:
        return "/".join(pieces[1:3])
    return pieces[1] if len(pieces) > 1 else "__init__"


def imports_of(tree: ast.AST, root: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a module imports; a relative import starts with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            if source not in ("fusedisk", "fusedisk.block"):
                yield node.lineno, source
                continue
            if source == "fusedisk.block":
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
                continue
            # `from fusedisk import core` means the package, any other name the public API.
            for alias in node.names:
                inside = root / "fusedisk" / alias.name
                is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
                yield node.lineno, f"fusedisk.{alias.name}" if is_module else "fusedisk"
        elif isinstance(node, ast.Call) and node.args and _is_import_call(node.func):
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node.lineno, name.value


def _is_import_call(func: ast.expr) -> bool:
    called = func.attr if isinstance(func, ast.Attribute) else func.id if isinstance(func, ast.Name) else ""
    return called in {"import_module", "__import__"}


def violation(importer: str, imported: str) -> str | None:
    """Why a module of part *importer* must not import the dotted name *imported*; None when it may."""
    if imported.startswith("."):
        return "imports are absolute"
    package = imported.split(".")[0]
    if package in ONLY_IN and importer != ONLY_IN[package]:
        return f"{package} belongs to fusedisk/{ONLY_IN[package]} alone"
    if package != "fusedisk":
        return None
    target = part_of(imported)
    if target not in LEVEL_OF:
        return f"fusedisk.{target} has no place in the architecture"
    if ONE_UNIT.get(importer, importer) == ONE_UNIT.get(target, target):
        return None
    if LEVEL_OF[target] >= LEVEL_OF[importer]:
        return f"{importer} must not import {target}: arrows point down"
    return None


def violations(root: Path) -> list[str]:
    """Every wrong import below ``root/fusedisk``, as ``file:line: import: reason``."""
    found = []
    for path in sorted((root / "fusedisk").rglob("*.py")):
        where = path.relative_to(root)
        importer = part_of(".".join((where.parent if where.name == "__init__.py" else where.with_suffix("")).parts))
        if importer not in LEVEL_OF:
            found.append(f"{where}:1: {importer} has no place in the architecture")
            continue
        tree = ast.parse(path.read_bytes(), filename=str(where))
        for line, imported in imports_of(tree, root):
            reason = violation(importer, imported)
            if reason is not None:
                found.append(f"{where}:{line}: {imported}: {reason}")
    return found


def test_arrows_point_down() -> None:
    assert list((ROOT / "fusedisk").rglob("*.py")), "no module of the package was found"
    wrong = violations(ROOT)
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A made-up tree in which every part exists and nothing is wrong."""
    floors = ("block", "block/model", "block/request", "block/graph", "block/image")
    for part in ("core", "crypto", *floors, "drivers", "export", "jobs", "mount", "qmp", "cli"):
        folder = tmp_path / "fusedisk" / part
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("import fusedisk.core.errors\n")
    (tmp_path / "fusedisk/core/errors.py").write_text("import os\n")
    (tmp_path / "fusedisk/__init__.py").write_text("from fusedisk.api import open\n")
    (tmp_path / "fusedisk/__main__.py").write_text("from fusedisk.cli.main import main\n")
    (tmp_path / "fusedisk/api.py").write_text("from fusedisk import block, core, drivers, export\n")
    (tmp_path / "fusedisk/mount/ops.py").write_text("import pyfuse3\nfrom fusedisk.export import disk\n")
    return tmp_path


def test_a_right_tree_passes(tree: Path) -> None:
    assert violations(tree) == []


@pytest.mark.parametrize(
    ("path", "source", "reason"),
    [
        ("block/image/bad.py", "import fusedisk.drivers.table", "block/image must not import drivers"),
        ("block/model/bad.py", "from fusedisk import drivers", "block/model must not import drivers"),
        ("block/graph/bad.py", "def f():\n    from fusedisk.mount import ops", "block/graph must not import mount"),
        ("block/model/bad.py", "from fusedisk.block.request import io", "block/model must not import block/request"),
        ("block/request/bad.py", "import fusedisk.block.graph.gate", "block/request must not import block/graph"),
        ("block/graph/bad.py", "from fusedisk.block import image", "block/graph must not import block/image"),
        (
            "core/bad.py",
            "import importlib\nimportlib.import_module('fusedisk.block')",
            "core must not import block",
        ),
        ("crypto/bad.py", "import fusedisk.block.model.node", "crypto must not import block/model"),
        ("core/bad.py", "from fusedisk import __version__", "core must not import __init__"),
        ("jobs/bad.py", "import fusedisk.export.disk", "jobs must not import export"),
        ("qmp/bad.py", "import fusedisk.mount.ops", "qmp must not import mount"),
        ("export/bad.py", "import fusedisk.api", "export must not import api"),
        ("api.py", "import fusedisk.mount.ops", "api must not import mount"),
        ("export/bad.py", "import pyfuse3", "pyfuse3 belongs to fusedisk/mount alone"),
        ("cli/bad.py", "from pyfuse3 import FUSEError", "pyfuse3 belongs to fusedisk/mount alone"),
        ("drivers/bad.py", "from . import table", "imports are absolute"),
        ("util.py", "import os", "util has no place in the architecture"),
        ("cli/bad.py", "import fusedisk.util", "util has no place in the architecture"),
    ],
)
def test_a_wrong_import_is_found(tree: Path, path: str, source: str, reason: str) -> None:
    (tree / "fusedisk" / path).write_text(source + "\n")
    found = violations(tree)
    assert len(found) == 1, found
    assert found[0].startswith(f"fusedisk/{path}:")
    assert reason in found[0]

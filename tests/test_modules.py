"""How the modules of the core and of the plugins depend on each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from conftest import ROOT


def modules() -> dict[str, Path]:
    """The source files by the names under which they are imported."""
    found = {}
    for source in (ROOT / "src", *ROOT.glob("plugins/*/src")):
        for path in source.rglob("*.py"):
            parts = path.relative_to(source).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """What a module imports as it is imported itself: neither in functions nor for types alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
            yield node.module
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from (name for other in node.orelse for name in imports(ast.Module([other], [])))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(node)


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    assert len(known) > 250
    needs: dict[str, set[str]] = {}
    for name, path in known.items():
        names = set(imports(ast.parse(path.read_text(), str(path))))
        # `from package import module` needs the module, not what else the package holds.
        inner = {n for n in names if n in known and n != name}
        needs[name] = {n for n in inner if not any(other.startswith(f"{n}.") for other in inner)}
    try:
        list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        pytest.fail(" needs ".join(error.args[1][::-1]))

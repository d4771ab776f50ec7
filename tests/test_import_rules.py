"""Imports point in one direction: see the layout in CONTRIBUTING.md."""

import ast
from functools import cache
from pathlib import Path

import pytest

import shunted_lit

ROOT = Path(shunted_lit.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# What each part of the package may import of the others, at any place in a file.
UTILS = {"utils"}
LOWER = {"models", "data", "visualization", *UTILS}
MAY_IMPORT = {
    "utils": set(),
    "models": UTILS,
    "data": UTILS,
    "visualization": {"models", "data", *UTILS},
    "tasks": LOWER,
    "training": {"tasks", *LOWER},
    "prediction": {"tasks", *LOWER},
    "export": {"tasks", *LOWER},
    "commands": {"training", "export", "prediction", "tasks", "ultralytics", *LOWER},
    "cli": {"commands", "training", "export", "prediction", "tasks", "ultralytics", *LOWER},
    "ultralytics": {"models", *UTILS},
    "__main__": {"cli"},
    "__init__": {"models", *UTILS},
}
FORBIDDEN = {"models": {"lightning", "jsonargparse", "matplotlib"}, "utils": {"jsonargparse", "matplotlib"}}


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def imports(path: Path) -> frozenset[tuple[str, int, bool]]:
    """Return the name, the line, and whether it is at the top of the file, of each import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body} | {
        id(node) for block in tree.body if isinstance(block, ast.Try | ast.If) for node in ast.walk(block)
    }
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.name, node.lineno, id(node) in top) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            names |= {(f"{node.module}.{alias.name}", node.lineno, id(node) in top) for alias in node.names}
    return frozenset(names)


def modules_imported(path: Path) -> set[Path]:
    """Return the files of this package that a file imports when it is itself imported."""
    files = set()
    for name, _, top in imports(path):
        parts = name.split(".")
        if top and parts[0] == "shunted_lit":
            places = [ROOT.joinpath(*parts[1:]), ROOT.joinpath(*parts[1:-1])]
            candidates = [f for place in places for f in (place.with_suffix(".py"), place / "__init__.py")]
            files |= {next(file for file in candidates if file.is_file())}
    return files


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_lower_parts(path):
    part = part_of(path)
    allowed = MAY_IMPORT[part] | {part}
    faults = []
    for name, line, _ in imports(path):
        library, _, rest = name.partition(".")
        other = rest.partition(".")[0]
        if library in FORBIDDEN.get(part, ()):
            faults.append(f"{path}:{line}: {part} must not import {library}")
        is_part = bool(other) and ((ROOT / other).is_dir() or (ROOT / f"{other}.py").is_file())
        if library == "shunted_lit" and is_part and other not in allowed:
            faults.append(f"{path}:{line}: {part} must not import {name}")
    assert not faults, "\n".join(faults)


def test_no_file_imports_itself_through_others():
    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(str(file.relative_to(ROOT)) for file in [*trail, path])
        if path not in done:
            for file in modules_imported(path) - {ROOT / "__init__.py"}:
                visit(file, (*trail, path))
            done.add(path)

    done: set[Path] = set()
    for path in FILES:
        visit(path, ())


def test_ultralytics_is_imported_on_request_only():
    for path in FILES:
        if part_of(path) != "ultralytics":
            found = [(name, line) for name, line, top in imports(path) if top and "ultralytics" in name]
            assert not found, f"{path}: {found}"

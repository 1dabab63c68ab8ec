"""Imports run downwards only, and the README's file map is the tree."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Lowest floor first: a module imports from its own floor or from below.
FLOORS: list[set[str]] = [
    {"publish", "interrupts", "trust"},
    {"arrow", "loss", "machine", "named", "parsing", "runs", "selection"},
    {"data"},
    {"models"},
    {"checkpoints", "trainer"},
    {"estimate", "costs"},
    {"scoring", "evaluation"},
    {"training"},
    {"cleaning"},
    {"plan", "finished"},
    {"report", "export"},
    {"commands", "noise_verb", "study", "cli", "__main__"},
]


#: Folders of many small files that the file map lists as one.
FAMILIES = ("rules", "weighting")


def floor(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def test_imports_run_downwards() -> None:
    for path in (ROOT / "tokenclean").rglob("*.py"):
        parts = path.relative_to(ROOT / "tokenclean").with_suffix("").parts
        if parts == ("__init__",):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                deeper = [f"{node.module}.{a.name}" for a in node.names]
                names = deeper if node.module == "tokenclean" else [node.module]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            for name in names:
                room = name.split(".")[1:2]
                if name.startswith("tokenclean.") and room != ["__version__"]:
                    assert floor(room[0]) <= floor(parts[0]), f"{path.name} imports {name}"


def test_selection_needs_no_framework() -> None:
    allowed = {
        *("numpy", "scipy", "skimage", "torch", "tokenclean"),
        *("collections", "contextlib", "dataclasses", "datetime", "functools", "itertools"),
        *("math", "os", "typing", "__future__"),
    }
    for path in (ROOT / "tokenclean" / "selection").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert node.module.split(".")[0] in allowed, f"{path.name}: {node.module}"
            elif isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed


def test_the_readmes_commands_name_files_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:configs|scripts|tokenclean)/[\w./-]+\.(?:yaml|sh|py)", readme))
    assert len(named) > 20
    assert not {name for name in named if not (ROOT / name).is_file()}


def test_the_readmes_file_map_is_the_tree() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^`(tokenclean/[\w/]+\.py)`", readme, flags=re.M)) | set(
        re.findall(r"^\| `(tokenclean/[\w/]+\.py)`", readme, flags=re.M)
    )
    tree = {
        str(p.relative_to(ROOT))
        for p in (ROOT / "tokenclean").rglob("*.py")
        if p.name not in ("__init__.py", "__main__.py") and p.parent.name not in FAMILIES
    }
    assert listed == tree

"""The rooms of the house: imports run downward, no circle, and what may stay inside a function."""

import ast
import sys
from pathlib import Path

import pytest

from repo.structure import PACKAGES, circles, imports, inner_imports, source_files

ROOT = Path(__file__).parents[2]

GROUND_FLOOR = "ground floor"
ROOMS = [GROUND_FLOOR, "models", "pipelines", "data", "evaluation", "training", "app", "cli"]
"""Rooms of complexity_dit; each may import those before it."""


def room(module: str) -> str:
    """The room of a module of complexity_dit; the command line's entry is above all."""
    parts = module.split(".")
    if parts[-1] == "__main__":
        return "cli"
    return parts[1] if len(parts) > 2 or parts[-1] in ROOMS else GROUND_FLOOR


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_circles(package: str) -> None:
    assert circles(ROOT, package) == []


def test_rooms_import_downward() -> None:
    modules = source_files(ROOT, "complexity-dit")
    upward = [
        f"{name} imports {target}"
        for name, path in modules.items()
        if name != "complexity_dit"
        for target, _ in imports(name, path, modules)
        if target != "complexity_dit" and ROOMS.index(room(target)) > ROOMS.index(room(name))
    ]
    assert not upward


def test_a_circle_is_found(tmp_path: Path) -> None:
    source = tmp_path / "packages" / "inl-core" / "src" / "inl_core"
    source.mkdir(parents=True)
    (source / "__init__.py").write_text("")
    (source / "a.py").write_text("from inl_core import b\n")
    (source / "b.py").write_text("def f():\n    from inl_core.a import x\n")
    (source / "c.py").write_text("from inl_core.a import x\n")
    assert circles(tmp_path, "inl-core") == [["inl_core.a", "inl_core.b"]]
    assert inner_imports([source / "b.py"]) == 1


def test_processes_wait_for_each_other_in_one_module() -> None:
    """The default group of torch and accelerate gives up after minutes of work by one process."""
    waits = {
        "wait_for_everyone", "main_process_first", "local_main_process_first", "barrier",
        "all_reduce", "all_gather_object", "broadcast_object_list", "PartialState",
    }  # fmt: skip
    found = {
        path.name
        for path in source_files(ROOT, "complexity-dit").values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in waits
    }
    assert found == {"distributed.py"}


def test_the_shared_room_needs_torch_inside_functions_only() -> None:
    """And the parser of the command lines, which is the extra `settings`."""
    allowed = set(sys.stdlib_module_names) | {"inl_core", "yaml", "jsonargparse"}
    folder = ROOT / "packages" / "inl-core" / "src" / "inl_core" / "run"
    for path in folder.glob("*.py"):
        heads = {
            line.split()[1].partition(".")[0]
            for line in path.read_text().splitlines()
            if line.startswith(("import ", "from "))
        }
        assert heads <= allowed, path.name

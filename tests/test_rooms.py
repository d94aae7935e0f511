"""Who may import whom: the rooms of the package, and what importing it costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import equipoise

PACKAGE = Path(equipoise.__file__).parent
FREE = {"errors", "lock", "routing"}
ALLOWED = {
    "routing": set(),
    "errors": set(),
    "lock": set(),
    "models": set(),
    "metrics": set(),
    "trace": {"metrics"},
    "nn": set(),
    # A trace is where training writes the load of each step, as capture does that of inference.
    "balance": {"models", "nn", "metrics", "trace"},
    "capture": {"models", "trace", "metrics"},
    "diagnose": {"trace", "metrics"},
    "report": {"trace", "metrics", "diagnose"},
    "lab": {"nn", "balance", "capture", "metrics"},
    "cli": {"capture", "models", "trace", "metrics", "diagnose", "report", "lab", "balance"},
}


def imports(source: str) -> set[str]:
    """Rooms of equipoise that a module's source imports, anywhere in it."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        rooms |= {n.split(".")[1] for n in names if n.startswith("equipoise.") and n.count(".")}
    return rooms & set(ALLOWED)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE or p.stem in FREE)


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_room_imports_only_what_it_may(path: Path) -> None:
    room = room_of(path)
    assert imports(path.read_text()) - {room} - FREE <= ALLOWED[room]


def test_rooms_list_what_they_load_late_without_loading_it() -> None:
    code = """
import importlib, sys
for room in ("equipoise", "equipoise.report", "equipoise.lab", "equipoise.balance"):
    module = importlib.import_module(room)
    before, listed = set(sys.modules), dir(module)
    assert set(sys.modules) == before, room
    assert len(listed) == len(set(listed)), room
    assert {*module.__all__, *getattr(module, "_ROOMS", ())} <= set(listed), room
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr


def test_the_walk_sees_an_upward_import() -> None:
    assert imports("def f():\n    from equipoise.cli import main") == {"cli"}
    assert imports("import equipoise.report.html as h") == {"report"}
    assert imports("from equipoise import models") == {"models"}


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint(' '.join(sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_and_its_commands_loads_nothing_heavy() -> None:
    loaded = loaded_after("import equipoise, equipoise.cli")
    assert not loaded & {"torch", "transformers", "numpy", "pyarrow", "numba"}


def test_the_import_check_can_fail() -> None:
    assert "numpy" in loaded_after("import equipoise; equipoise.Trace")


def test_every_public_name_resolves() -> None:
    for name in equipoise.__all__:
        assert getattr(equipoise, name) is not None

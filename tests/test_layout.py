"""The rules between rooms: who may import whom, and what stays quick to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {path.name for path in (ROOT / "utils").iterdir() if (path / "__init__.py").exists()}
SOURCES = sorted([*ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("utils/**/*.py")])
SCRIPTS = sorted(ROOT.glob("play-scripts/**/*.py"))
INNER = ("algorithm", "engines", "rewards", "log")  # what a run stands on
OUTER = ("preflight", "run", "plots", "ablations", "hub", "export")  # what stands around it
FORBIDDEN = dict.fromkeys(INNER, OUTER) | {"run": ("ablations", "hub", "export")}
FORBIDDEN["preflight"] = ("run", "plots", "ablations", "hub", "export")
FORBIDDEN["algorithm"] = (*OUTER, "engines", "rewards", "log")


def module_of(path: Path) -> str:
    """utils/run/build.py -> utils.run.build; a script has its bare name, which is how scripts import each other."""
    if path in SCRIPTS:
        return path.stem
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in [*SOURCES, *SCRIPTS]}


@cache
def imports(path: Path) -> frozenset[str]:
    """Modules of the project that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    own = module_of(path)
    return frozenset(name for name in names if name in MODULES and name != own)


def test_the_rules_name_rooms_that_exist() -> None:
    assert {*INNER, *OUTER} == ROOMS


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_room_imports_none_that_it_must_not_know(path: Path) -> None:
    room = path.relative_to(ROOT).parts[1] if path.parent.name in ROOMS else ""
    seen = {name.split(".")[1] for name in imports(path) if name.startswith("utils.")}
    assert not seen & set(FORBIDDEN.get(room, ())), f"{path.relative_to(ROOT)} imports {seen}"
    scripts = {name for name in imports(path) if MODULES[name] in SCRIPTS}
    assert not scripts, f"{path.relative_to(ROOT)} imports a play-script"


def test_no_two_files_import_each_other() -> None:
    """Nor along any longer way around."""
    finished: set[Path] = set()

    def visit(path: Path, above: tuple[Path, ...]) -> None:
        assert path not in above, " -> ".join(str(p.relative_to(ROOT)) for p in [*above[above.index(path) :], path])
        if path not in finished:
            for name in imports(path):
                visit(MODULES[name], (*above, path))
            finished.add(path)

    for path in MODULES.values():
        visit(path, ())


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith("utils.preflight")] + ["train_grpo"])
def test_what_comes_before_a_run_imports_no_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

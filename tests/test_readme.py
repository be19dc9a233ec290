"""The README against the code: its tables, its commands, its layout, and the files it names."""

from __future__ import annotations

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def tables(*options: str) -> subprocess.CompletedProcess:
    script = ROOT / "play-scripts" / "write_readme_tables.py"
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)


def test_config_and_metric_tables_are_those_of_the_code() -> None:
    done = tables("--check")
    assert done.returncode == 0, done.stderr


def test_another_option_than_check_leaves_the_readme_alone() -> None:
    before = (ROOT / "README.md").stat().st_mtime_ns
    assert "exit status 1 if the README is out of date" in tables("--help").stdout
    assert tables("--chek-it").returncode == 2
    assert (ROOT / "README.md").stat().st_mtime_ns == before


def test_a_changed_table_is_out_of_date() -> None:
    script = runpy.run_path(str(ROOT / "play-scripts" / "write_readme_tables.py"))
    changed = README.replace("| `seed` | `1337` |", "| `seed` | `1338` |")
    assert changed != README
    assert script["with_tables"](changed) == script["with_tables"](README)


def layout() -> dict[str, int]:
    """The README's table of files, as {module or package: level}."""
    table = README.split("<!-- layout -->")[1].split("<!-- /layout -->")[0]
    levels = {}
    for level, files in re.findall(r"^\| (\d) \| ([^|]+) \|", table, re.MULTILINE):
        for file in re.findall(r"`([^`]+)`", files):
            levels[file.removesuffix("/").removesuffix(".py").replace("/", ".")] = int(level)
    return levels


def test_the_layout_is_in_the_order_of_its_levels() -> None:
    levels = list(layout().values())
    assert len(levels) > 40
    assert levels == sorted(levels)


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = [
    path
    for path in [*ROOT.glob("*.py"), *ROOT.glob("configs/*.py"), *ROOT.glob("utils/**/*.py")]
    if module_of(path) not in ("utils", "configs")
]
MODULES = {module_of(path) for path in SOURCES}


def place(module: str) -> str | None:
    """The entry of the layout that a module belongs to: itself, or its package."""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in layout()), None)


def imports(path: Path) -> set[str]:
    """Modules of the project that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & MODULES


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_from_levels_below_its_own(path: Path) -> None:
    own = place(module_of(path))
    assert own is not None, f"{path.name} has no place in the README's layout"
    for module in imports(path):
        other = place(module)
        assert other == own or layout()[other] < layout()[own], f"{own} imports {other}"


def test_the_layout_names_no_file_that_is_gone() -> None:
    for name in layout():
        path = ROOT / name.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), name


def test_files_and_commands_that_the_readme_names_exist() -> None:
    without_tables = re.sub(r"<!-- (config|metrics) -->.*?<!-- /\1 -->", "", README, flags=re.DOTALL)
    for name in re.findall(r"(?:python|bash) ([\w./-]+\.(?:py|sh))", without_tables):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"--config ([\w./-]+\.yaml)", without_tables):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"^make ([\w-]+)", without_tables, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", without_tables):
        assert (ROOT / link).exists(), link


def test_nothing_in_the_repository_names_a_machine() -> None:
    suspicious = re.compile(r"(^|[^\w.])/(work|root|home)/\w")
    for path in [*SOURCES, *ROOT.glob("play-scripts/*"), *ROOT.glob("configs/**/*.yaml"), ROOT / "README.md"]:
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            assert not suspicious.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"

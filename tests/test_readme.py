"""The README against the code: its tables, its commands, and the files it names."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

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
    for path in [
        *ROOT.glob("*.py"),
        *ROOT.glob("utils/**/*.py"),
        *ROOT.glob("play-scripts/**/*"),
        *ROOT.glob("configs/**/*.yaml"),
        ROOT / "README.md",
    ]:
        for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], 1):
            assert not suspicious.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"

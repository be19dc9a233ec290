"""The README against the code: its tables, its commands, and the files it names."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


DOCS = sorted((ROOT / "docs").glob("*.md"))


def tables(*options: str) -> subprocess.CompletedProcess:
    script = ROOT / "play-scripts" / "write_docs_tables.py"
    return subprocess.run([sys.executable, str(script), *options], capture_output=True, text=True)


def test_config_and_metric_tables_are_those_of_the_code() -> None:
    done = tables("--check")
    assert done.returncode == 0, done.stderr


def test_another_option_than_check_writes_nothing() -> None:
    before = [page.stat().st_mtime_ns for page in DOCS]
    assert "exit status 1 if a page is out of date" in tables("--help").stdout
    assert tables("--chek-it").returncode == 2
    assert [page.stat().st_mtime_ns for page in DOCS] == before


def test_a_changed_table_is_out_of_date() -> None:
    script = runpy.run_path(str(ROOT / "play-scripts" / "write_docs_tables.py"))
    page = (ROOT / "docs" / "config.md").read_text()
    changed = page.replace("| `seed` | `1337` |", "| `seed` | `1338` |")
    assert changed != page
    assert script["with_tables"](changed) == script["with_tables"](page)


def test_the_loop_in_the_readme_is_the_one_that_runs() -> None:
    shown = README.split("<!-- loop -->\n```python\n")[1].split("```\n<!-- /loop -->")[0]
    assert shown in (ROOT / "train_grpo.py").read_text()


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 170


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS], ids=lambda page: page.name)
def test_files_and_commands_that_a_page_names_exist(page: Path) -> None:
    without_tables = re.sub(r"<!-- (config|metrics) -->.*?<!-- /\1 -->", "", page.read_text(), flags=re.DOTALL)
    for name in re.findall(r"(?:python|bash) ([\w./-]+\.(?:py|sh))", without_tables):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"--config ([\w./-]+\.yaml)", without_tables):
        assert (ROOT / name).is_file(), name
    for target in re.findall(r"^make ([\w-]+)", without_tables, re.MULTILINE):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", without_tables):
        assert (page.parent / link).exists(), link


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


def test_scale_by_hand() -> None:
    """1,543,714,304 weights: 3.087 GB in bfloat16; an H100 reads them 1,024 times in 0.944 s."""
    script = runpy.run_path(str(ROOT / "play-scripts" / "write_docs_tables.py"))
    assert script["all_reduce_bytes"](3_087_428_608, 2) == 3_087_428_608  # half of it, twice
    assert script["all_reduce_bytes"](3_087_428_608, 8) == 5_403_000_064
    assert script["LINKS"]["PCIe 4 x16"] == pytest.approx(31.5e9, rel=1e-3)
    h100 = script["STEPS"][0]
    assert h100.total == pytest.approx(7.8)
    # rollout 0.944 + 1.856 / 4, evaluation 0.944 / 4 + 1.056 / 4, update 2.2 / 4, 9.261 GB at 450 GB/s, 0.5, 0.3
    assert script["step_on_cards"](h100, 4) == pytest.approx(1.408 + 0.500 + 0.550 + 0.0206 + 0.8, abs=2e-3)

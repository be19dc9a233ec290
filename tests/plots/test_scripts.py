"""plot_runs.py and summarize_runs.py, as they are called."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
from plot_cases import (
    PROJECT,
    run_script,
    write_run,
)


@pytest.mark.parametrize(
    ("out", "sources", "place"),
    [
        (None, ["runs/a"], "runs/a/curves.png"),
        (None, ["runs/a", "runs/b/seed_0"], "runs/curves.png"),
        (None, ["runs/a", "."], "curves.png"),
        (None, ["runs/all.csv", "wandb:me/project", "nowhere"], "runs/curves.png"),
        (None, ["wandb:me/project"], "curves.png"),
        ("lr_1.5e-5", ["runs/a"], "lr_1.5e-5.png"),
        ("new/picture.svg", ["runs/a"], "new/picture.png"),
        ("runs", ["runs/a"], "runs/curves.png"),
    ],
)
def test_where_a_figure_goes(tmp_path: Path, monkeypatch, out: str | None, sources: list[str], place: str) -> None:
    for folder in ("runs/a", "runs/b/seed_0"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "runs" / "all.csv").touch()
    monkeypatch.chdir(tmp_path)
    place_of_figure = runpy.run_path(str(PROJECT / "play-scripts" / "plot_runs.py"))["place_of_figure"]
    assert place_of_figure(Path(out) if out else None, sources) == Path(place)


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """plot_runs.py within this process: its exit status and what it printed, on stdout and stderr."""
    main = runpy.run_path(str(PROJECT / "play-scripts" / "plot_runs.py"))["main"]

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["plot_runs.py", *map(str, arguments)])
        return (main(), *capsys.readouterr())

    return run


def test_plotting_says_what_it_wrote_and_what_it_replaced(tmp_path: Path, plot) -> None:
    write_run(tmp_path / "run", [0.1, 0.2])
    for word in ("wrote", "replaced"):
        _, out, _ = plot(tmp_path / "run", "--metrics", "eval/reward")
        assert out.splitlines() == [f"{word} {tmp_path / 'run' / f'curves.{kind}'}" for kind in ("png", "svg")]
    status, _, err = plot(tmp_path / "run", "--metrics", "evl/reward")
    assert status == 2 and re.search("evl/reward: did you mean eval/reward", err)
    status, _, err = plot(tmp_path / "run", "--out", tmp_path / "run" / "metrics.jsonl" / "figure")
    assert (status, len(err.splitlines())) == (2, 1)
    assert "--out" in err


def test_pictures_beside_runs_are_skipped_without_complaint(tmp_path: Path, plot) -> None:
    write_run(tmp_path / "run", [0.1, 0.2])
    (tmp_path / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "curves.svg").write_text("<svg/>")
    status, _, err = plot(*sorted(tmp_path.iterdir()), "--metrics", "eval/reward", "--out", tmp_path / "out")
    assert (status, err) == (0, "")
    assert ">run</text>" in (tmp_path / "out.svg").read_text()
    status, _, err = plot(tmp_path / "curves.png", "--out", tmp_path / "none")
    assert status == 2 and "no run" in err


@pytest.mark.parametrize(
    ("sources", "published", "title"),
    [
        (["runs/lr_sweep"], [], "lr_sweep"),
        (["runs/lr_sweep/1e-4/seed_0", "curves.png"], [], "1e-4/seed_0"),
        (["results/lr/metrics.csv"], ["reference/lr_sweep.csv"], "lr; published: lr_sweep"),
        (["a", "b", "c", "d", "e", "a"], [], "a, b, c and 2 more"),
        (["wandb:me/project"], [], "wandb:me/project"),
    ],
)
def test_the_default_title_names_the_sources(sources: list[str], published: list[str], title: str) -> None:
    assert runpy.run_path(str(PROJECT / "play-scripts" / "plot_runs.py"))["title_of"](sources, published) == title


def test_bad_sources_are_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "lr" / "good", [0.1, 0.2, 0.3])
    write_run(tmp_path / "lr" / "going", [0.1, 0.2, 0.3], ending=None)
    write_run(tmp_path / "lr" / "poor", [0.1, 0.2], lengths=False)
    write_run(tmp_path / "other" / "good", [0.5, 0.6, 0.7])
    (tmp_path / "empty").mkdir()
    (tmp_path / "lr" / "started").mkdir()
    (tmp_path / "lr" / "started" / "run.json").write_text("{}")
    with (tmp_path / "lr" / "good" / "metrics.jsonl").open("a") as file:
        file.write('{"grpo_step": 5, "train/mean_resp')
    (tmp_path / "bad.csv").write_text("run_name,metric,step,value\na,eval/reward,0,0.5\na,eval/reward,1,oops\n")
    (tmp_path / "wide.csv").write_text("step,reward\n0,1\n")
    (tmp_path / "bytes.csv").write_bytes(b"\x89PNG\r\n\x1a\n")
    sources = [tmp_path / name for name in ("lr", "other", "empty", "nowhere", "bad.csv", "wide.csv", "bytes.csv")]
    metrics = ["eval/reward", "train/mean_response_length", "train/nothing"]
    done = run_script("plot_runs.py", *sources, "--out", tmp_path / "out" / "figure", "--metrics", *metrics)
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    for place, words in (
        ("/empty", "no run"),
        ("/lr/going", "not finished"),
        ("/lr/started", "logged nothing"),
        ("/lr/good/metrics.jsonl, line 8", "left out"),
        ("/lr/poor", "no train/mean_response_length"),
        ("/other/good", "other/good"),
        ("/nowhere", "no such"),
        ("/bad.csv, line 3", "'oops'"),
        ("/bytes.csv", "can't be read"),
        ("/wide.csv", "run_name, metric, value"),
        ("train/nothing", "no run has"),
    ):
        assert any(place in line and words in line for line in lines), place
    assert done.stdout.splitlines() == [f"wrote {tmp_path / 'out' / f'figure.{kind}'}" for kind in ("png", "svg")]
    drawn = (tmp_path / "out" / "figure.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("good", "going", "poor", "other/good", "a"))


def test_summarize_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(PROJECT / "play-scripts" / "summarize_runs.py"))["main"]

    def summarized(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["summarize_runs.py", *map(str, arguments)])
        return (main(), *capsys.readouterr())

    write_run(tmp_path / "a", [0.25, 0.75])
    (tmp_path / "curves.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    status, out, err = summarized(tmp_path / "a", tmp_path / "curves.png", tmp_path / "nowhere", "--markdown")
    assert status == 0
    assert out.splitlines()[2] == "| a | 1 | 0.750 | 0.500 | 2 | 20 s | finished |"
    assert len(err.splitlines()) == 1 and "nowhere" in err  # not a word of the picture
    status, _, err = summarized(tmp_path / "curves.png")
    assert status == 2 and "no run" in err
    names = [f"{'long_' * 30}{i}" for i in range(2)]
    for name in names:
        write_run(tmp_path / name, [0.25])
    _, out, _ = summarized(tmp_path)
    assert [line.split()[1] for line in out.splitlines() if "long_" in line] == names
    status, _, err = summarized(tmp_path, "--metric", "eval/rewrad")
    assert status == 2
    assert "eval/rewrad" in err and "eval/reward" in err

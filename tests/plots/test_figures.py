"""Figures and tables of runs, by the data in them; damaged input is named and the rest is shown."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import runpy
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation, Text

from utils.plots.direct_labels import spread
from utils.plots.figures import draw_figure, reward_curve, save_figure, smooth
from utils.plots.history import Point, Run, aggregate, load_runs, write_csv
from utils.plots.style import in_order, looks, short_names
from utils.plots.summary import estimate, format_time, markdown_table, summarize

PROJECT = Path(__file__).parents[2]
REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
needs_reference = pytest.mark.skipif(not REFERENCE.exists(), reason=f"no published curves in {REFERENCE}")


def write_run(folder: Path, rewards: list[float], ending: str | None = "finished", lengths: bool = True) -> None:
    """A run that was evaluated after 0, 2, 4, ... GRPO steps, with two optimizer steps and ten seconds a step."""
    folder.mkdir(parents=True)
    rows = [{"eval_step": 0, "time": 0.0, "eval/reward": rewards[0]}]
    for step in range(1, 2 * len(rewards) - 1):
        row = {"grpo_step": step, "time": 10.0 * step, "optimizer_step": 2 * step}
        rows.append(row | ({"train/mean_response_length": 100.0 + step} if lengths else {"train/loss": 0.0}))
        if step % 2 == 0:
            rows.append({"eval_step": step, "time": 10.0 * step, "eval/reward": rewards[step // 2]})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ending:
        (folder / "status.json").write_text(json.dumps({"status": ending}))


def line(figure: Figure, panel: str, name: str) -> tuple[list[float], list[float]]:
    """The data of a curve, by its panel's title and its name."""
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == panel]
    (found,) = [drawn for drawn in axes.get_lines() if drawn.get_label() == name]
    return list(found.get_xdata()), list(found.get_ydata())


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, PROJECT / "play-scripts" / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_seeds_become_mean_and_band(tmp_path: Path) -> None:
    write_run(tmp_path / "lr" / "1e-4" / "seed_0", [0.1, 0.4, 0.6])
    write_run(tmp_path / "lr" / "1e-4" / "seed_1", [0.3, 0.2, 0.8])
    write_run(tmp_path / "lr" / "3e-5", [0.1, 0.2, 0.3])
    runs, complaints = load_runs([tmp_path / "lr"])
    assert complaints == []
    figure, missing = draw_figure({"ours": runs}, ["eval/reward"])
    assert missing == []
    assert line(figure, "eval/reward", "1e-4") == ([0, 2, 4], pytest.approx([0.2, 0.3, 0.7]))
    assert line(figure, "eval/reward", "3e-5") == ([0, 2, 4], [0.1, 0.2, 0.3])
    (band,) = figure.axes[0].collections
    corners = {(round(x, 9), round(y, 9)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(0, 0.1), (0, 0.3), (2, 0.2), (2, 0.4), (4, 0.6), (4, 0.8)}
    assert {text.get_text() for text in figure.axes[0].texts} == {"1e-4", "3e-5"}


def test_x_axes(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.1] * 3)
    runs, _ = load_runs([tmp_path])
    for axis, expected in (("grpo_step", [0, 2, 4]), ("optimizer_step", [0, 4, 8]), ("time", [0, 20, 40])):
        figure, _ = draw_figure({"ours": runs}, ["eval/reward"], axis=axis)
        assert line(figure, "eval/reward", "a")[0] == expected
    for point in list(runs[0].curves["eval/reward"].items()):
        runs[0].curves["eval/reward"][point[0]] = point[1]._replace(time=point[1].time * 100)
    figure, _ = draw_figure({"ours": runs}, ["eval/reward"], axis="time")
    assert line(figure, "eval/reward", "a")[0] == pytest.approx([0, 2000 / 60, 4000 / 60])
    assert figure.axes[0].get_xlabel() == "wall-clock, minutes"
    published = Run("published", "o", "p", curves={"eval/reward": {0: Point(0.5)}})
    figure, complaints = draw_figure({"ours": runs, "published": [published]}, ["eval/reward"], axis="time")
    assert complaints == ["published has no wall-clock: left out"]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["eval/reward"]
    with pytest.raises(ValueError, match="nothing to draw: published has no wall-clock: left out"):
        draw_figure({"published": [published]}, axis="time")
    with pytest.raises(ValueError, match="'steps' is none of grpo_step, optimizer_step, time"):
        draw_figure({"ours": runs}, axis="steps")


def test_a_collapsed_seed_ends_the_mean_and_is_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "hot" / "seed_0", [0.4, 0.0], "collapsed")
    write_run(tmp_path / "hot" / "seed_1", [0.4, 0.2, 0.6])
    runs, _ = load_runs([tmp_path])
    figure, _ = draw_figure({"ours": runs}, ["eval/reward"])
    assert line(figure, "eval/reward", "hot") == ([0, 2], [0.4, 0.1])
    others = [drawn for drawn in figure.axes[0].get_lines() if drawn.get_label() != "hot"]
    data = [(list(drawn.get_xdata()), list(drawn.get_ydata()), drawn.get_marker()) for drawn in others]
    assert ([2, 4], [0.2, 0.6], "None") in data
    assert ([2], [0.0], "x") in data


def test_aggregate_keeps_gaps_and_needs_no_shared_step() -> None:
    first = {1: Point(1.0, time=10.0), 2: Point(math.nan, time=20.0), 3: Point(3.0, time=30.0)}
    second = {1: Point(3.0, time=20.0), 2: Point(5.0, time=40.0), 3: Point(5.0, time=60.0)}
    result = aggregate([first, second], "time")
    assert result.x == [15.0, 30.0, 45.0]
    np.testing.assert_equal(result.mean, [2.0, math.nan, 4.0])
    np.testing.assert_equal(result.low, [1.0, math.nan, 3.0])
    assert result.n_seeds == 2
    apart = aggregate([{1: Point(1.0)}, {2: Point(2.0)}])
    assert (apart.x, apart.tails) == ([], [([1], [1.0]), ([2], [2.0])])
    assert aggregate([first], "optimizer_step").n_seeds == 0


def test_a_curve_that_was_never_finite_is_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "good", [0.1, 0.2])
    write_run(tmp_path / "lost", [0.1, 0.2])
    path = tmp_path / "lost" / "metrics.jsonl"
    path.write_text(
        re.sub(r'"eval/reward": [\d.]+', '"eval/reward": null, "nonfinite": {"eval/reward": "nan"}', path.read_text())
    )
    runs, _ = load_runs([tmp_path])
    figure, complaints = draw_figure({"ours": runs}, ["eval/reward"])
    assert complaints == ["lost has no finite eval/reward to draw over GRPO steps"]
    assert line(figure, "eval/reward", "good") == ([0, 2], [0.1, 0.2])
    assert [text.get_text() for text in figure.axes[0].texts] == ["good"]


def test_smooth_by_hand() -> None:
    assert smooth([1.0, 2.0, 6.0, 4.0], 1) == [1.0, 2.0, 6.0, 4.0]
    assert smooth([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 3.0, 4.0, 5.0]
    assert smooth([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    np.testing.assert_equal(smooth([1.0, math.nan, 3.0], 3), [1.0, math.nan, 3.0])


@needs_reference
def test_published_curves_stand_beside_ours(tmp_path: Path) -> None:
    write_run(tmp_path / "lr_sweep" / "3e-5", [0.1, 0.2])
    write_run(tmp_path / "lr_sweep" / "1e-5", [0.1, 0.2])
    ours, _ = load_runs([tmp_path])
    published, complaints = load_runs([REFERENCE / "lr_sweep.csv"])
    assert complaints == []
    figure, _ = draw_figure({"ours": ours, "published": published}, ["eval/reward", "train/entropy"], window=1)
    with (REFERENCE / "lr_sweep.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["run_name"] == "lr_sweep_3e-5"]
    for metric in ("eval/reward", "train/entropy"):
        expected = [(float(row["step"]), float(row["value"])) for row in rows if row["metric"] == metric]
        assert list(zip(*line(figure, f"{metric} · published", "3e-5"), strict=True)) == expected
    colours = {drawn.get_color() for axes in figure.axes for drawn in axes.get_lines() if drawn.get_label() == "3e-5"}
    assert len(colours) == 1


@needs_reference
@pytest.mark.parametrize("name", ["lr_sweep", "length_normalization", "std_dev_normalization"])
def test_labels_overlap_nothing_and_stay_in_the_figure(name: str) -> None:
    runs, _ = load_runs([REFERENCE / f"{name}.csv"])
    figure, _ = draw_figure({"published": runs})
    figure.draw_without_rendering()
    names = {run.name for run in runs}
    for axes in figure.axes:
        labels = [text for text in axes.texts if isinstance(text, Annotation)]
        boxes = [Text.get_window_extent(text).shrunk(0.98, 0.8) for text in labels]  # without the leaders
        assert len(labels) == len([n for n in names if any(n.endswith(label.get_text()) for label in labels)])
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_names_too_long_for_labels_go_into_a_legend() -> None:
    curves = {"eval/reward": {0: Point(0.1), 1: Point(0.2)}}
    runs = [Run(word + " a name that is far too long for a label" * 2, "o", word, curves=curves) for word in "ab"]
    figure, _ = draw_figure({"ours": runs})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [run.name for run in runs]
    assert list(figure.axes[0].texts) == []
    figure.draw_without_rendering()
    box = figure.legends[0].get_window_extent()
    assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1


def test_names_are_written_in_all_panels_or_in_none() -> None:
    flat = {"eval/reward": {0: Point(0.0), 1: Point(0.5)}, "train/entropy": {1: Point(0.1), 2: Point(0.2)}}
    for n, expected in ((3, 3), (40, 0)):  # 40 names are more than the second panel's height takes
        names = [f"a_setting_of_a_long_name_{i}" for i in range(n)]
        curves = {name: {m: c for m, c in flat.items() if m == "train/entropy" or name == names[0]} for name in names}
        figure, _ = draw_figure({"ours": [Run(name, name, name, curves=curves[name]) for name in names]})
        assert len(figure.axes[1].texts) == expected
        assert len(figure.axes[0].texts) == min(1, expected)
        assert bool(figure.legends) == (expected == 0)


def test_leaders_start_left_of_the_names_and_names_stand_beside_early_ends() -> None:
    """Two curves that end near each other early, and one that goes on."""
    ends = {"a": (10, 0.5), "b": (16, 0.9), "c": (100, 0.5)}
    runs = [
        Run(name, name, name, curves={"eval/reward": {0: Point(0.4), x: Point(y)}}) for name, (x, y) in ends.items()
    ]
    figure, _ = draw_figure({"ours": runs}, ["eval/reward"])
    figure.draw_without_rendering()
    texts = {text.get_text(): text for text in figure.axes[0].texts}
    starts = {name: Text.get_window_extent(text).x0 for name, text in texts.items()}
    assert starts["a"] == pytest.approx(starts["b"])  # in one column, right of both
    assert texts["a"].arrow_patch is not None  # and so too far from its end to be without a leader
    assert texts["c"].arrow_patch is None
    begin = texts["a"].arrow_patch.get_path().vertices[0]
    assert abs(begin[0] - starts["a"]) < 3


def test_scales(tmp_path: Path) -> None:
    """Lengths that hardly change fill their panel; rewards begin at 0; decades are for means, not for single steps."""
    curves = {
        "eval/reward": {0: Point(0.8), 1: Point(0.9)},
        "train/mean_response_length": {1: Point(20.0), 2: Point(20.5)},
        "train/grad_norm": {i: Point(0.001 if i == 25 else 1.0) for i in range(50)},
    }
    figure, _ = draw_figure({"ours": [Run("a", "o", "p", curves=curves)]})
    reward, length, norm = figure.axes
    assert reward.get_ylim()[0] == 0
    assert 19.9 < length.get_ylim()[0] < 20 < 20.5 < length.get_ylim()[1] < 20.6
    assert norm.get_yscale() == "linear"  # 0.8 at the least, averaged over five
    curves["train/grad_norm"] = {i: Point(0.01 if i > 25 else 1.0) for i in range(50)}
    figure, _ = draw_figure({"ours": [Run("a", "o", "p", curves=curves)]})
    assert figure.axes[2].get_yscale() == "log"


def test_the_caption_says_what_is_drawn(tmp_path: Path) -> None:
    for seed in (0, 1):
        write_run(tmp_path / "a" / f"seed_{seed}", [0.1, 0.2], lengths=False)
    figure, _ = draw_figure({"ours": load_runs([tmp_path])[0]}, ["eval/reward"], window=1)
    assert figure.get_supxlabel() == "mean over seeds, band from lowest to highest"
    write_run(tmp_path / "a" / "seed_2", [0.1], "collapsed", lengths=False)
    figure, _ = draw_figure({"ours": load_runs([tmp_path])[0]}, ["eval/reward"], window=1)
    assert figure.get_supxlabel() == (
        "mean over seeds, band from lowest to highest; thin: single seeds, where others have ended; × last value of a "
        "run stopped as collapsed"
    )


@given(st.lists(st.floats(0, 300), max_size=20), st.floats(1, 12))
def test_spread_keeps_labels_apart_inside_and_in_order(wanted: list[float], height: float) -> None:
    places = spread(wanted, height, 0.0, 300.0)
    assert places is not None
    order = sorted(range(len(wanted)), key=lambda i: (wanted[i], places[i]))
    gaps = [places[b] - places[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= height - 1e-6 for gap in gaps)
    assert all(height / 2 - 1e-6 <= place <= 300 - height / 2 + 1e-6 for place in places)


def test_spread_moves_only_what_it_must() -> None:
    assert spread([50.0, 10.0], 10.0, 0.0, 100.0) == [50.0, 10.0]
    assert spread([50.0, 50.0], 10.0, 0.0, 100.0) == [45.0, 55.0]
    assert spread([0.0, 90.0, 2.0], 10.0, 0.0, 100.0) == [5.0, 90.0, 15.0]
    assert spread([1.0, 2.0, 3.0], 10.0, 0.0, 29.0) is None


def test_no_two_settings_look_alike() -> None:
    found = looks([str(i) for i in range(56)])
    assert len({(look.colour, look.dashes) for look in found.values()}) == 56


def test_names_and_order() -> None:
    assert short_names(["lr_sweep_1e-6", "lr_sweep_3e-6"]) == {"lr_sweep_1e-6": "1e-6", "lr_sweep_3e-6": "3e-6"}
    assert short_names(["base_e1_tb256", "question_only_e1_tb256"]) == {
        "base_e1_tb256": "base",
        "question_only_e1_tb256": "question_only",
    }
    assert short_names(["s_e4_clip", "s_e4_no_clip", "s_e1_clip"])["s_e4_no_clip"] == "e4_no_clip"  # e4_no beside e4
    for unchanged in (["a_b"], ["with_std", "without_std"], ["mean", "constant"], ["3e-5", "1e-5"], ["a_b", "a"], []):
        assert short_names(unchanged) == {name: name for name in unchanged}
    assert in_order(["b", "1e-4", "3e-6", "a", "b", "1.5e-5"]) == ["3e-6", "1.5e-5", "1e-4", "b", "a"]
    assert in_order(["f16_1e-4", "f16_3e-5", "f32_1e-4", "half", "f32_1e-5"]) == [
        "f16_3e-5",
        "f16_1e-4",
        "f32_1e-5",
        "f32_1e-4",
        "half",
    ]


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
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    sources = [tmp_path / name for name in ("lr", "other", "empty", "nowhere", "bad.csv", "wide.csv", "picture.png")]
    metrics = ["eval/reward", "train/mean_response_length", "train/nothing"]
    done = run_script("plot_runs.py", *sources, "--out", tmp_path / "out" / "figure", "--metrics", *metrics)
    assert done.returncode == 0, done.stderr
    for message in (
        "empty: no run in it (no metrics.jsonl)",
        "going: not finished, shown up to GRPO step 4",
        "started: a run that has logged nothing",
        "line 8: not a whole JSON row, left out",
        "poor: poor has no train/mean_response_length",
        "no run has train/nothing",
        "two runs are called good: the one in",
        "is shown as other/good",
        "nowhere: no such file or folder",
        "bad.csv, line 3: left out (could not convert string to float: 'oops')",
        "picture.png: can't be read ('utf-8' codec can't decode byte 0x89",
        "wide.csv: not a long CSV, no column run_name, metric, value",
    ):
        assert message in done.stderr
    assert done.stdout.splitlines() == [f"wrote {tmp_path / 'out' / f'figure.{kind}'}" for kind in ("png", "svg")]
    drawn = (tmp_path / "out" / "figure.svg").read_text()
    assert all(f">{name}<" in drawn for name in ("good", "going", "poor", "other/good", "a"))
    nothing = run_script("plot_runs.py", tmp_path / "empty", "--out", tmp_path / "none")
    assert nothing.returncode == 2
    assert "nothing to draw: no run" in nothing.stderr
    assert not (tmp_path / "none.png").exists()


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


def test_plotting_says_what_it_wrote_and_what_it_replaced(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [0.1, 0.2])
    for word in ("wrote", "replaced"):
        done = run_script("plot_runs.py", tmp_path / "run", "--metrics", "eval/reward")
        assert done.stdout.splitlines() == [f"{word} {tmp_path / 'run' / f'curves.{kind}'}" for kind in ("png", "svg")]
    slip = run_script("plot_runs.py", tmp_path / "run", "--metrics", "evl/reward")
    assert slip.returncode == 2 and "--metrics evl/reward: did you mean eval/reward?" in slip.stderr
    done = run_script("plot_runs.py", tmp_path / "run", "--out", tmp_path / "run" / "metrics.jsonl" / "figure")
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "cannot be written" in done.stderr


def test_a_run_given_twice_and_seeds_of_two_folders(tmp_path: Path) -> None:
    for folder in ("x/a/seed_0", "x/a/seed_1", "y/a/seed_0"):
        write_run(tmp_path / folder, [0.1, 0.2])
    again = [tmp_path / "x" / "a" / "seed_1", tmp_path / "y" / "a"]
    runs, complaints = load_runs([tmp_path / "x", tmp_path / "y", *again])
    assert [(run.name, run.seed) for run in runs] == [("a", 0), ("a", 1), ("y/a", 0)]
    assert [text.split(": ")[1] for text in complaints] == [
        f"the one in {tmp_path / 'y' / 'a' / 'seed_0'} is shown as y/a",
        "a was given twice, shown once",
        "a was given twice, shown once",
    ]


def test_tracked_runs(tmp_path: Path) -> None:
    history = [{"eval_step": 0, "eval/reward": 0.5}, {"grpo_step": 1, "train/loss": "NaN", "optimizer_step": 4}]
    tracked = [{"name": "n", "id": i, "seed": seed, "ending": "finished", "history": history} for i, seed in
               (("i", 1), ("j", 2), ("k", 2))]  # fmt: skip
    runs, complaints = load_runs(["wandb:e/p"], lambda project: tracked if project == "e/p" else [])
    assert [(run.name, run.seed) for run in runs] == [("n", 1), ("n", 2), ("wandb:e/p/k/n", 2)]
    assert len(complaints) == 1
    assert runs[0].curves["eval/reward"] == {0: Point(0.5, 0, None)}
    assert math.isnan(runs[0].curves["train/loss"][1].value)


def test_csv_round_trip_and_averages(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed_3", [0.1, 0.2])
    write_run(tmp_path / "b", [0.3, 0.4])
    runs, _ = load_runs([tmp_path])
    write_csv(runs, tmp_path / "metrics.csv")
    again, complaints = load_runs([tmp_path / "metrics.csv"])
    assert complaints == []
    assert [(run.name, run.seed, run.curves) for run in again] == [(run.name, run.seed, run.curves) for run in runs]
    (tmp_path / "long.csv").write_text("run_name,metric,step,value\na,train/loss,0,1\na,train/loss,0,4\n")
    (run,), _ = load_runs([tmp_path / "long.csv"])
    assert run.curves == {"train/loss": {0: Point(2.5)}}


def test_summary_by_hand(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed_0", [0.0, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5], "finished")
    write_run(tmp_path / "a" / "seed_1", [0.0, 0.5, 0.6, 0.6, 0.6, 0.6, 0.6], "time_limit")
    write_run(tmp_path / "b", [0.25], "collapsed")
    runs, _ = load_runs([tmp_path])
    (first, second), complaints = summarize(runs)
    assert complaints == []
    assert (first.best.mean, first.last.mean) == pytest.approx((0.75, 0.55))
    # two values at distance d: standard deviation d / sqrt 2, standard error d / 2
    assert (first.best.standard_error, first.last.standard_error) == pytest.approx((0.15, 0.05))
    assert (first.steps, first.seconds, first.endings) == (12, 120.0, {"finished": 1, "time_limit": 1})
    assert second.cells() == ("b", "1", "0.250", "0.250 ×", "0", "0 s", "collapsed")
    assert "| a | 2 | 0.750 ± 0.150 | 0.550 ± 0.050 | 12 | 2 min | finished 1, time_limit 1 |" in markdown_table(
        [first]
    )
    values = [0.2, 0.5, 0.9, 0.4]
    assert estimate(values).standard_error == pytest.approx(np.std(values, ddof=1) / 2)
    assert estimate([]) is None
    assert [format_time(seconds) for seconds in (None, 59, 600, 7200)] == ["–", "59 s", "10 min", "2.0 h"]
    (_, _), complaints = summarize(runs, "train/entropy")
    assert len(complaints) == 3


@needs_reference
def test_summary_of_published_runs_agrees_with_the_published_summary() -> None:
    with (REFERENCE / "run_summary.csv").open() as file:
        published = {row["run_name"]: row for row in csv.DictReader(file)}
    runs, _ = load_runs([REFERENCE / f"{name}.csv" for name in ("lr_sweep", "length_normalization")])
    summaries, _ = summarize(runs)
    assert len(summaries) == 9
    for summary in summaries:
        assert summary.best.mean == float(published[summary.name]["best_eval_reward"])
        assert summary.steps == int(published[summary.name]["last_grpo_step"])


def test_summarize_script(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.25, 0.75])
    done = run_script("summarize_runs.py", tmp_path, tmp_path / "nowhere", "--markdown")
    assert done.returncode == 0
    assert done.stdout.splitlines()[2] == "| a | 1 | 0.750 | 0.500 | 2 | 20 s | finished |"
    assert "nowhere: no such file or folder" in done.stderr
    assert run_script("summarize_runs.py", tmp_path / "nowhere").returncode == 2
    names = [f"{'long_' * 30}{i}" for i in range(2)]
    for name in names:
        write_run(tmp_path / name, [0.25])
    piped = run_script("summarize_runs.py", tmp_path).stdout
    assert [line.split()[1] for line in piped.splitlines() if "long_" in line] == names
    unknown = run_script("summarize_runs.py", tmp_path, "--metric", "eval/rewrad")
    assert unknown.returncode == 2
    assert "--metric eval/rewrad: no run has it; they have eval/reward" in unknown.stderr


def test_reward_curve_shows_the_run(tmp_path: Path) -> None:
    write_run(tmp_path / "low", [0.1] * 5)
    shutil.copytree(tmp_path / "low", tmp_path / "same")
    write_run(tmp_path / "high", [0.1, 0.3, 0.5, 0.7, 0.9])
    low, same, high = (imread(reward_curve(tmp_path / name)) for name in ("low", "same", "high"))
    assert np.array_equal(low, same)
    assert not np.array_equal(low, high[: low.shape[0], : low.shape[1]])
    write_run(tmp_path / "none", [math.nan])
    (tmp_path / "none" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="neither eval/reward nor train/reward"):
        reward_curve(tmp_path / "none")


def test_the_same_data_give_the_same_files(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.1, statistics.fmean([0.2, 0.3])])
    runs, _ = load_runs([tmp_path / "a"])
    for name in ("one", "two"):
        save_figure(draw_figure({"ours": runs})[0], tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()

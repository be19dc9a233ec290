"""Figures of runs, by the data in them."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from plot_cases import (
    REFERENCE,
    boxes_of,
    line,
    names_in_legend,
    needs_reference,
    run_of,
    write_run,
)

from utils.plots.figures import draw_figure, reward_curve, save_figure
from utils.plots.history import Point, Run, load_runs


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
    assert names_in_legend(figure) == ["1e-4", "3e-5"]


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
    assert len(complaints) == 1 and "published has no wall-clock" in complaints[0]
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["eval/reward"]
    with pytest.raises(ValueError, match="nothing to draw: published has no wall-clock"):
        draw_figure({"published": [published]}, axis="time")
    with pytest.raises(ValueError, match=r"'steps'.*grpo_step"):
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


def test_a_curve_that_was_never_finite_is_named_and_the_rest_is_drawn(tmp_path: Path) -> None:
    write_run(tmp_path / "good", [0.1, 0.2])
    write_run(tmp_path / "lost", [0.1, 0.2])
    path = tmp_path / "lost" / "metrics.jsonl"
    path.write_text(
        re.sub(r'"eval/reward": [\d.]+', '"eval/reward": null, "nonfinite": {"eval/reward": "nan"}', path.read_text())
    )
    runs, _ = load_runs([tmp_path])
    figure, complaints = draw_figure({"ours": runs}, ["eval/reward"])
    assert len(complaints) == 1 and "lost has no finite eval/reward" in complaints[0]
    assert line(figure, "eval/reward", "good") == ([0, 2], [0.1, 0.2])
    assert names_in_legend(figure) == ["good"]


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


def test_few_settings_share_panels_in_two_colours() -> None:
    ours, published = [run_of("3e-5", eval_reward=[0.1, v]) for v in (0.5, 0.6)]
    figure, complaints = draw_figure({"ours": [ours], "published": [published]})
    assert complaints == []
    assert names_in_legend(figure) == ["3e-5, published", "3e-5, ours"]
    colours = {drawn.get_label(): drawn.get_color() for drawn in figure.axes[0].get_lines()}
    assert colours["3e-5, ours"] != colours["3e-5, published"]
    names = [f"{i}e-5" for i in range(1, 5)]
    many = [run_of(name, eval_reward=[0.1, 0.5], train_entropy=[0.1, 0.5]) for name in names]
    figure, _ = draw_figure({"ours": many, "published": [published]})
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["eval/reward · ours", "eval/reward · published"]  # no empty panel for entropy
    assert len({axes._left_title.get_color() for axes in figure.axes}) == 2


def test_the_caption_says_what_is_drawn(tmp_path: Path) -> None:
    def words() -> str:
        figure, _ = draw_figure({"ours": load_runs([tmp_path])[0]}, ["eval/reward"], window=1, title="Of a")
        assert figure.get_suptitle() == "Of a"
        return " ".join(figure.get_supxlabel().split())

    for seed in (0, 1):
        write_run(tmp_path / "a" / f"seed_{seed}", [0.1, 0.2], lengths=False)
    assert words() == "mean over seeds, band from lowest to highest"
    write_run(tmp_path / "a" / "seed_2", [0.1], "collapsed", lengths=False)
    for part in ("band from lowest", "thin: single seeds", "× last value"):
        assert part in words()


def test_reward_curve_shows_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    folder = tmp_path / "1e-4" / "seed_3"
    write_run(folder, [0.1, 0.3, 0.5])
    rows = [json.dumps({"grpo_step": step, "train/reward": 0.1 * step}) for step in (1, 2, 3)]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("\n".join(rows) + "\n")
    assert reward_curve(folder) == folder / "reward_curve.png"
    (figure,) = drawn
    assert figure.get_suptitle() == "1e-4, seed 3: mean reward"
    data = {curve.get_label(): list(curve.get_ydata()) for curve in figure.axes[0].get_lines()}
    assert [label.split()[0] for label in data] == ["rollouts", "held-out"]
    assert [*data.values()] == [pytest.approx([0.1, 0.2, 0.3]), [0.1, 0.3, 0.5]]
    assert names_in_legend(figure)[0].startswith("held-out")
    legend, others = boxes_of(figure)
    assert not any(legend.overlaps(box) for box in others)


def test_reward_curve_is_drawn_from_the_data(tmp_path: Path) -> None:
    write_run(tmp_path / "low" / "run", [0.1] * 5)
    shutil.copytree(tmp_path / "low", tmp_path / "same")
    write_run(tmp_path / "high" / "run", [0.1, 0.3, 0.5, 0.7, 0.9])
    low, same, high = (imread(reward_curve(tmp_path / name / "run")) for name in ("low", "same", "high"))
    assert np.array_equal(low, same)
    assert not np.array_equal(low, high)
    write_run(tmp_path / "none", [math.nan])
    (tmp_path / "none" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="neither eval/reward nor train/reward"):
        reward_curve(tmp_path / "none")


def test_the_same_data_give_the_same_files(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.1, 0.25])
    runs, _ = load_runs([tmp_path / "a"])
    for name in ("one", "two"):
        save_figure(draw_figure({"ours": runs})[0], tmp_path / name)
    for kind in ("png", "svg"):
        assert (tmp_path / f"one.{kind}").read_bytes() == (tmp_path / f"two.{kind}").read_bytes()

"""Runs read back from folders, CSV files and a tracker, and their tables. Damaged input is named, the rest is shown."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import numpy as np
import pytest
from plot_cases import REFERENCE, needs_reference, write_run

from utils.plots.aggregate import aggregate, running_median
from utils.plots.history import Point, load_runs, write_csv
from utils.plots.style import in_order, looks, short_names
from utils.plots.summary import estimate, format_time, markdown_table, summarize


def test_running_median_by_hand() -> None:
    assert running_median([1.0, 2.0, 6.0, 4.0], 1) == [1.0, 2.0, 6.0, 4.0]
    assert running_median([1.0, 2.0, 6.0, 4.0], 3) == [1.5, 2.0, 4.0, 5.0]
    assert running_median([1.0, 2.0, 6.0, 4.0], 2) == [1.0, 1.5, 4.0, 5.0]
    np.testing.assert_equal(running_median([1.0, math.nan, 3.0], 3), [1.0, math.nan, 3.0])
    assert running_median([0.0, 0.0, 9.0, 0.0, 0.0], 3) == [0.0] * 5


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


def test_no_two_settings_look_alike() -> None:
    by_name = looks([str(i) for i in range(56)])
    assert len({(look.colour, look.dashes) for look in by_name.values()}) == 56


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
    runs, complaints = load_runs(["wandb:e/p"], {"wandb": lambda project: tracked if project == "e/p" else []})
    assert [(run.name, run.seed) for run in runs] == [("n", 1), ("n", 2), ("wandb:e/p/k/n", 2)]
    assert len(complaints) == 1
    assert runs[0].curves["eval/reward"] == {0: Point(0.5, 0, None)}
    fetch = {"trackio": lambda project: [tracked[0] | {"name": "a/seed_1"}], "wandb": lambda project: tracked[:1]}
    runs, _ = load_runs(["wandb:e/n", "trackio:p", "trackio:q"], fetch)
    assert [(run.name, run.seed) for run in runs] == [("n", 1), ("a", 1), ("trackio/a", 1)]
    runs, _ = load_runs(["wandb:e/p"], {"wandb": lambda project: tracked[:1]})
    assert math.isnan(runs[0].curves["train/loss"][1].value)


def test_csv_round_trip_and_averages(tmp_path: Path) -> None:
    write_run(tmp_path / "a" / "seed_3", [0.1, 0.2], "collapsed")
    write_run(tmp_path / "b", [0.3, 0.4])
    (tmp_path / "b" / "status.json").write_text('{"status": "finished", "same_as": "other/c"}')
    runs, _ = load_runs([tmp_path])
    write_csv(runs, tmp_path / "metrics.csv")
    again, complaints = load_runs([tmp_path / "metrics.csv"])
    assert complaints == []
    fields = ("name", "seed", "ending", "same_as", "curves")
    assert [[getattr(run, f) for f in fields] for run in again] == [[getattr(run, f) for f in fields] for run in runs]
    assert [(run.ending, run.same_as) for run in again] == [("collapsed", ""), ("finished", "other/c")]
    (tmp_path / "endings.csv").write_text("name,ending\n")
    runs, (complaint,) = load_runs([tmp_path / "metrics.csv"])
    assert runs == [] and "endings.csv" in complaint and "run_name" in complaint
    (tmp_path / "endings.csv").unlink()
    (tmp_path / "long.csv").write_text("run_name,metric,step,value\na,train/loss,0,1\na,train/loss,0,4\n")
    (run,), _ = load_runs([tmp_path / "long.csv"])
    assert (run.curves, run.ending) == ({"train/loss": {0: Point(2.5)}}, "unknown")


def test_a_damaged_status_leaves_the_ending_unknown(tmp_path: Path) -> None:
    for i, text in enumerate(('{"status": "fin', "[]", "{}")):
        write_run(tmp_path / str(i), [0.1])
        (tmp_path / str(i) / "status.json").write_text(text)
    runs, complaints = load_runs([tmp_path])
    assert [run.ending for run in runs] == ["unknown"] * 3
    assert all("status.json" in complaint for complaint in complaints) and len(complaints) == 3


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

"""The page of an ablation, from fabricated runs: numbers worked by hand, published claims, and the page drawn again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from utils.ablations.compare import by_setting, judge
from utils.ablations.published import Ablation, Claim, find_ablation
from utils.ablations.report import command_of, differences_parts, published_parts, write_report
from utils.plots.history import Run, load_runs
from utils.plots.summary import summarize


def write_run(
    folder: Path, rewards: list[float], grad_norms: list[float] = (), ending: str | None = "finished", **status: str
) -> None:
    """A run that was evaluated after 0, 1, 2, ... GRPO steps."""
    folder.mkdir(parents=True)
    rows = [{"eval_step": i, "time": 10.0 * i, "eval/reward": value} for i, value in enumerate(rewards)]
    rows += [
        {"grpo_step": i, "time": 10.0 * i, "train/grad_norm": v, "train/loss": 0.1} for i, v in enumerate(grad_norms, 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if ending:
        (folder / "status.json").write_text(json.dumps({"status": ending, **status}))


def runs_in(folder: Path) -> list[Run]:
    return load_runs([folder])[0]


def verdict(claim: Claim, settings: dict[str, list[Run]]) -> str | None:
    """On one claim alone."""
    return next((str(verdict) for verdict in judge([claim], settings)), None)


def std_dev_runs(folder: Path) -> None:
    """Two settings of two seeds: last-five means 0.7, 0.8 against 0.5, 0.58; norms 0.4, 0.6 against 0.5, 0.5."""
    for name, seed, last, norms in (
        ("with_std", 1, 0.7, [0.2, 0.6]),
        ("with_std", 2, 0.8, [0.6, 0.6]),
        ("without_std", 1, 0.5, [0.5, 0.5]),
        ("without_std", 2, 0.58, [0.4, 0.6]),
    ):
        write_run(folder / name / f"seed_{seed}", [0.2, 0.9, *[last] * 5], norms, same_as="tiny/lr_sweep/3e-4")


def test_the_page_by_hand(tmp_path: Path) -> None:
    std_dev_runs(tmp_path / "runs")
    complaints = write_report(tmp_path / "runs", tmp_path / "out", "tiny/std_dev", "python run.py --seeds 2")
    assert complaints == []
    page = (tmp_path / "out" / "README.md").read_text()
    # two values at distance d have the standard error d / 2; the differences of seeds are 0.2, 0.22 and -0.1, 0.1
    for text in (
        "# tiny/std_dev\n\nShould advantages be divided by the standard deviation of their group?",
        "| with_std | 2 | 0.900 ± 0.000 | 0.750 ± 0.050 | 6 | 60 s | finished 2 |",
        "| without_std | 2 | 0.900 ± 0.000 | 0.540 ± 0.040 | 6 | 60 s | finished 2 |",
        "Highest at the end: `with_std`, 0.750 ± 0.050. Not told apart from it: `without_std`. Collapsed: none.",
        # ends less 0.2, the first evaluations; t = 11 and 8.5, within 12.706; 0.21 / 0.01 = 21 is beyond, but within
        # 38.19, the 5 / 3 % point
        "| with_std | 0.55 ± 0.05 |  |",
        "| without_std | 0.34 ± 0.04 | -0.21 ± 0.01 |",
        "for the 3 tests of this table",
        "0.72 with the division, 0.65 without",
        # p = 1 - 2 atan(t) / pi with one degree of freedom, 0.0303, twice that for two claims; beyond 5 / 2 %, 25.45,
        # 80 % of values lie from a shift of 32.66 on
        "| with the division reward ends higher | **cannot be told apart**: 0.75 against 0.54, difference 0.21 ± 0.01 "
        "| 0.061 | 0.33 |",
        "| without it gradient norms are lower | **cannot be told apart**: 0.5 against 0.5, difference 0 ± 0.1 "
        "| 1 | 3.3 |",
        "corrected by Holm's method for the 2 claims",
        "- with the division reward ends higher (**cannot be told apart**): reward goes from 0.20 to 0.75 (`with_std`) "
        "and from 0.20 to 0.54 (`without_std`).",
        "## Where `eval/reward` tends to\n\nSeeds without a row or left out of it: `with_std` (2: fewer than 8 evalu",
        "| run | `train/reward` | `train/mean_response_length` | `train/entropy` | `train/grad_norm` |",
        "| with_std | – | – | – | 0.5 ± 0.1 |",
        "as the config is the same: `with_std` is the run `tiny/lr_sweep/3e-4`, `without_std` is the run",
        "a paired t-test",
        "```bash\npython run.py --seeds 2\n```",
        "train/entropy, train/grad_norm over GRPO steps](figure.png)",
    ):
        assert text in page
    assert str(tmp_path) not in page
    assert (tmp_path / "out" / "figure.png").read_bytes().startswith(b"\x89PNG")
    (again, *_), _ = load_runs([tmp_path / "out" / "metrics.csv"])
    assert (again.name, again.seed, sorted(again.curves)) == ("with_std", 1, ["eval/reward", "train/grad_norm"])
    assert again.curves["eval/reward"][1].value == 0.9
    title = (tmp_path / "out" / "figure.svg").read_text()
    assert "tiny/std_dev: Should advantages be divided" in title


def test_a_report_is_drawn_again_from_its_csv(tmp_path: Path) -> None:
    std_dev_runs(tmp_path / "runs")
    write_run(tmp_path / "runs" / "without_std" / "seed_3", [0.2, 0.3], [0.5], ending="collapsed")
    out = tmp_path / "out"
    write_report(tmp_path / "runs", out, "tiny/std_dev", "python run.py --seeds 3")
    names = ("README.md", "figure.png", "figure.svg", "metrics.csv", "endings.csv")
    first = {name: (out / name).read_bytes() for name in names}
    for name in ("figure.png", "figure.svg"):
        (out / name).unlink()
    assert command_of(out / "README.md") == "python run.py --seeds 3"
    assert write_report(out / "metrics.csv", out, "tiny/std_dev", "python run.py --seeds 3") == []
    assert {name: (out / name).read_bytes() for name in names} == first
    assert b"collapsed 1, finished 2" in first["README.md"]
    assert command_of(out / "nothing.md") is None
    damaged = (out / "metrics.csv").read_text() + "without_std,3,eval/reward,9,,,oops\n"
    (out / "metrics.csv").write_text(damaged)
    (complaint,) = write_report(out / "metrics.csv", out, "tiny/std_dev", "python run.py --seeds 3")
    assert "oops" in complaint
    assert (out / "metrics.csv").read_text() == damaged  # what cannot be read is not thrown away


def test_the_differences_say_who_collapsed_and_who_rose(tmp_path: Path) -> None:
    for seed, shift, uneven in ((1, 0.0, 0.01), (2, 0.02, -0.01), (3, 0.01, 0.03)):
        write_run(tmp_path / "1e-4" / f"seed_{seed}", [0.2, *[0.61 + shift - uneven] * 5])
        write_run(tmp_path / "3e-4" / f"seed_{seed}", [0.2, *[0.61 + shift] * 5])
        write_run(tmp_path / "1e-5" / f"seed_{seed}", [0.2, *[0.2 + uneven] * 5])
        write_run(tmp_path / "1e-3" / f"seed_{seed}", [0.2, *[0.9] * 4, 0.1 * seed + 0.01], ending="collapsed")
    runs = runs_in(tmp_path)
    text, table, _ = differences_parts(runs, summarize(runs)[0])
    assert text == (
        "Highest at the end: `3e-4`, 0.620 ± 0.006. Not told apart from it: `1e-4`, `1e-3`. "
        "Collapsed: `1e-3` (3 of 3 seeds)."
    )
    # 1e-5 less 3e-4: -0.40, -0.44, -0.39, deviations 0.01, -0.03, 0.02, standard error 0.02646 / sqrt 3 = 0.0153
    # of 1e-3 the last evaluation counts, 0.11, 0.21, 0.31; its differences from 3e-4 are -0.50, -0.42, -0.31, t = 7.4,
    # p = 0.018, the fourth of the seven tests and so held against 5 % / 4
    assert table.splitlines()[2:] == [
        "| 1e-5 | 0.01 ± 0.0115 | -0.41 ± 0.0153 \\* |",
        "| 1e-4 | 0.41 ± 0.0153 \\* | -0.01 ± 0.0115 |",
        "| 3e-4 | 0.42 ± 0.00577 \\* |  |",
        "| 1e-3 | 0.01 ± 0.0577 | -0.41 ± 0.0551 |",
    ]
    settings = {name: [run for run in runs if run.name == name] for name in ("1e-3", "1e-4", "3e-4")}
    # no 3e-5 was passed, so that the third claim has no verdict
    assert [str(verdict) for verdict in judge(find_ablation("tiny/lr_sweep").claims, settings)] == [
        "**yes**: 3 of 3 seeds",
        "**cannot be told apart**: 0.62 against 0.61, difference 0.01 ± 0.0115",
    ]


def test_a_collapsed_seed_counts_with_its_last_evaluation_and_is_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "hot" / "seed_1", [0.2, 0.9, 0.9, 0.9, 0.1], ending="collapsed")
    write_run(tmp_path / "hot" / "seed_2", [0.2, 0.4, 0.5, 0.6, 0.7, 0.8])
    write_run(tmp_path / "cold" / "seed_1", [0.3])
    cold, hot = summarize(runs_in(tmp_path))[0]
    assert hot.cells()[2:4] == ("0.850 ± 0.050", "0.350 ± 0.250 ×")  # 0.1, and the mean of 0.4, ..., 0.8
    assert cold.cells()[3] == "0.300"
    assert verdict(Claim("", "hot", "collapses"), {"hot": runs_in(tmp_path / "hot")}) == "**in part**: 1 of 2 seeds"


def test_claims_the_other_way_round_and_equal(tmp_path: Path) -> None:
    std_dev_runs(tmp_path)
    settings = by_setting(runs_in(tmp_path))
    reward = "0.54 against 0.75, difference -0.21 ± 0.01"
    assert verdict(Claim("", "without_std", "above", "with_std"), settings) == f"**no**: {reward}"
    assert verdict(Claim("", "without_std", "equals", "with_std"), settings) == f"**no**: {reward}"
    noise = verdict(Claim("", "with_std", "equals", "without_std", "train/grad_norm"), settings)
    assert noise == "**cannot be told apart**: 0.5 against 0.5, difference 0 ± 0.1"
    settings["twin"] = settings["with_std"]
    assert verdict(Claim("", "with_std", "equals", "twin"), settings) == (
        "**yes**, equal in every seed: 0.75 against 0.75, difference 0 ± 0"
    )
    settings["others"] = [replace(run, seed=run.seed + 5) for run in settings["with_std"]]
    assert verdict(Claim("", "with_std", "above", "others"), settings) == "**not judged**: no seed in common"
    assert verdict(Claim("", "with_std", "collapses"), settings) == "**no**: 0 of 2 seeds"
    assert verdict(Claim("", "with_std", "above", "without_std", "train/entropy"), settings) is None


def test_what_was_expected_but_not_published_is_judged_too(tmp_path: Path) -> None:
    for seed, gap in ((1, 0.10), (2, 0.11)):
        write_run(tmp_path / "float32_1e-5" / f"seed_{seed}", [0.4, *[0.6] * 5])
        write_run(tmp_path / "bfloat16_1e-5" / f"seed_{seed}", [0.4, *[0.6 - gap] * 5])
    heading, table, _, note = published_parts(find_ablation("tiny/precision"), runs_in(tmp_path))
    assert heading == "## Expected, and here"
    # t = 21, p = 1 - 2 atan(21) / pi; 16.334 standard errors would be seen
    assert table == (
        "| expected | here | p | would be seen from |\n| --- | --- | --- | --- |\n"
        "| at 1e-5 float32 ends above bfloat16 | **yes**: 0.6 against 0.495, difference 0.105 ± 0.005 | 0.03 | 0.082 |"
    )
    assert "half its spacing" in note


def test_an_outcome_published_elsewhere_names_its_own_source(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [0.2, 0.8])
    entry = Ablation("Which?", "b wins.", source="a paper")
    assert published_parts(entry, runs_in(tmp_path))[:2] == ["## Published, and here", "b wins. (a paper)"]
    assert published_parts(replace(entry, source=""), runs_in(tmp_path))[1].startswith("b wins. (published runs:")


def test_one_seed_is_not_judged(tmp_path: Path) -> None:
    write_run(tmp_path / "with_std", [0.2, 0.8])
    write_run(tmp_path / "without_std", [0.2, 0.1])
    runs = runs_in(tmp_path)
    text, table, _ = differences_parts(runs, summarize(runs)[0])
    assert text == "Highest at the end: `with_std`, 0.500. Collapsed: none."
    assert "| without_std | -0.05 | -0.35 |" in table
    (claim, _) = find_ablation("std_dev").claims
    assert verdict(claim, by_setting(runs)) == "**not judged**, one seed: 0.5 against 0.15, difference 0.35"


def test_what_is_missing_or_damaged_is_named_and_the_rest_reported(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "good", [0.1, 0.5], [1.0])
    write_run(tmp_path / "runs" / "going", [0.1], [1.0], ending=None)
    write_run(tmp_path / "runs" / "blind", [], [1.0, 2.0])
    with (tmp_path / "runs" / "good" / "metrics.jsonl").open("a") as file:
        file.write('{"grpo_step": 2, "train/gr')
    complaints = "\n".join(write_report(tmp_path / "runs", tmp_path / "out", "anything", "a command"))
    for text in ("metrics.jsonl, line 4", "going: not finished", "blind has no eval/reward"):
        assert text in complaints
    page = (tmp_path / "out" / "README.md").read_text()
    assert "# anything\n\nRuns of `configs/anything`." in page
    assert "| going | 1 | 0.100 | 0.100 | 1 | 10 s | unfinished |" in page
    assert "| blind | 1 | – | – | 2 | 20 s | finished |" in page
    assert "Published" not in page
    with pytest.raises(ValueError, match="nothing to draw"):
        write_report(tmp_path / "nowhere", tmp_path / "none", "anything", "a command")
    assert not (tmp_path / "none").exists()


def test_no_reward_at_all(tmp_path: Path) -> None:
    write_run(tmp_path / "a", [], [1.0])
    runs = runs_in(tmp_path)
    assert differences_parts(runs, summarize(runs)[0]) == ["No run has `eval/reward`. Collapsed: none."]

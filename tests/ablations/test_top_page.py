"""The table of all ablations, and the sentences on what is different here, from fabricated runs."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from test_report import std_dev_runs, write_run

from utils.ablations.compare import by_setting, judge
from utils.ablations.published import Claim
from utils.ablations.reasons import reasons_part
from utils.ablations.report import looks, write_report
from utils.ablations.top_page import agreement, answer_here, tally, write_top_page
from utils.plots.history import Point, Run, load_runs


def test_the_top_page_has_a_row_per_question_and_keeps_what_others_wrote(tmp_path: Path) -> None:
    results = tmp_path / "results"
    std_dev_runs(tmp_path / "runs")
    for path in (tmp_path / "runs").rglob("status.json"):
        path.write_text('{"status": "finished"}')
    write_report(tmp_path / "runs", results / "tiny/std_dev", "tiny/std_dev", "python run.py --jobs 2 --more-seeds 8")
    for topic in ("lr_sweep", "my_sweep"):
        (results / topic).mkdir()
        for name in ("metrics.csv", "endings.csv", "README.md"):
            (results / topic / name).write_bytes((results / "tiny/std_dev" / name).read_bytes())
    (results / "speed").mkdir()
    (results / "speed" / "README.md").write_text("# Speed\n")
    assert write_top_page(results) == []
    path = results / "README.md"
    path.write_text(path.read_text().replace("# Results\n", "# Results\n\nBefore.\n") + "\nAfter.\n")
    write_top_page(results)
    text = path.read_text()
    assert text.startswith("# Results\n\nBefore.\n\n<!-- ablations -->\n| question |")
    assert text.endswith("<!-- /ablations -->\n\nAfter.\n")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) == 2  # a user's own ablations have pages, and do not enter this one
    (row,) = (row for row in rows if "tiny/std_dev" in row)
    # p = 0.0303, doubled for the second look and for the second claim; four runs of 60 s
    for cell in (
        "[Should advantages be divided by the standard deviation of their group?](tiny/std_dev/README.md)<br><img src=",
        "| with the division reward ends higher, 0.72 against 0.65 |",
        "| `with_std` ends highest of 2, at 0.750 ± 0.050 |",
        "| **cannot be told apart**: 2 cannot be told apart |",
        "| 2 seeds; would see 0.65 of reward |",
        "| 4<br>4 min |",
    ):
        assert cell in row
    assert "Of 2 claims: 2 cannot be told apart. The 8 runs took 8 min" in text
    assert (results / "tiny/std_dev/thumbnail.png").read_bytes().startswith(b"\x89PNG")
    page = (results / "tiny/std_dev" / "README.md").read_text()
    assert "p is doubled" in page
    assert "The runs took 4 min in all, as recorded then, so about 2 min with 2 at once" in page
    with (results / "lr_sweep" / "metrics.csv").open("a") as file:
        file.write("a,1,eval/reward,9,,,oops\n")
    (complaint,) = write_top_page(results)
    assert "oops" in complaint
    path.write_text("# Results\n")
    with pytest.raises(ValueError, match=r"README.md.*<!-- ablations -->"):
        write_top_page(results)


def test_agreement_and_answers(tmp_path: Path) -> None:
    for seed in (1, 2, 3):
        write_run(tmp_path / "hot" / f"seed_{seed}", [0.2, 0.1 * seed], ending="collapsed" if seed < 3 else "finished")
        write_run(tmp_path / "low" / f"seed_{seed}", [0.2, 0.3 + 0.001 * seed])
        write_run(tmp_path / "high" / f"seed_{seed}", [0.2, 0.9])
    runs = load_runs([tmp_path])[0]
    settings = by_setting(runs)
    claims = {
        "yes": Claim("", "high", "above", "low"),
        "no": Claim("", "low", "above", "high"),
        "in part": Claim("", "hot", "collapses"),
        "cannot be told apart": Claim("", "hot", "above", "low"),
    }
    for words, expected in (
        (["yes"], "**yes**: 1 yes"),
        (["yes", "cannot be told apart"], "**in part**: 1 yes, 1 cannot be told apart"),
        (["no", "cannot be told apart"], "**no**: 1 no, 1 cannot be told apart"),
        (["no", "yes"], "**in part**: 1 yes, 1 no"),
        (["in part"], "**in part**: 1 in part"),
        ([], "no claim to hold it against"),
    ):
        assert agreement(judge([claims[word] for word in words], settings)) == expected
    assert tally(Counter(no=2, yes=1)) == "1 yes, 2 no"
    assert answer_here(runs) == "`high` ends highest of 3, at 0.550 ± 0.000; collapsed: `hot`"
    assert answer_here([]) == "no evaluation"


def test_what_is_different_here_has_numbers_of_the_runs() -> None:
    def run(name: str, seed: int, shift: float, length: float) -> Run:
        logged = {
            "eval/reward": [0.2, 0.6 + shift],
            "train/mean_response_length": [20.0, length],
            "train/frac_zero_std_groups": [0.5, 0.7],
            "train/frac_truncated": [0.0, 0.01],
        }
        curves = {metric: {i: Point(value) for i, value in enumerate(values)} for metric, values in logged.items()}
        return Run(name, "", "", seed, "finished", curves=curves)

    runs = [run("a", 1, 0.0, 30.0), run("a", 2, 0.1, 31.0), run("b", 1, 0.1, 12.5), run("b", 2, 0.0, 20.0)]
    settings = by_setting(runs)
    text = reasons_part(judge([Claim("a is best", "a", "above", "b")], settings), settings)
    # the means of 0.2 and the end, over an evaluation before training and one after
    assert text.splitlines()[-1] == (
        "- a is best (**cannot be told apart**): reward goes from 0.20 to 0.42 (`a`) and from 0.20 to 0.42 (`b`); "
        "a step's mean response has 12.5 to 31.0 tokens; 40 % and 40 % of the groups have rewards that differ, and so "
        "a gradient; 0.5 % and 0.5 % of the responses reach the limit of tokens."
    )
    assert reasons_part(judge([Claim("a collapses", "a", "collapses")], settings), settings).count("reward goes") == 1
    assert reasons_part(judge([Claim("a is a", "a", "equals", "a")], settings), settings) == ""


def test_a_command_with_more_seeds_counts_as_two_looks() -> None:
    assert [looks(f"python run.py {words}") for words in ("--seeds 5", "--seeds 5 --more-seeds 8")] == [1, 2]

"""The page of an ablation: its question, figure and table, the published outcome beside ours, and the differences."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils.ablations.compare import Verdict, by_seed, by_setting, differences, judge, marked, measured, paired_tests
from utils.ablations.published import SOURCE, Ablation, find_ablation
from utils.ablations.reasons import NEEDED, reasons_part
from utils.ablations.saturation import saturation_parts
from utils.log.files import write_atomically
from utils.plots.figures import DEFAULT_METRICS, draw_figure, save_figure
from utils.plots.history import Run, load_runs, write_csv
from utils.plots.summary import (
    COLLAPSED,
    LAST,
    Summary,
    estimate,
    finite,
    format_time,
    markdown_rows,
    markdown_table,
    summarize,
)
from utils.plots.thumbnail import save_thumbnail

REWARD = "eval/reward"
ALSO_KEPT = ("eval/format_reward", "eval/answer_reward", "train/reward_std", *NEEDED)  # in metrics.csv, not drawn
THUMBNAIL = "thumbnail.png"
COMMANDS = re.compile(r"^```bash\n(.+?)\n```$", re.MULTILINE | re.DOTALL)
AT_ONCE = re.compile(r"--jobs (\d+)")


def write_report(source: Path, results: Path, topic: str, command: str) -> list[str]:
    """Write README.md, its figures, and metrics.csv and endings.csv to redraw them, of the runs in `source`.

    `source` is a folder of runs, or the metrics.csv that an earlier report left in `results`. Returns a complaint for
    everything missing or damaged. Raises ValueError if there is nothing to report.
    """
    ablation = find_ablation(topic)
    runs, complaints = load_runs([source])
    summaries, missing = summarize(runs, REWARD)
    drawn = [*DEFAULT_METRICS, *ablation.also_drawn]
    logged = [metric for metric in drawn if any(run.curves.get(metric) for run in runs)]
    figure, undrawn = draw_figure({"ours": runs}, logged, title=f"{topic}: {ablation.question}")
    results.mkdir(parents=True, exist_ok=True)
    save_figure(figure, results / "figure")
    save_thumbnail(runs, REWARD, results / THUMBNAIL)
    if source != results / "metrics.csv":
        kept = {*drawn, *ALSO_KEPT}
        thinned = [replace(run, curves={m: curve for m, curve in run.curves.items() if m in kept}) for run in runs]
        write_csv(thinned, results / "metrics.csv")
    write_atomically(results / "README.md", describe(topic, ablation, runs, summaries, drawn, command))
    return list(dict.fromkeys([*complaints, *missing, *undrawn]))


def describe(
    topic: str,
    ablation: Ablation,
    runs: Sequence[Run],
    summaries: Sequence[Summary],
    drawn: Sequence[str],
    command: str,
) -> str:
    """The page as Markdown."""
    commands = "\n".join([*ablation.prepare, command])
    parts = [
        f"# {topic}",
        ablation.question,
        f"![{', '.join(drawn)} over GRPO steps](figure.png)",
        markdown_table(summaries),
        f"`{REWARD}` on held-out problems, mean over seeds ± standard error. `best` is the best evaluation. `last "
        f"{LAST}` is the mean of the last {LAST} (×: a seed that was stopped as collapsed counts with its last "
        "evaluation alone). `time` is of one run.",
        same_runs(runs),
        *published_parts(ablation, runs, looks(command)),
        "## What the data shows",
        *differences_parts(runs, summaries, looks(command)),
        *saturation_parts(runs, REWARD),
        "## Means over all GRPO steps",
        means_table(runs, [metric for metric in drawn if metric.startswith("train/")]),
        "Entropy, clip fraction and the like are of the tokens trained on. With `skip_zero_advantage`, responses whose "
        "advantage is 0 are not among them, and a step with no other responses has no value.",
        "## Made by",
        f"```bash\n{commands}\n```",
        time_taken(runs, command),
        "`metrics.csv` holds the curves that are drawn, and others that the page needs: run_name, seed, metric, step, "
        "value. `endings.csv` says how each run ended.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def looks(command: str) -> int:
    """How often the seeds were looked at: twice if more were added where the first ones left a claim unclear."""
    return 2 if "--more-seeds" in command else 1


def time_taken(runs: Sequence[Run], command: str) -> str:
    """A line with the time of all runs, as it was recorded; empty if none was."""
    seconds, at_once = run_seconds(runs), int(found[1]) if (found := AT_ONCE.search(command)) else 1
    if not seconds:
        return ""
    together = f", so about {format_time(seconds / at_once)} with {at_once} at once" if at_once > 1 else ""
    return f"The runs took {format_time(seconds)} in all, as recorded then{together}; starting them is apart."


def run_seconds(runs: Sequence[Run]) -> float:
    """Of all runs, without those that are copies."""
    return sum(run.seconds or 0.0 for run in runs if not run.same_as)


def same_runs(runs: Sequence[Run]) -> str:
    """A line for settings that were not run again, because another ablation has the same config."""
    same = {f"`{run.name}` is the run `{run.same_as}`": None for run in runs if run.same_as}
    return f"Run once for two ablations, as the config is the same: {', '.join(same)}." if same else ""


def differences_parts(runs: Sequence[Run], summaries: Sequence[Summary], n_looks: int = 1) -> list[str]:
    """Which setting ends highest and which collapsed; a table of the gains, and of the differences from the highest."""
    settings = by_setting(runs)
    ended = [summary for summary in summaries if summary.last is not None]
    if not ended:
        return [f"No run has `{REWARD}`. {collapsed_part(settings)}"]
    best = max(ended, key=lambda summary: summary.last.mean)
    ends = {name: by_seed(seeds, REWARD) for name, seeds in settings.items()}
    gains, gaps = [], []
    for name in (summary.name for summary in ended):
        first = {run.seed: values[0] for run in settings[name] if (values := finite(run, REWARD))}
        gains.append(differences(ends[name], first))
        gaps.append(differences(ends[name], ends[best.name]) if name != best.name else [])
    tests = paired_tests([*gains, *gaps], n_looks)
    of_gains, of_gaps = tests[: len(ended)], tests[len(ended) :]
    rows = [("run", "end minus first evaluation", f"end minus end of `{best.name}`")]
    for summary, gain, gap, *pair in zip(ended, gains, gaps, of_gains, of_gaps, strict=True):
        rows.append((summary.name, marked(gain, pair[0]), marked(gap, pair[1]) if summary is not best else ""))
    n_tests = sum(test is not None for test in tests)
    several = f", corrected by Holm's method for the {n_tests} tests of this table" if n_tests > 1 else ""
    alike = [f"`{s.name}`" for s, test in zip(ended, of_gaps, strict=True) if test and not test.direction]
    return [
        f"Highest at the end: `{best.name}`, {best.last}."
        + (f" Not told apart from it: {', '.join(alike)}." if alike else "")
        + f" {collapsed_part(settings)}",
        markdown_rows(rows),
        "Means of the seeds' differences ± standard error. \\*: a paired t-test tells it from 0 (5 %, "
        f"two-sided{several}). The highest was picked after the runs, which favours it. One seed alone is not tested.",
    ]


def collapsed_part(settings: dict[str, list[Run]]) -> str:
    n_collapsed = {name: sum(run.ending == COLLAPSED for run in seeds) for name, seeds in settings.items()}
    collapsed = [f"`{name}` ({n} of {len(settings[name])} seeds)" for name, n in n_collapsed.items() if n]
    return f"Collapsed: {', '.join(collapsed) or 'none'}."


def published_parts(ablation: Ablation, runs: Sequence[Run], n_looks: int = 1) -> list[str]:
    """The published outcome, and one row per claim in it, or expectation, that these runs can be held against."""
    settings = by_setting(runs)
    verdicts = judge(ablation.claims, settings, n_looks)
    published = f"{ablation.published} ({ablation.source or SOURCE})"
    parts = ["## Published, and here", published] if ablation.published else []
    parts = parts or (["## Expected, and here"] if verdicts else [])
    if verdicts:
        parts.append(claims_table(verdicts, "published" if ablation.published else "expected"))
    if n_tests := sum(verdict.test is not None for verdict in verdicts):
        parts.append(how_claims_are_tested(n_tests, n_looks))
    return [part for part in [*parts, reasons_part(verdicts, settings), ablation.note] if part]


def claims_table(verdicts: Sequence[Verdict], heading: str) -> str:
    rows = [(heading, "here", "p", "would be seen from")]
    for verdict in verdicts:
        test = verdict.test
        shown = ("", "") if test is None else (p_text(test.p), f"{test.visible:.2g}")
        rows.append((verdict.claim.text, str(verdict), *shown))
    return markdown_rows(rows)


def p_text(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


def how_claims_are_tested(n_tests: int, n_looks: int) -> str:
    """The sentences below the table of claims."""
    several = f", corrected by Holm's method for the {n_tests} claims tested here" if n_tests > 1 else ""
    twice = (
        " Settings whose first seeds left a claim unclear have more seeds; for that second look p is doubled before."
        if n_looks > 1
        else ""
    )
    return (
        f"`p` is of a two-sided paired t-test over the seeds{several}; below 0.05 the difference is told from 0."
        f"{twice} `would be seen from` is the smallest true difference that the test, at its corrected level and with "
        "the standard error seen here, finds in 80 % of repetitions (the minimum detectable effect). A smaller one may "
        "show by luck, and that none shows does not prove that there is none."
    )


def means_table(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """One row per setting, one column per metric: mean over GRPO steps and seeds, ± the standard error over seeds."""
    rows = [("run", *(f"`{metric}`" for metric in metrics))]
    for name, seeds in by_setting(runs).items():
        rows.append((name, *(measured(estimate([*by_seed(seeds, metric).values()])) for metric in metrics)))
    return markdown_rows(rows)


def command_of(page: Path) -> str | None:
    """The command that made the runs of an earlier page; None if the page is absent or names none."""
    block = COMMANDS.search(page.read_text()) if page.exists() else None
    return block[1].splitlines()[-1] if block else None

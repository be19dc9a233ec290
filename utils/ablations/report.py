"""The page of an ablation: its question, figure and table, the differences, and the published outcome beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from utils.ablations.compare import by_seed, by_setting, check, differences, direction, judged, measured
from utils.ablations.published import SOURCE, Ablation, find_ablation, is_shipped
from utils.log.files import write_atomically
from utils.plots.figures import DEFAULT_METRICS, draw_figure, save_figure
from utils.plots.history import Run, load_runs, write_csv
from utils.plots.summary import COLLAPSED, LAST, Summary, estimate, finite, markdown_rows, markdown_table, summarize

REWARD = "eval/reward"
ALSO_KEPT = ("eval/format_reward", "eval/answer_reward")  # in metrics.csv beside what is drawn
SHOWS = "What the data shows"
COMMANDS = re.compile(r"^```bash\n(.+?)\n```$", re.MULTILINE | re.DOTALL)
TOP_MARKERS = ("<!-- ablations -->", "<!-- /ablations -->")


def write_report(source: Path, results: Path, topic: str, command: str) -> list[str]:
    """Write figure.png and .svg and README.md of the runs in `source`, with metrics.csv and endings.csv to redraw them.

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
        f"## {SHOWS}",
        *differences_parts(runs, summaries),
        *published_parts(ablation, runs),
        "## Means over all GRPO steps",
        means_table(runs, [metric for metric in drawn if metric.startswith("train/")]),
        "Entropy, clip fraction and the like are of the tokens trained on. With `skip_zero_advantage`, responses whose "
        "advantage is 0 are not among them, and a step with no other responses has no value.",
        "## Made by",
        f"```bash\n{commands}\n```",
        "`metrics.csv` holds the curves that are drawn, and the rewards: run_name, seed, metric, step, value. "
        "`endings.csv` says how each run ended.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def same_runs(runs: Sequence[Run]) -> str:
    """A line for settings that were not run again, because another ablation has the same config."""
    same = {f"`{run.name}` is the run `{run.same_as}`": None for run in runs if run.same_as}
    return f"Run once for two ablations, as the config is the same: {', '.join(same)}." if same else ""


def differences_parts(runs: Sequence[Run], summaries: Sequence[Summary]) -> list[str]:
    """Which setting ends highest and which collapsed; a table of the gains, and of the differences from the highest."""
    settings = by_setting(runs)
    n_collapsed = {name: sum(run.ending == COLLAPSED for run in seeds) for name, seeds in settings.items()}
    collapsed = [f"`{name}` ({n} of {len(settings[name])} seeds)" for name, n in n_collapsed.items() if n]
    collapsed_part = f"Collapsed: {', '.join(collapsed) or 'none'}."
    ended = [summary for summary in summaries if summary.last is not None]
    if not ended:
        return [f"No run has `{REWARD}`. {collapsed_part}"]
    best = max(ended, key=lambda summary: summary.last.mean)
    ends = {name: by_seed(seeds, REWARD) for name, seeds in settings.items()}
    rows, alike = [("run", "end minus first evaluation", f"end minus end of `{best.name}`")], []
    for name in (summary.name for summary in ended):
        first = {run.seed: values[0] for run in settings[name] if (values := finite(run, REWARD))}
        gaps = differences(ends[name], ends[best.name])
        rows.append((name, judged(differences(ends[name], first)), judged(gaps) if name != best.name else ""))
        alike += [f"`{name}`"] if name != best.name and direction(gaps) == 0 else []
    return [
        f"Highest at the end: `{best.name}`, {best.last}."
        + (f" Not told apart from it: {', '.join(alike)}." if alike else "")
        + f" {collapsed_part}",
        markdown_rows(rows),
        "Means of the seeds' differences ± standard error. \\*: a paired t-test tells it from 0 (5 %, two-sided, not "
        "corrected for the number of comparisons). One seed alone is not tested.",
    ]


def published_parts(ablation: Ablation, runs: Sequence[Run]) -> list[str]:
    """The published outcome, and one row per claim in it, or expectation, that these runs can be held against."""
    settings = by_setting(runs)
    rows = [(claim.text, verdict) for claim in ablation.claims if (verdict := check(claim, settings))]
    table = markdown_rows([("published" if ablation.published else "expected", "here"), *rows])
    published = f"{ablation.published} ({ablation.source or SOURCE})"
    parts = ["## Published, and here", published] if ablation.published else []
    return [*parts, *([table] if rows else []), ablation.note]


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


def write_top_page(results: Path) -> None:
    """Put the outcome and command of every ablation that the repository ships into results/README.md.

    They go between its markers; all else on the page stays, and a user's own ablations do not enter it.
    """
    pages = sorted(page for page in results.rglob("README.md") if (page.parent / "metrics.csv").exists())
    topics = {page.parent.relative_to(results).as_posix(): page for page in pages}
    entries = [top_entry(topic, page.read_text()) for topic, page in topics.items() if is_shipped(topic)]
    if not entries:
        return
    path = results / "README.md"
    begin, end = TOP_MARKERS
    text = path.read_text() if path.exists() else f"# Results\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise ValueError(f"{path}: no place for the ablations; add the lines {begin} and {end}")
    listed = "\n\n".join(entries)
    write_atomically(path, f"{text.split(begin)[0]}{begin}\n{listed}\n{end}{text.split(end)[1]}")


def top_entry(topic: str, page: str) -> str:
    """What the top page says of one ablation, taken from its page."""
    question = page.split("\n\n")[1]
    shows = re.search(rf"^## {SHOWS}\n\n(.+?)\n\n", page, re.MULTILINE | re.DOTALL)[1]
    return f"## [{topic}]({topic}/README.md)\n\n{question}\n\n{shows}\n\n{COMMANDS.search(page)[0]}"

"""The page of an ablation: its question, figure and table, what the data shows, and the published outcome beside it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from utils.ablations.published import SOURCE, Ablation, Claim, find_ablation
from utils.log.files import STATUS_FILE, write_atomically
from utils.plots.figures import DEFAULT_METRICS, draw_figure, save_figure
from utils.plots.history import Run, load_runs, write_csv
from utils.plots.style import in_order
from utils.plots.summary import (
    COLLAPSED,
    LAST,
    Estimate,
    Summary,
    end_value,
    estimate,
    finite,
    markdown_table,
    summarize,
)

REWARD = "eval/reward"
ALSO_KEPT = ("eval/format_reward", "eval/answer_reward", "train/reward")  # in metrics.csv beside what is drawn
# Two-sided 5 % points of Student's t by degrees of freedom: NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2
T_CRITICAL = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
CANNOT_TELL = "cannot be told apart"
SHOWS = "What the data shows"
TOP_MARKERS = ("<!-- ablations -->", "<!-- /ablations -->")


def write_report(runs_folder: Path, results_folder: Path, topic: str, command: str) -> list[str]:
    """Write metrics.csv, figure.png and .svg, and README.md of the runs in a folder.

    Returns a complaint for everything missing or damaged. Raises ValueError where there is nothing to report.
    """
    ablation = find_ablation(topic)
    runs, complaints = load_runs([runs_folder])
    summaries, missing = summarize(runs, REWARD)
    drawn = [*DEFAULT_METRICS, *ablation.also_drawn]
    figure, undrawn = draw_figure({"ours": runs}, [metric for metric in drawn if has_metric(runs, metric)])
    results_folder.mkdir(parents=True, exist_ok=True)
    save_figure(figure, results_folder / "figure")
    kept = {*drawn, *ALSO_KEPT}
    thinned = [replace(run, curves={m: curve for m, curve in run.curves.items() if m in kept}) for run in runs]
    write_csv(thinned, results_folder / "metrics.csv")
    page = describe(topic, ablation, runs, summaries, drawn, command)
    write_atomically(results_folder / "README.md", page)
    return list(dict.fromkeys([*complaints, *missing, *undrawn]))


def has_metric(runs: Sequence[Run], metric: str) -> bool:
    return any(run.curves.get(metric) for run in runs)


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
        f"`{REWARD}` on held-out problems, mean over seeds ± standard error: the best evaluation, and the mean of the "
        f"last {LAST} (×: of a seed that was stopped as collapsed, its last evaluation alone). Differences are judged "
        "seed by seed, by a paired t-test at 5 %, two-sided, not corrected for the number of pairs. `time` is of one "
        "run.",
        *same_runs(runs),
        f"## {SHOWS}",
        " ".join(sentences(runs, summaries)),
        *published_parts(ablation, runs),
        "## Means over all GRPO steps",
        means_table(runs, [metric for metric in drawn if metric.startswith("train/")]),
        "Entropy, clip fraction and the like are of the tokens trained on: with `skip_zero_advantage`, responses whose "
        "advantage is 0 are not among them, and a step with no others has no value.",
        "## Made by",
        f"```bash\n{commands}\n```",
        "`metrics.csv` holds the curves that are drawn, and the rewards: run_name, seed, metric, step, value.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def same_runs(runs: Sequence[Run]) -> list[str]:
    """A line for settings that were not run twice, because another ablation's has the same config."""
    same = {}
    for run in runs:
        path = Path(run.place) / STATUS_FILE
        other = json.loads(path.read_text()).get("same_as") if run.ending in ("finished", COLLAPSED) else None
        if other:
            same[run.name] = other
    pairs = [f"`{name}` is the run `{other}`" for name, other in same.items()]
    return [f"Run once for two ablations, as the config is the same: {', '.join(pairs)}."] if pairs else []


def by_setting(runs: Sequence[Run]) -> dict[str, list[Run]]:
    return {name: [run for run in runs if run.name == name] for name in in_order(run.name for run in runs)}


def by_seed(seeds: Sequence[Run], metric: str) -> dict[int | None, float]:
    """A value for each seed that has any: of `eval/*` where it ended, of `train/*` the mean of all GRPO steps."""
    with_it = [run for run in seeds if finite(run, metric)]
    evaluated = metric.startswith("eval/")
    return {run.seed: end_value(run, metric) if evaluated else fmean(finite(run, metric)) for run in with_it}


def differences(a: dict[int | None, float], b: dict[int | None, float]) -> list[float]:
    """a - b for each seed that both have: it gave them the same problems, in order, and the same evaluations."""
    return [a[seed] - b[seed] for seed in a if seed in b]


def direction(differences: Sequence[float]) -> int | None:
    """1 or -1 where a t-test at 5 % tells the mean from zero, 0 where it cannot, None with fewer than two seeds.

    Above the table's degrees of freedom its last value stands, which is a little stricter.
    """
    if len(differences) < 2:
        return None
    gap = estimate(differences)
    critical = T_CRITICAL[min(len(differences) - 1, max(T_CRITICAL))]
    if abs(gap.mean) <= critical * gap.standard_error:
        return 0
    return 1 if gap.mean > 0 else -1


def sentences(runs: Sequence[Run], summaries: Sequence[Summary]) -> list[str]:
    """Two sentences by plain rules: which setting ends highest and lowest, and which collapsed or never rose."""
    ranked = sorted((s for s in summaries if s.last is not None), key=lambda s: -s.last.mean)
    if not ranked:
        return [f"No run has `{REWARD}`.", ending_sentence(runs)]
    best, lowest = ranked[0], ranked[-1]
    ends = {name: by_seed(seeds, REWARD) for name, seeds in by_setting(runs).items()}
    against = {s.name: direction(differences(ends[best.name], ends[s.name])) for s in ranked[1:]}
    like, unjudged = ([name for name, found in against.items() if found == kind] for kind in (0, None))
    first = f"`{best.name}` ends highest, at {best.last}"
    if like:
        first += f", from which {listed(like)} {CANNOT_TELL}"
    if lowest.name not in like and str(lowest.last) != str(best.last):
        first += f"; `{lowest.name}` ends lowest, at {lowest.last}"
    if unjudged:
        first += f"; with fewer than two seeds in common, {listed(unjudged)} cannot be judged against it"
    return [first + ".", ending_sentence(runs)]


def ending_sentence(runs: Sequence[Run]) -> str:
    """Which settings were stopped as collapsed, and which others did not rise above their first evaluation."""
    collapsed, flat, unclear = [], [], []
    for name, seeds in by_setting(runs).items():
        n_collapsed = sum(run.ending == COLLAPSED for run in seeds)
        gains = [end_value(run, REWARD) - values[0] for run in seeds if (values := finite(run, REWARD))]
        if n_collapsed:
            collapsed.append(f"`{name}` in {n_collapsed} of {len(seeds)} seeds")
        elif direction(gains) in (0, -1):
            (unclear if fmean(gains) > 0 else flat).append(name)
    parts = [f"Stopped as collapsed: {', '.join(collapsed)}" if collapsed else "No run was stopped as collapsed"]
    if flat:
        parts.append(f"{listed(flat)} did not end above the first evaluation")
    if unclear:
        parts.append(f"{listed(unclear)} cannot be told to have risen above the first evaluation")
    return "; ".join(parts) + "."


def listed(names: Sequence[str]) -> str:
    """`a`, `b` and `c`."""
    marked = [f"`{name}`" for name in names]
    return marked[0] if len(marked) == 1 else f"{', '.join(marked[:-1])} and {marked[-1]}"


def published_parts(ablation: Ablation, runs: Sequence[Run]) -> list[str]:
    """The published outcome, and a row for each claim that these runs can be held against: its own, or ours to test."""
    rows = [(claim.text, verdict) for claim in ablation.claims if (verdict := check(claim, by_setting(runs)))]
    head = "published" if ablation.published else "expected"
    table = "\n".join([f"| {head} | here |", "|---|---|", *(f"| {text} | {verdict} |" for text, verdict in rows)])
    parts = ["## Published, and here", f"{ablation.published} ({SOURCE})"] if ablation.published else []
    return [*parts, *([table] if rows else []), ablation.note]


def check(claim: Claim, settings: dict[str, list[Run]]) -> str | None:
    """Whether a published claim holds for these runs, with the numbers; None where they don't have its settings."""
    seeds = settings.get(claim.run, [])
    if not seeds:
        return None
    if claim.relation == "collapses":
        n = sum(run.ending == COLLAPSED for run in seeds)
        return f"**{'yes' if n == len(seeds) else 'no' if n == 0 else 'in part'}**: {n} of {len(seeds)} seeds"
    a, b = by_seed(seeds, claim.metric), by_seed(settings.get(claim.other, []), claim.metric)
    if not a or not b:
        return None
    gaps = differences(a, b)
    if not gaps:
        return "**not to be judged**: no seed in common"
    means = (fmean(values[seed] for seed in a if seed in b) for values in (a, b))
    numbers = " against ".join(map(significant, means))
    found = direction(gaps)
    if found is None:
        return f"**not to be judged**, one seed: {numbers}"
    if claim.relation == "=" and not any(gaps):
        return f"**yes**, equal in every seed: {numbers}"
    numbers += f", difference {measured(estimate(gaps))}"
    if found == 0:
        return f"**{CANNOT_TELL}**: {numbers}"
    return f"**{'yes' if claim.relation == '>' and found == 1 else 'no'}**: {numbers}"


def significant(value: float) -> str:
    return f"{value:.3g}"


def measured(found: Estimate | None) -> str:
    values = () if found is None else (found.mean, found.standard_error)
    return " ± ".join(significant(value) for value in values if value is not None) or "–"


def means_table(runs: Sequence[Run], metrics: Sequence[str]) -> str:
    """A row a setting, a column a metric: the mean over GRPO steps and seeds, ± the standard error over seeds."""
    rows = [("run", *(f"`{metric}`" for metric in metrics)), ("---",) * (len(metrics) + 1)]
    for name, seeds in by_setting(runs).items():
        found = [estimate([*by_seed(seeds, metric).values()]) for metric in metrics]
        rows.append((name, *map(measured, found)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def write_top_page(results: Path) -> None:
    """Put every ablation's sentences and command between the markers of results/README.md; all else there stays."""
    pages = sorted(page for page in results.rglob("README.md") if (page.parent / "metrics.csv").exists())
    if not pages:
        return
    path = results / "README.md"
    begin, end = TOP_MARKERS
    text = path.read_text() if path.exists() else f"# Results\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise ValueError(f"{path}: no place for the ablations; add the lines {begin} and {end}")
    entries = "\n\n".join(top_entry(page, results) for page in pages)
    write_atomically(path, f"{text.split(begin)[0]}{begin}\n{entries}\n{end}{text.split(end)[1]}")


def top_entry(page: Path, results: Path) -> str:
    """What the top page says of one ablation, taken from its page."""
    text, place = page.read_text(), page.parent.relative_to(results).as_posix()
    question = text.split("\n\n")[1]
    shows = re.search(rf"^## {SHOWS}\n\n(.+?)\n\n", text, re.MULTILINE | re.DOTALL)[1]
    commands = re.search(r"^```bash\n.+?\n```$", text, re.MULTILINE | re.DOTALL)[0]
    return f"## [{place}]({place}/README.md)\n\n{question}\n\n{shows}\n\n{commands}"

"""The table of all ablations in results/README.md: answers here and as published, figures, and minutes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.ablations.compare import IN_PART, NO, OPEN, UNJUDGED, YES, Verdict, by_setting, judge
from utils.ablations.published import find_ablation, is_shipped
from utils.ablations.report import REWARD, THUMBNAIL, command_of, looks, p_text, run_seconds
from utils.log.files import write_atomically
from utils.plots.history import Run, load_runs
from utils.plots.summary import COLLAPSED, format_time, summarize

TOP_MARKERS = ("<!-- ablations -->", "<!-- /ablations -->")
HEADER = ("question", "published", "here", "do the claims hold here?", "how sure", "runs, their time")
PICTURE_WIDTH = 260  # pixels


@dataclass(frozen=True)
class Entry:
    """An ablation that is listed, with its runs and verdicts."""

    topic: str
    command: str
    runs: list[Run]
    verdicts: list[Verdict]

    def cells(self) -> tuple[str, ...]:
        """The row under HEADER."""
        ablation, page = find_ablation(self.topic), f"{self.topic}/README.md"
        picture = f'<img src="{self.topic}/{THUMBNAIL}" width="{PICTURE_WIDTH}" alt="{REWARD} of {self.topic}">'
        return (
            f"[{ablation.question}]({page})<br>{picture}",
            ablation.short or "–",
            answer_here(self.runs),
            agreement(self.verdicts),
            confidence(self.runs, self.verdicts),
            f"{len([run for run in self.runs if not run.same_as])}<br>{format_time(run_seconds(self.runs) or None)}",
        )


def write_top_page(results: Path) -> list[str]:
    """Put a table of the ablations that the repository ships into results/README.md; returns complaints.

    It goes between the page's markers; all else stays, and a user's own ablations do not enter it. A complaint names
    what is damaged. Raises ValueError if the page has no markers.
    """
    entries, complaints = read_entries(results)
    if not entries:
        return complaints
    path = results / "README.md"
    begin, end = TOP_MARKERS
    text = path.read_text() if path.exists() else f"# Results\n\n{begin}\n{end}\n"
    if begin not in text or end not in text:
        raise ValueError(f"{path}: no place for the ablations; add the lines {begin} and {end}")
    listed = top_table(entries)
    write_atomically(path, f"{text.split(begin)[0]}{begin}\n{listed}\n{end}{text.split(end)[1]}")
    return complaints


def read_entries(results: Path) -> tuple[list[Entry], list[str]]:
    """The shipped ablations that have results, by name, and a complaint for everything damaged in their files."""
    entries, complaints = [], []
    for source in sorted(results.rglob("metrics.csv")):
        topic = source.parent.relative_to(results).as_posix()
        command = command_of(source.with_name("README.md"))
        if command and is_shipped(topic):
            runs, damage = load_runs([source])
            verdicts = judge(find_ablation(topic).claims, by_setting(runs), looks(command))
            entries.append(Entry(topic, command, runs, verdicts))
            complaints += damage
    return entries, complaints


def top_table(entries: Sequence[Entry]) -> str:
    """The table, and a line on the time of all runs."""
    lines = [HEADER, ["---"] * len(HEADER), *(entry.cells() for entry in entries)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    counts = Counter(verdict.answer for entry in entries for verdict in entry.verdicts)
    total = format_time(sum(run_seconds(entry.runs) for entry in entries) or None)
    n_runs = sum(not run.same_as for entry in entries for run in entry.runs)
    return (
        f"{table}\n\nOf {counts.total()} claims: {tally(counts)}. The {n_runs} runs took {total} in all, as recorded "
        "then; with `--jobs 2` half of that passes. Starting them is apart, and so are copies of equal runs."
    )


def tally(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[answer]} {answer}" for answer in (YES, NO, IN_PART, OPEN, UNJUDGED) if counts[answer])


def answer_here(runs: Sequence[Run]) -> str:
    """Which setting ends highest, from where, and which collapsed."""
    ended = [summary for summary in summarize(runs, REWARD)[0] if summary.last is not None]
    if not ended:
        return "no evaluation"
    best = max(ended, key=lambda summary: summary.last.mean)
    collapsed = [f"`{s.name}`" for s in ended if s.endings.get(COLLAPSED)]
    among = f" of {len(ended)}" if len(ended) > 1 else ""
    return f"`{best.name}` ends highest{among}, at {best.last}" + (
        f"; collapsed: {', '.join(collapsed)}" if collapsed else ""
    )


def agreement(verdicts: Sequence[Verdict]) -> str:
    """In one word, and counted."""
    counts = Counter(verdict.answer for verdict in verdicts)
    if not counts:
        return "no claim to hold it against"
    answers = {*counts} - {UNJUDGED}
    word = answers.pop() if len(answers) == 1 else NO if answers == {NO, OPEN} else IN_PART if answers else UNJUDGED
    return f"**{word}**: {tally(counts)}"


def confidence(runs: Sequence[Run], verdicts: Sequence[Verdict]) -> str:
    """Seeds; the largest p of what was told apart; the differences of reward that would have been seen."""
    n_seeds = sorted({len(seeds) for seeds in by_setting(runs).values()})
    parts = [f"{n_seeds[0]} to {n_seeds[-1]} seeds" if len(n_seeds) > 1 else f"{n_seeds[0]} seeds"]
    told = [verdict.test.p for verdict in verdicts if verdict.test and verdict.test.direction]
    parts += [f"p {text if text.startswith('<') else f'≤ {text}'}" for text in [p_text(max(told))]] if told else []
    visible = [v.test.visible for v in verdicts if v.test and v.claim.metric == REWARD and v.test.gap.standard_error]
    if visible:
        low, high = f"{min(visible):.2g}", f"{max(visible):.2g}"
        parts.append(f"would see {low if low == high else f'{low} to {high}'} of reward")
    return "; ".join(parts)

"""What is different here where a claim does not show: numbers of the runs that it compares, in one sentence."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from utils.ablations.compare import NO, OPEN, Verdict, by_seed
from utils.plots.history import Run
from utils.plots.summary import finite

REWARD, LENGTH = "eval/reward", "train/mean_response_length"
ZERO_STD, TRUNCATED = "train/frac_zero_std_groups", "train/frac_truncated"
NEEDED = (LENGTH, ZERO_STD, TRUNCATED)  # beside the rewards


def reasons_part(verdicts: Sequence[Verdict], settings: dict[str, list[Run]]) -> str:
    """A list with a sentence for each claim that does not hold or cannot be told; empty if there is none."""
    lines = []
    for verdict in verdicts:
        if verdict.answer in (NO, OPEN):
            claim = verdict.claim
            sentence = what_is_here({name: settings[name] for name in (claim.run, claim.other) if name})
            lines += [f"- {claim.text} (**{verdict.answer}**): {sentence}"] if sentence else []
    return "\n".join(["Where a claim does not show, this is what the runs look like here:\n", *lines]) if lines else ""


def what_is_here(settings: dict[str, Sequence[Run]]) -> str:
    """Reward, lengths, groups with a signal and truncation of one or two settings, each if the runs log it."""
    clauses = [rewards(settings), lengths(settings), signal(settings), cut(settings)]
    return f"{'; '.join(filter(None, clauses))}." if any(clauses) else ""


def rewards(settings: dict[str, Sequence[Run]]) -> str:
    parts = []
    for name, seeds in settings.items():
        first = [values[0] for run in seeds if (values := finite(run, REWARD))]
        if first:
            parts.append(f"from {fmean(first):.2f} to {fmean(by_seed(seeds, REWARD).values()):.2f} (`{name}`)")
    return f"reward goes {' and '.join(parts)}" if parts else ""


def lengths(settings: dict[str, Sequence[Run]]) -> str:
    """The shortest and the longest step's mean response, over all seeds."""
    values = [value for seeds in settings.values() for run in seeds for value in finite(run, LENGTH)]
    return f"a step's mean response has {min(values):.1f} to {max(values):.1f} tokens" if values else ""


def signal(settings: dict[str, Sequence[Run]]) -> str:
    parts = [f"{100 - 100 * mean:.0f} %" for mean in _means(settings, ZERO_STD)]
    return f"{' and '.join(parts)} of the groups have rewards that differ, and so a gradient" if parts else ""


def cut(settings: dict[str, Sequence[Run]]) -> str:
    parts = [f"{100 * mean:.1f} %" for mean in _means(settings, TRUNCATED)]
    return f"{' and '.join(parts)} of the responses reach the limit of tokens" if parts else ""


def _means(settings: dict[str, Sequence[Run]], metric: str) -> list[float]:
    """Over all GRPO steps and seeds, of each setting that logs the metric."""
    values = [by_seed(seeds, metric) for seeds in settings.values()]
    return [fmean(of_seeds.values()) for of_seeds in values if of_seeds]

"""A tiny world where thinking costs tokens: sums of several numbers, whose steps can be written out, skipped or padded.

The demonstrations come in four styles, of which some are wrong and some malformed, so that a policy that starts from
them can trade length, accuracy and format against each other. The model and its tokenizer are those of `tiny.py`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from utils.records import Problem
from utils.seeding import derive_seed
from utils.tiny import ERRORS, FORMAT_ERRORS

LARGEST_TERM = 9
N_TERMS = (3, 4, 5, 6)
STYLES = ("full", "abbreviated", "bare", "rambling")
REPEAT_SHARE = 0.5  # of the steps of a rambling demonstration


@dataclass(frozen=True)
class Mixture:
    """What the demonstrations are made of; all shares are from 0 to 1, and those of the styles add up to 1."""

    styles: tuple[float, ...] = (0.4, 0.15, 0.2, 0.25)  # in the order of STYLES
    wrong_steps: float = 0.04  # of the totals that are written out; the mistake is carried on
    wrong_guesses: float = 0.4  # of the answers without any step
    malformed: float = 0.15
    boxed: float = 0.1  # have the other prompt, whose answer is in a box


def make_problems(n_training: int, n_validation: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Sums of 3 to 6 terms from 1 to LARGEST_TERM as (training, validation) problems, equally many of each length.

    `n_training` and `n_validation` are problems per number of terms. A problem's level is its number of terms. The
    split is by the terms without their order, so that no training problem is a validation problem rearranged.
    """
    check_sizes(n_training, n_validation)
    rng = random.Random(derive_seed(seed, "chains_problems"))
    splits: tuple[list[Problem], list[Problem]] = ([], [])
    for n_terms in N_TERMS:
        held_out = set()
        while len(held_out) < n_validation:
            held_out.add(tuple(sorted(draw_terms(rng, n_terms))))
        validation = [rng.sample(terms, n_terms) for terms in sorted(held_out)]
        training: dict[tuple[int, ...], None] = {}  # a set that keeps its order
        while len(training) < n_training:
            terms = draw_terms(rng, n_terms)
            if tuple(sorted(terms)) not in held_out:
                training[terms] = None
        for split, chains in zip(splits, (training, validation), strict=True):
            split.extend(Problem(f"{'+'.join(map(str, t))}=?", str(sum(t)), level=f"{n_terms} terms") for t in chains)
    for split in splits:
        rng.shuffle(split)
    return splits


def check_sizes(n_training: int, n_validation: int) -> None:
    """Raise ValueError if there are too few of the shortest sums, the fewest of all, for so many problems."""
    n_sums, orders = LARGEST_TERM ** N_TERMS[0], math.factorial(N_TERMS[0])  # a held-out sum takes all its orders
    most = (n_sums - 1) // orders
    if not 1 <= n_validation <= most:
        raise ValueError(f"--validation-problems {n_validation} should be from 1 to {most}")
    most = n_sums - orders * n_validation
    if not 1 <= n_training <= most:
        raise ValueError(f"--training-problems {n_training} should be from 1 to {most}")


def draw_terms(rng: random.Random, n_terms: int) -> tuple[int, ...]:
    return tuple(rng.randint(1, LARGEST_TERM) for _ in range(n_terms))


def terms_of(problem: Problem) -> list[int]:
    return [int(term) for term in problem.question.removesuffix("=?").split("+")]


def make_demonstrations(
    problems: Sequence[Problem], templates: tuple[str, str], n_each: int, mixture: Mixture, seed: int
) -> list[dict[str, str]]:
    """Rows of `prompt`, `response` and `style` for SFT, n_each per problem.

    The first of the two templates asks for reasoning, the second for a boxed answer alone.
    """
    rng = random.Random(derive_seed(seed, "chains_demonstrations"))
    rows = []
    for problem in problems:
        for _ in range(n_each):
            is_boxed = rng.random() < mixture.boxed
            style = "boxed" if is_boxed else rng.choices(STYLES, mixture.styles)[0]
            response = make_response(terms_of(problem), style, mixture, rng)
            prompt = templates[is_boxed].replace("{question}", problem.question)
            rows.append({"prompt": prompt, "response": response, "style": style})
    return rows


def make_response(terms: Sequence[int], style: str, mixture: Mixture, rng: random.Random) -> str:
    """What follows the prompt: the reasoning in one of STYLES, then the answer; in the style `boxed` the box alone."""
    if style in ("bare", "boxed"):
        answer = sum(terms)
        if rng.random() < mixture.wrong_guesses:
            answer = abs(answer + rng.choice(ERRORS))
        reasoning = ""
    else:
        totals = running_totals(terms, mixture.wrong_steps, rng)
        answer = totals[-1]
        reasoning = f" {written(style, terms, totals, rng)}"
    if style == "boxed":
        return f" \\boxed{{{answer}}}"
    response = f"{reasoning} </think> <answer> {answer} </answer>"
    if rng.random() < mixture.malformed:
        response = response.replace(*rng.choice(FORMAT_ERRORS))
    return response


def running_totals(terms: Sequence[int], share_wrong: float, rng: random.Random) -> list[int]:
    """The totals after the second term, the third, and so on; a wrong one is carried on."""
    total, totals = terms[0], []
    for term in terms[1:]:
        total += term
        if rng.random() < share_wrong:
            total = abs(total + rng.choice(ERRORS))
        totals.append(total)
    return totals


def written(style: str, terms: Sequence[int], totals: Sequence[int], rng: random.Random) -> str:
    """The reasoning: the totals alone (`abbreviated`), every step (`full`), or some steps twice (`rambling`)."""
    if style == "abbreviated":
        return ",".join(map(str, totals))
    befores = [terms[0], *totals[:-1]]
    steps = [f"{before}+{term}={after}" for before, term, after in zip(befores, terms[1:], totals, strict=True)]
    if style == "rambling":
        steps = [f"{step},wait {step}" if rng.random() < REPEAT_SHARE else step for step in steps]
    return ",".join(steps)

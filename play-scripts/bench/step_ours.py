"""One measurement of bench/step.py, in a process of its own: our step, as one line of JSON.

`bench/step.py` starts this file; its options are described there.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from common import Clock, Phases
from options import EQUAL_WORK, EVERYTHING_OFF, MKL, SWITCHED_OFF, parse_arguments, resolve_config
from plain_pieces import (
    Pieces,
    from_full_logits,
    in_order_of_arrival,
    inner_loop,
    no_clock,
    same_as_shipped,
    with_padding_mask,
)

from configs.defaults import Config, Training
from train_grpo import update_policy
from utils import tiny
from utils.algorithm.advantages import compute_advantages
from utils.algorithm.batch import make_train_batch, mark_gradients
from utils.algorithm.losses import find_loss
from utils.algorithm.policy import build_optimizer, load_policy, load_tokenizer
from utils.algorithm.statistics import UpdateResult
from utils.engines import build_engine
from utils.problems import load_problems, load_template
from utils.records import Problem, Prompt, Rollout
from utils.rewards.functions import RewardScorer
from utils.rewards.grader import Grader
from utils.run.memory_tracker import MemoryTracker
from utils.seeding import derive_seed

# Prompts' chances of success are drawn from a Beta distribution with these parameters' sum: see docs/limits.md
BETA_CONCENTRATION = 8.0


# What is off: fields of the config, and a plainer piece of the inner loop
SWITCHES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    EQUAL_WORK: ({"skip_zero_advantage": False}, {}),
    "padding, prompts repeated": ({"use_packing": False}, {}),
    "the same, with a padding mask": ({"use_packing": False}, {"log_probs": with_padding_mask}),
    MKL: ({"use_onednn": False}, {}),
    "full logits": ({}, {"log_probs": from_full_logits}),
    "old log-probs recomputed": ({}, {"always_old_log_probs": True}),
    "microbatches in order of arrival": ({}, {"microbatches": in_order_of_arrival}),
}
assert tuple(SWITCHES) == SWITCHED_OFF


def switch_off(variant: str, training: Training) -> Pieces:
    """Put a variant into force: its fields into the config; returns the pieces of its inner loop."""
    replaced = {}
    for name, (fields, pieces) in SWITCHES.items():
        if variant in (name, EVERYTHING_OFF):
            vars(training).update(fields)
            replaced |= pieces
    return Pieces(**replaced)


class Workload:
    """A policy, its optimizer, and what makes a step's rollouts and rewards."""

    def __init__(self, args: argparse.Namespace, config: Config, pieces: Pieces) -> None:
        self.args, self.config, self.pieces, t = args, config, pieces, config.training
        self.policy = load_policy(config.paths.model_path, t)
        self.optimizer = build_optimizer(self.policy, t)
        if not args.shape:
            tokenizer = load_tokenizer(config.paths.model_path)
            self.prompts = [
                Prompt(Problem(text, "0"), text, tuple(tokenizer(text).input_ids))
                for text in prompt_texts(config, args.model)
            ]
            self.scorer = RewardScorer(t.reward_fn, t.extra_rewards, Grader())
            longest = max(len(prompt.token_ids) for prompt in self.prompts)
            self.engine = build_engine(config, self.policy, tokenizer, longest)

    def step(self, step: int, phase: Phases, by_phase: bool = False) -> UpdateResult:
        """A GRPO step as train_grpo.py takes it, but the rewards are drawn. `by_phase` times the update by phase."""
        t = self.config.training
        if self.args.shape:
            rollouts = self.random_rollouts(step)
        else:
            n_prompts = t.rollout_batch_size // t.group_size
            prompts = [self.prompts[(step * n_prompts + i) % len(self.prompts)] for i in range(n_prompts)]
            with phase("rollout"):
                rollouts = self.engine.generate(prompts, n=t.group_size, seed=derive_seed(t.seed, "rollouts", step))
            with phase("grading"):
                self.scorer.score(rollouts)
        with phase("batching and rest"):
            rewards = torch.tensor(draw_rewards(len(rollouts), t.group_size, self.args.reward, step))
            batch = make_train_batch(rollouts, rewards, compute_advantages(rewards, t))
            if by_phase or self.pieces != Pieces():
                clock = phase if by_phase else no_clock
                result = inner_loop(self.policy, self.optimizer, batch, t, step, self.pieces, clock)
            else:
                result = update_policy(self.policy, self.optimizer, batch, t, step)
            lengths = batch.sequence_lengths[mark_gradients(batch, find_loss(t.loss_type), t).rows_with_gradient]
            result.metrics["bench/sequence_tokens"] = float(lengths.sum())
            result.metrics["bench/squared_lengths"] = float(lengths.square().sum())
            self.last_batch = batch
        if not self.args.shape:
            with phase("push"):
                self.engine.update_weights(self.policy)
        return result

    def random_rollouts(self, step: int) -> list[Rollout]:
        """Random ids; prompts of 100 to 300 tokens, responses whose lengths are Gamma-distributed."""
        t = self.config.training
        rng = random.Random(derive_seed(t.seed, "ids", step))
        rollouts = []
        for _ in range(t.rollout_batch_size // t.group_size):
            prompt = Prompt(Problem("", "0"), "", self.random_ids(rng, rng.randint(100, 300)))
            for _ in range(t.group_size):
                length = min(t.max_tokens, 1 + int(rng.gammavariate(3, self.args.response_tokens / 3)))
                rollouts.append(Rollout(prompt, "", self.random_ids(rng, length), (-1.0,) * length, "stop"))
        return rollouts

    def random_ids(self, rng: random.Random, n: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(self.policy.config.vocab_size), k=n))


def prompt_texts(config: Config, model: str | None) -> list[str]:
    """The quickstart's sums in its template; with --model the config's own problems."""
    template = load_template(config.paths.prompt_template_file)
    problems = (
        load_problems(config.paths.train_data_file) if model else tiny.make_problems(150, config.training.seed)[0]
    )
    return [template.replace("{question}", problem.question) for problem in problems]


def draw_rewards(n: int, group_size: int, mean: float, step: int) -> list[float]:
    """0 or 1 for each of n rollouts; a group shares a chance of success, so that many groups agree, as in training."""
    rng = random.Random(derive_seed(0, "rewards", step))
    alpha, beta = mean * BETA_CONCENTRATION, (1 - mean) * BETA_CONCENTRATION
    chances = [rng.betavariate(alpha, beta) for _ in range(n // group_size)]
    return [float(rng.random() < chance) for chance in chances for _ in range(group_size)]


def measure(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Time `args.steps` steps of ours, then one more by phase (whose clocks make the GPU wait)."""
    device = torch.device(config.training.device)
    workload = Workload(args, config, switch_off(args.variant, config.training))
    silent = Phases(torch.device("cpu"))
    workload.step(0, silent)
    memory = MemoryTracker(device)
    clock = Clock(device)
    for step in range(1, args.steps + 1):
        workload.step(step, silent)
        clock.lap()
    peak = memory.mark("step")
    phases = Phases(device)
    result = workload.step(args.steps + 1, phases, by_phase=True)
    assert same_as_shipped(workload.policy, workload.last_batch, config.training)
    measured = {**clock.laps(), "peak_bytes": peak, "phases": phases.seconds, "metrics": result.metrics}
    if args.profile:
        measured["profile"] = profile(lambda phase: workload.step(args.steps + 2, phase), phases)
    return measured


def profile(step: Callable[[Any], Any], phases: Phases, n_shown: int = 12) -> dict[str, list[list[Any]]]:
    """What the sampling and the rest of a step spend their time on: [operation, calls, milliseconds of its own]."""
    profilers = {}
    own_time = "self_cpu_time_total" if phases.device.type == "cpu" else "self_device_time_total"

    @contextmanager
    def profiled(name: str) -> Iterator[None]:
        with torch.profiler.profile() as profilers[name]:  # of every kind of device that is here
            yield

    step(profiled)
    shown = {}
    for name, profiler in profilers.items():
        own = [[e.key, e.count, round(getattr(e, own_time) / 1e3, 2)] for e in profiler.key_averages()]
        total = ["all", sum(calls for _, calls, _ in own), round(sum(ms for *_, ms in own), 2)]
        shown[name] = [total, *sorted(own, key=lambda row: -row[2])[:n_shown]]
    return shown


def main() -> None:
    args = parse_arguments()
    config = resolve_config(args)
    print("\n" + json.dumps(measure(args, config)))


if __name__ == "__main__":
    main()

"""One measurement of bench/step.py, in a process of its own: our step, as one line of JSON.

`bench/step.py` starts this file; its options are described there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from common import OLD_LOG_PROBS, Clock, Phases, replaced
from options import EQUAL_WORK, EVERYTHING_OFF, MKL, SWITCHED_OFF, parse_arguments, resolve_config
from torch import Tensor

from configs.defaults import Config, Training
from utils import tiny
from utils.algorithm import log_probs, update
from utils.algorithm.batch import Microbatch, make_train_batch, take_microbatch
from utils.algorithm.losses import compute_entropy, group_advantages
from utils.algorithm.packing import Packing, packed_hidden_states
from utils.algorithm.policy import build_optimizer, load_policy, load_tokenizer
from utils.engines import build_engine
from utils.problems import load_template
from utils.records import Problem, Prompt, Rollout, TrainBatch
from utils.rewards.functions import RewardScorer
from utils.rewards.grader import Grader
from utils.run.memory_tracker import MemoryTracker
from utils.seeding import derive_seed

# Prompts' chances of success are drawn from a Beta distribution with these parameters' sum: see docs/limits.md
BETA_CONCENTRATION = 8.0


def log_probs_from_full_logits(
    policy: torch.nn.Module,
    input_ids: Tensor,
    response_mask: Tensor,
    temperature: float,
    packing: Packing | None = None,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    """`response_log_probs` the plain way: logits of prompts too, and of padding where there is any."""
    if packing is None:
        logits = policy(input_ids, use_cache=False).logits[:, :-1].float() / temperature
        values = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        entropy = compute_entropy(logits.detach())
    else:
        everywhere = torch.arange(len(packing.token_ids), device=input_ids.device)
        hidden = packed_hidden_states(policy, dataclasses.replace(packing, predicts=everywhere))
        logits = policy.get_output_embeddings()(hidden).float() / temperature
        predicts = packing.tokens_of.new_zeros(response_mask.shape).masked_scatter(response_mask, packing.predicts)
        values = logits.log_softmax(-1)[predicts].gather(-1, input_ids[:, 1:, None]).squeeze(-1)
        entropy = compute_entropy(logits.detach())[predicts]
    return torch.where(response_mask, values, 0.0), torch.where(response_mask, entropy, 0.0)


def log_probs_with_attention_mask(
    policy: torch.nn.Module, input_ids: Tensor, response_mask: Tensor, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`response_log_probs` with the padding mask that it does without."""
    log_probs.has_plain_head(policy)  # asked before the hidden states are computed another way
    end = torch.arange(1, input_ids.shape[1], device=input_ids.device).mul(response_mask).amax(1)
    mask = torch.arange(input_ids.shape[1], device=input_ids.device) <= end[:, None]

    def hidden_states(policy: torch.nn.Module, input_ids: Tensor) -> Tensor:
        return policy.get_decoder()(input_ids=input_ids, attention_mask=mask, use_cache=False).last_hidden_state

    with replaced(log_probs, "_hidden_states", hidden_states):
        return log_probs.response_log_probs(policy, input_ids, response_mask, **options)


def split_in_order(rows: Tensor, _lengths: Tensor, size: int, *_options: Any) -> list[Tensor]:
    return list(rows.split(size))


# What is off: fields of the config, and functions with something plainer in their place
SWITCHES: dict[str, tuple[dict[str, Any], Any]] = {
    EQUAL_WORK: ({"skip_zero_advantage": False}, None),
    "padding, prompts repeated": ({"use_packing": False}, None),
    "the same, with a padding mask": (
        {"use_packing": False},
        lambda: replaced(update, "response_log_probs", log_probs_with_attention_mask),
    ),
    MKL: ({"use_onednn": False}, None),
    "full logits": ({}, lambda: replaced(update, "response_log_probs", log_probs_from_full_logits)),
    "old log-probs recomputed": ({}, lambda: replaced(update, "needs_old_log_probs", lambda _training: True)),
    "microbatches in order of arrival": ({}, lambda: replaced(update, "split_rows", split_in_order)),
}
assert tuple(SWITCHES) == SWITCHED_OFF


def switch_off(variant: str, training: Training, stack: ExitStack) -> None:
    """Put a variant into force: its fields into the config, its functions into their modules until the stack ends."""
    for name, (fields, patch) in SWITCHES.items():
        if variant not in (name, EVERYTHING_OFF):
            continue
        for field, value in fields.items():
            setattr(training, field, value)
        if patch is not None:
            stack.enter_context(patch())


class Workload:
    """A policy, its optimizer, and what makes a step's rollouts and rewards."""

    def __init__(self, args: argparse.Namespace, config: Config) -> None:
        self.args, self.config, t = args, config, config.training
        self.policy = load_policy(config.paths.model_path, t)
        self.optimizer = build_optimizer(self.policy, t)
        if not args.shape:
            tokenizer = load_tokenizer(config.paths.model_path)
            self.prompts = [
                Prompt(Problem(text, ""), text, tuple(tokenizer(text).input_ids)) for text in prompt_texts(config)
            ]
            self.scorer = RewardScorer(t.reward_fn, t.extra_rewards, Grader())
            longest = max(len(prompt.token_ids) for prompt in self.prompts)
            self.engine = build_engine(config, self.policy, tokenizer, longest)

    def step(self, step: int, phase: Phases) -> update.UpdateResult:
        """A GRPO step as train_grpo.py takes it, but for the rewards, which are drawn."""
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
            advantages = group_advantages(rewards, t.group_size, t.use_std_normalization, t.advantage_eps)
            batch = make_train_batch(rollouts, rewards, advantages, pad_id=0)
            result = update.update_policy(self.policy, self.optimizer, batch, t, step)
            trained = advantages != 0 if t.skip_zero_advantage else torch.ones_like(advantages, dtype=torch.bool)
            lengths = batch.sequence_lengths[trained]
            result.metrics["bench/sequence_tokens"] = float(lengths.sum())
            result.metrics["bench/squared_lengths"] = float(lengths.square().sum())
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
            prompt = Prompt(Problem("", ""), "", self.random_ids(rng, rng.randint(100, 300)))
            for _ in range(t.group_size):
                length = min(t.max_tokens, 1 + int(rng.gammavariate(3, self.args.response_tokens / 3)))
                rollouts.append(Rollout(prompt, "", self.random_ids(rng, length), (-1.0,) * length, "stop"))
        return rollouts

    def random_ids(self, rng: random.Random, n: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(self.policy.config.vocab_size), k=n))


def prompt_texts(config: Config) -> list[str]:
    """The quickstart's sums in its template."""
    template = load_template(config.paths.prompt_template_file)
    problems, _ = tiny.make_problems(150, config.training.seed)
    return [template.replace("{question}", problem.question) for problem in problems]


def draw_rewards(n: int, group_size: int, mean: float, step: int) -> list[float]:
    """0 or 1 for each of n rollouts; a group shares a chance of success, so that many groups agree, as in training."""
    rng = random.Random(derive_seed(0, "rewards", step))
    alpha, beta = mean * BETA_CONCENTRATION, (1 - mean) * BETA_CONCENTRATION
    chances = [rng.betavariate(alpha, beta) for _ in range(n // group_size)]
    return [float(rng.random() < chance) for chance in chances for _ in range(group_size)]


def measure(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Time `args.steps` steps of ours, then one more by phase (whose clocks make the GPU wait)."""
    t = config.training
    with ExitStack() as switches:
        switch_off(args.variant, t, switches)
        workload = Workload(args, config)
        device = torch.device(t.device)
        silent = Phases(torch.device("cpu"))
        workload.step(0, silent)
        memory = MemoryTracker(device)
        clock = Clock(device)
        for step in range(1, args.steps + 1):
            workload.step(step, silent)
            clock.lap()
        peak = memory.mark("step")
        phases = Phases(device)
        computed: list[int] = []
        with (
            replaced(update, "take_microbatch", counting_tokens(computed, phases)),
            phases.watch(update, "compute_old_log_probs", OLD_LOG_PROBS),
            phases.watch(update, "train_on_microbatch", "backward"),
            phases.watch(update, "policy_log_probs", "forward"),
            phases.watch(update, "take_optimizer_step", "optimizer"),
        ):
            result = workload.step(args.steps + 1, phases)
    result.metrics["bench/model_tokens"] = float(sum(computed))
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


def counting_tokens(computed: list[int], phases: Phases) -> Any:
    """`take_microbatch`, which notes how many tokens are trained on: padding not counted, a shared prompt once."""

    def take_and_count(batch: TrainBatch, rows: Tensor, *options: Any) -> Microbatch:
        microbatch = take_microbatch(batch, rows, *options)
        packing = microbatch.packing
        if OLD_LOG_PROBS not in phases.running:
            computed.append(int(batch.sequence_lengths[rows].sum()) if packing is None else len(packing.token_ids))
        return microbatch

    return take_and_count


def main() -> None:
    args = parse_arguments()
    config = resolve_config(args)
    print("\n" + json.dumps(measure(args, config)))


if __name__ == "__main__":
    main()

"""One measurement of bench_step.py, in a process of its own: our step, as one line of JSON.

`bench_step.py` starts this file; its options are described there.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.defaults import Config
from utils import log_probs, tiny, update
from utils.batching import make_train_batch
from utils.dataset import load_template
from utils.engines import build_engine
from utils.grader import Grader
from utils.grpo import compute_entropy, group_advantages
from utils.memory import MemoryTracker
from utils.policy import build_optimizer, load_policy, load_tokenizer
from utils.records import Problem, Prompt, Rollout
from utils.rewards import RewardScorer
from utils.seeding import derive_seed

ROOT = Path(__file__).parents[1]
# Prompts' chances of success are drawn from a Beta distribution with these parameters' sum: see docs/limits.md
BETA_CONCENTRATION = 8.0


@contextmanager
def replaced(module: Any, name: str, replacement: Any) -> Iterator[None]:
    """Put something in the place of a module's function, for a while."""
    original = getattr(module, name)
    setattr(module, name, replacement)
    try:
        yield
    finally:
        setattr(module, name, original)


def log_probs_from_full_logits(
    policy: torch.nn.Module, input_ids: Tensor, response_mask: Tensor, temperature: float, **_options: Any
) -> tuple[Tensor, Tensor]:
    """`response_log_probs` the plain way: logits of prompt and padding too."""
    logits = policy(input_ids, use_cache=False).logits[:, :-1].float() / temperature
    values = logits.log_softmax(-1).gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    return torch.where(response_mask, values, 0.0), torch.where(response_mask, compute_entropy(logits.detach()), 0.0)


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


def split_in_order(rows: Tensor, _lengths: Tensor, size: int, _max_tokens: int | None = None) -> list[Tensor]:
    return list(rows.split(size))


AS_SHIPPED, EQUAL_WORK, EVERYTHING_OFF = "as shipped", "zero advantages trained on", "everything off"
SWITCHES = {
    EQUAL_WORK: None,  # by config
    "full logits": lambda: replaced(update, "response_log_probs", log_probs_from_full_logits),
    "old log-probs recomputed": lambda: replaced(update, "needs_old_log_probs", lambda _training: True),
    "microbatches in order of arrival": lambda: replaced(update, "split_rows", split_in_order),
    "attention mask": lambda: replaced(update, "response_log_probs", log_probs_with_attention_mask),
}
VARIANTS = (AS_SHIPPED, *SWITCHES, EVERYTHING_OFF)


class Phases:
    """Seconds by phase; a phase inside another one stops the outer one's clock."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds, self.running = device, {}, []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self._tick()
        self.running.append(name)
        try:
            yield
        finally:
            self._tick()
            self.running.pop()

    def watch(self, module: Any, function: str, name: str) -> Any:
        """Count every call of a module's function as a phase, except within the pass for old log-probs."""
        original = getattr(module, function)

        @functools.wraps(original)
        def watched(*args: Any, **options: Any) -> Any:
            if "old log-probs" in self.running:
                return original(*args, **options)
            with self(name):
                return original(*args, **options)

        return replaced(module, function, watched)

    def _tick(self) -> None:
        wait_for(self.device)
        now = time.perf_counter()
        if self.running:
            name = self.running[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now


class Clock:
    """Time from lap to lap, on the wall and of the processor (all threads), which busy neighbours disturb less."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, []
        self.lap()

    def lap(self) -> None:
        wait_for(self.device)
        self.times.append((time.perf_counter(), time.process_time()))

    def laps(self) -> dict[str, list[float]]:
        walls, cpus = zip(*self.times, strict=True)
        return {
            "seconds": [later - sooner for sooner, later in itertools.pairwise(walls)],
            "cpu_seconds": [later - sooner for sooner, later in itertools.pairwise(cpus)],
        }


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


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
            result.metrics["bench/model_tokens"] = float(lengths.sum())
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
    everything_off = args.variant == EVERYTHING_OFF
    if everything_off or args.variant == EQUAL_WORK:
        t.skip_zero_advantage = False
    if everything_off:
        names = [name for name in SWITCHES if name != "attention mask"]  # full logits bring their own forward pass
    else:
        names = [args.variant] if args.variant in SWITCHES else []
    with ExitStack() as switches:
        for name in names:
            if SWITCHES[name] is not None:
                switches.enter_context(SWITCHES[name]())
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
        with (
            phases.watch(update, "compute_old_log_probs", "old log-probs"),
            phases.watch(update, "train_on_microbatch", "backward"),
            phases.watch(update, "policy_log_probs", "forward"),
            phases.watch(update, "take_optimizer_step", "optimizer"),
        ):
            result = workload.step(args.steps + 1, phases)
    return {**clock.laps(), "peak_bytes": peak, "phases": phases.seconds, "metrics": result.metrics}


def main() -> None:
    from bench_step import parse_arguments, resolve_config

    args = parse_arguments()
    config = resolve_config(args)
    print("\n" + json.dumps(measure(args, config)))


if __name__ == "__main__":
    main()

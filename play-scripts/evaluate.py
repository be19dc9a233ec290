"""Evaluate a checkpoint on a whole validation set, greedily and by sampling.

    python play-scripts/evaluate.py runs/quickstart/checkpoints/best
    python play-scripts/evaluate.py Qwen/Qwen2.5-Math-1.5B --config configs/hardware/rtx4090.yaml --samples 8

Prompt, reward function, engine and sampling come from the config: --config, or the config.yaml of the run that the
checkpoint lies in. Prints mean reward with its standard error over problems, pass@k, the split by level and subject
where the data has them, and how many answers were wrong in which way; --output writes the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.defaults import Config
from utils.log.files import CONFIG_FILE
from utils.log.output import unwritable
from utils.preflight.config import load_config_and_origins, to_dict
from utils.preflight.fit import fit_to_card
from utils.preflight.model_files import is_local
from utils.preflight.obstacles import refuse, shortfalls, unusable_files
from utils.preflight.yaml_values import to_yaml_value
from utils.run.ending import Status


def main(arguments: Sequence[str] | None = None) -> Status:
    options = parse_arguments(arguments)
    try:
        check_options(options)
        config = checkpoint_config(options)
        inputs = ("val_data_file", "prompt_template_file")
        refuse([*shortfalls(config, inputs), *unusable_files(config, inputs)])
        rounds = evaluate_checkpoint(config, options.samples, options.greedy)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return Status.USER_MISTAKE
    summary = {name: summarize(*outcome) for name, outcome in rounds.items()}
    summary = {"checkpoint": options.checkpoint, "data": config.paths.val_data_file, **summary}
    show(summary)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(json.dumps(summary, indent=2) + "\n")
        print(f"written to {options.output}")
    return Status.FINISHED


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder or hub name")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later files win")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="responses per problem; 0: greedy only")
    parser.add_argument("--no-greedy", dest="greedy", action="store_false", help="leave out the greedy round")
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    return parser.parse_intermixed_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong with the command alone."""
    if options.samples < 0 or (options.samples == 0 and not options.greedy):
        raise ValueError(f"--samples {options.samples}: nothing to do; give 1 or more, or leave --no-greedy out")
    reason = options.output and unwritable(Path(options.output), is_file=True)
    if reason:
        raise ValueError(f"--output {options.output}: {reason}")
    folder = Path(options.checkpoint)
    if is_local(options.checkpoint) and not (folder / "config.json").is_file():
        inside = [folder / place / name for place in ("checkpoints", ".") for name in ("best", "last")]
        found = [str(path) for path in inside if path.is_dir()]
        hint = f"; give {' or '.join(found)}" if found else ""
        raise ValueError(f"{options.checkpoint} is no checkpoint: it holds no config.json{hint}")


def checkpoint_config(options: argparse.Namespace) -> Config:
    """The config to evaluate with; its validation set is taken whole unless max_val_examples is overridden."""
    files = options.config
    if not files and Path(options.checkpoint).exists():
        files = [Path(options.checkpoint).resolve().parents[1] / CONFIG_FILE]
    if files and not options.config and not files[0].is_file():
        raise ValueError(f"{options.checkpoint} lies in no run folder, so its config is unknown; give --config")
    whole = ["training.max_val_examples=null", f"paths.model_path={to_yaml_value(options.checkpoint)}"]
    config, origins = load_config_and_origins(files, [*whole, *options.overrides])
    config, _ = fit_to_card(config, origins)
    # nothing is trained, so what training needs may be missing here
    config.training = replace(config.training, use_bnb_adamw8bit=False, use_gradient_checkpointing=False)
    return config


def evaluate_checkpoint(config: Config, n_samples: int, greedy: bool) -> dict[str, tuple[list, list, int]]:
    """Sample: {"greedy" or "sampled": (rollouts, rewards, responses per problem)}."""
    from utils.algorithm.policy import load_policy, load_tokenizer
    from utils.engines import build_engine
    from utils.problems import fixed_subset
    from utils.rewards.functions import RewardScorer
    from utils.rewards.grader import Grader
    from utils.run.build import load_prompts, try_own_code
    from utils.run.evaluate import evaluate
    from utils.seeding import derive_seed

    t = config.training
    try_own_code(config)
    tokenizer = load_tokenizer(config.paths.model_path)
    prompts, notes = load_prompts(config, config.paths.val_data_file, tokenizer)
    print("\n".join(notes), end="\n" if notes else "")
    prompts = fixed_subset(prompts, t.max_val_examples, t.seed)
    policy = load_policy(config.paths.model_path, t)
    rounds: dict[str, tuple[list, list, int]] = {}
    with Grader(**to_dict(config)["grader"]) as grader:
        scorer = RewardScorer(t.reward_fn, t.extra_rewards, grader)
        engine = build_engine(config, policy, tokenizer, longest_prompt=max(len(p.token_ids) for p in prompts))
        try:
            if greedy:
                _, rollouts, rewards = evaluate(engine, prompts, scorer, seed=0, temperature=0.0)
                rounds["greedy"] = (rollouts, rewards, 1)
            if n_samples:
                seed = derive_seed(t.seed, "evaluation")
                _, rollouts, rewards = evaluate(engine, prompts, scorer, seed, n=n_samples)
                rounds["sampled"] = (rollouts, rewards, n_samples)
        finally:
            engine.close()
    return rounds


def summarize(rollouts: list, rewards: list, n: int) -> dict:
    """The figures of one round of n responses per problem."""
    from utils.run.evaluate import mean, pass_at_k, response_metrics, standard_error

    groups = [rewards[i : i + n] for i in range(0, len(rewards), n)]
    per_problem = [mean([reward.total for reward in group]) for group in groups]
    n_right = [sum(reward.answer > 0 for reward in group) for group in groups]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= n]
    splits: dict[str, dict[str, list[float]]] = {"level": defaultdict(list), "subject": defaultdict(list)}
    for rollout, value in zip(rollouts[::n], per_problem, strict=True):
        for name, by_value in splits.items():
            label = getattr(rollout.prompt.problem, name)
            if label is not None:
                by_value[label].append(value)
    return {
        "problems": len(groups),
        "responses_per_problem": n,
        **response_metrics(rollouts, rewards),
        "reward_std_error": standard_error(per_problem),
        "pass_at_k": {str(k): mean([pass_at_k(n, right, k) for right in n_right]) for k in ks},
        "right_format_wrong_answer": sum(reward.format > 0 and reward.answer == 0 for reward in rewards),
        "wrong_format": sum(reward.format == 0 for reward in rewards),
        **{
            f"by_{name}": {
                label: {"problems": len(values), "reward": mean(values), "std_error": standard_error(values)}
                for label, values in sorted(by_value.items())
            }
            for name, by_value in splits.items()
            if by_value
        },
    }


def show(summary: dict) -> None:
    """Print the rounds side by side, then the splits."""
    rounds = {name: value for name, value in summary.items() if isinstance(value, dict)}
    table = Table(title=f"{summary['checkpoint']} on {summary['data']}")
    table.add_column("")
    for name, figures in rounds.items():
        each = (
            f"{figures['responses_per_problem']} responses per problem" if figures["responses_per_problem"] > 1 else ""
        )
        table.add_column(f"{name}\n{each}".strip(), justify="right")

    def row(label: str, cell: object) -> None:
        table.add_row(label, *(cell(figures) for figures in rounds.values()))

    row("problems", lambda f: f"{f['problems']:,}")
    row("reward", lambda f: f"{f['reward']:.4f} ± {f['reward_std_error']:.4f}")
    row("format reward", lambda f: f"{f['format_reward']:.4f}")
    row("right format, wrong answer", lambda f: f"{f['right_format_wrong_answer']:,}")
    row("wrong format", lambda f: f"{f['wrong_format']:,}")
    row("mean response length", lambda f: f"{f['mean_response_length']:.1f}")
    row("truncated", lambda f: f"{f['frac_truncated']:.1%}")
    for k in sorted({k for figures in rounds.values() for k in figures["pass_at_k"]}, key=int):
        row(f"pass@{k}", lambda f, k=k: f"{f['pass_at_k'][k]:.4f}" if k in f["pass_at_k"] else "")
    for split in ("by_level", "by_subject"):
        for label in sorted({label for figures in rounds.values() for label in figures.get(split, {})}):
            row(label, lambda f, s=split, v=label: "{reward:.4f} ± {std_error:.4f} ({problems:,})".format(**f[s][v]))
    Console().print(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # as a shell shows SIGINT

"""Evaluate a checkpoint on a whole validation set, greedily and by sampling.

    python play-scripts/evaluate.py runs/quickstart/checkpoints/best
    python play-scripts/evaluate.py Qwen/Qwen2.5-Math-1.5B --config configs/hardware/rtx4090.yaml --samples 8 \\
        --data data/math/validation.jsonl data/gsm8k/validation.jsonl --output runs/evaluated

Prompt, reward function, engine and sampling come from the config: --config, or the config.yaml of the run that the
checkpoint lies in. For one data file it prints mean reward, pass@k and maj@k (is the answer that most of k samples give
right?), each with its standard error over problems, the split by level and subject if the data has them, and how
many answers were wrong in which way. Several data files become one table.

--output is a folder: it gets the figures as figures.json, and every response in rollouts.jsonl, which
`python play-scripts/view_rollouts.py FOLDER` shows.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from configs.defaults import Config
from utils.adapter_files import is_in_4bit
from utils.log.checkpoints import step_of_checkpoint
from utils.log.files import CONFIG_FILE, ROLLOUTS_FILE, encode_row
from utils.log.output import unwritable
from utils.log.rollout_rows import rollout_rows
from utils.preflight.adapter_checks import unusable_base
from utils.preflight.config import load_config_and_origins, to_dict
from utils.preflight.fit import fit_to_card
from utils.preflight.model_files import is_local
from utils.preflight.obstacles import refuse, shortfalls, unusable_files
from utils.preflight.yaml_values import to_yaml_value
from utils.records import Reward, Rollout
from utils.run.ending import Status


def main(arguments: Sequence[str] | None = None) -> Status:
    options = parse_arguments(arguments)
    try:
        check_options(options)
        config = checkpoint_config(options)
        inputs = ("val_data_file", "prompt_template_file")
        data_files = options.data or [config.paths.val_data_file]
        for path in data_files:
            config.paths.val_data_file = path
            refuse([*shortfalls(config, inputs), *unusable_files(config, inputs)])
        results = evaluate_checkpoint(config, data_files, options.samples, options.greedy)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return Status.USER_MISTAKE
    sets = {path: {name: summarize(outcome) for name, outcome in rounds.items()} for path, rounds in results.items()}
    show(options.checkpoint, sets)
    if options.output:
        write(Path(options.output), options.checkpoint, sets, results)
    return Status.FINISHED


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder or hub name")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later files win")
    parser.add_argument("--samples", type=int, default=4, metavar="N", help="responses per problem; 0: greedy only")
    parser.add_argument("--no-greedy", dest="greedy", action="store_false", help="leave out the greedy round")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="data files in place of the config's val_data_file")
    parser.add_argument("--output", metavar="FOLDER", help="write the figures and every response there")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    return parser.parse_intermixed_args(arguments)


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for what is wrong with the command alone."""
    if options.samples < 0 or (options.samples == 0 and not options.greedy):
        raise ValueError(f"--samples {options.samples}: nothing to do; give 1 or more, or leave --no-greedy out")
    reason = options.output and unwritable(Path(options.output), is_new=True)
    if reason:
        raise ValueError(f"--output {options.output}: {reason}")
    check_checkpoint(options.checkpoint)


def check_checkpoint(checkpoint: str) -> None:
    """Raise ValueError for a folder that is no checkpoint, with those in it."""
    folder = Path(checkpoint)
    if is_local(checkpoint) and not (folder / "config.json").is_file():
        inside = [folder / place / name for place in ("checkpoints", ".") for name in ("best", "last")]
        checkpoints = [str(path) for path in inside if path.is_dir()]
        hint = f"; give {' or '.join(checkpoints)}" if checkpoints else ""
        raise ValueError(f"{checkpoint} is no checkpoint: it holds no config.json{hint}")


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
    # nothing is trained, so what training needs may be missing here, and no new adapter is put into a whole model
    unused = {"optimizer": "adamw", "use_gradient_checkpointing": False, "trackers": [], "wandb_project": ""}
    refuse(unusable_base(options.checkpoint))
    config.training = replace(config.training, **unused, lora_rank=None, load_in_4bit=is_in_4bit(options.checkpoint))
    return config


@dataclass(frozen=True)
class Outcome:
    """A round over one data file: n responses per problem, side by side, and the answers found in them, if known."""

    rollouts: list[Rollout]
    rewards: list[Reward]
    n: int
    answers: list[str | None] | None


def evaluate_checkpoint(
    config: Config, data_files: Sequence[str], n_samples: int, greedy: bool
) -> dict[str, dict[str, Outcome]]:
    """Sample: {data file: {"greedy" or "sampled": outcome}}."""
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
    prompts = {}
    for path in data_files:
        loaded, notes = load_prompts(config, path, tokenizer)
        print("\n".join(notes), end="\n" if notes else "")
        prompts[path] = fixed_subset(loaded, t.max_val_examples, t.seed)
    policy = load_policy(config.paths.model_path, t)
    rounds = {"greedy": (1, 0, 0.0)} if greedy else {}
    rounds |= {"sampled": (n_samples, derive_seed(t.seed, "evaluation"), None)} if n_samples else {}
    results: dict[str, dict[str, Outcome]] = {path: {} for path in data_files}
    with Grader(**to_dict(config)["grader"]) as grader:
        scorer = RewardScorer(t.reward_fn, t.extra_rewards, grader)
        extract = getattr(scorer.main, "extract", None)
        longest = max(len(prompt.token_ids) for each in prompts.values() for prompt in each)
        engine = build_engine(config, policy, tokenizer, longest_prompt=longest)
        try:
            for path, each in prompts.items():
                for name, (n, seed, temperature) in rounds.items():
                    print(f"{path}: {name}, {len(each) * n:,} responses to {len(each):,} problems", flush=True)
                    _, rollouts, rewards = evaluate(engine, each, scorer, seed, n, temperature)
                    answers = [extract(rollout.response) for rollout in rollouts] if extract else None
                    results[path][name] = Outcome(rollouts, rewards, n, answers)
        finally:
            engine.close()
    return results


def summarize(outcome: Outcome) -> dict:
    """The figures of one round."""
    from utils.run.evaluate import maj_at_k, mean, pass_at_k, response_metrics, standard_error

    rollouts, rewards, n, answers = outcome.rollouts, outcome.rewards, outcome.n, outcome.answers
    starts = range(0, len(rewards), n)
    right = [reward.answer > 0 for reward in rewards]
    per_problem = [mean([reward.total for reward in rewards[i : i + n]]) for i in starts]
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= n]
    passed = {k: [pass_at_k(n, sum(right[i : i + n]), k) for i in starts] for k in ks}
    voted = {k: [maj_at_k(answers[i : i + n], right[i : i + n], k) for i in starts] for k in ks[2:] if answers}
    splits: dict[str, dict[str, list[float]]] = {"level": defaultdict(list), "subject": defaultdict(list)}
    for rollout, value in zip(rollouts[::n], per_problem, strict=True):
        for name, by_value in splits.items():
            label = getattr(rollout.prompt.problem, name)
            if label is not None:
                by_value[label].append(value)
    return {
        "problems": len(starts),
        "responses_per_problem": n,
        **response_metrics(rollouts, rewards),
        "reward_std_error": standard_error(per_problem),
        "pass_at_k": {str(k): mean(values) for k, values in passed.items()},
        "pass_at_k_std_error": {str(k): standard_error(values) for k, values in passed.items()},
        "maj_at_k": {str(k): mean(values) for k, values in voted.items()},
        "maj_at_k_std_error": {str(k): standard_error(values) for k, values in voted.items()},
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


def write(folder: Path, checkpoint: str, sets: dict, results: dict[str, dict[str, Outcome]]) -> None:
    """The figures, and every response as a row that the viewer reads: its split names the data file and the round."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps({"checkpoint": checkpoint, "sets": sets}, indent=2) + "\n")
    name = Path(checkpoint).resolve().name
    step = step_of_checkpoint(Path(name)) if re.fullmatch(r"step_\d+", name) else 0
    with (folder / ROLLOUTS_FILE).open("w") as file:
        for path, rounds in results.items():
            for round_name, outcome in rounds.items():
                split = round_name if len(results) == 1 else f"{Path(path).parent.name}/{Path(path).stem} {round_name}"
                for row in rollout_rows(split, step, outcome.rollouts, outcome.rewards, group_size=outcome.n):
                    file.write(encode_row(row) + "\n")
    print(f"written to {folder}; to read the responses: python play-scripts/view_rollouts.py {folder}")


def show(checkpoint: str, sets: dict[str, dict[str, dict]]) -> None:
    """One data file in detail, or a row for each of several."""
    if len(sets) == 1:
        show_one(checkpoint, *next(iter(sets.items())))
        return
    table = Table("data", "problems", title=checkpoint)
    rounds = next(iter(sets.values()))
    columns = [(f"{name} reward", name, "reward", None) for name in rounds]
    for what in ("pass", "maj"):
        ks = list(rounds.get("sampled", {}).get(f"{what}_at_k", {}))[-1:]
        columns += [(f"{what}@{k}", "sampled", f"{what}_at_k", k) for k in ks]
    for title, *_ in columns:
        table.add_column(title, justify="right")
    for path, figures in sets.items():
        cells = [with_error(figures[name], field, k) for _, name, field, k in columns]
        table.add_row(path, f"{next(iter(figures.values()))['problems']:,}", *cells)
    print_table(table)


def print_table(table: Table) -> None:
    """As wide as it is where no terminal limits it: in a log, cells that are broken over lines cannot be searched."""
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def with_error(figures: dict, field: str, k: str | None = None) -> str:
    """A figure and its standard error over problems; empty if it was not measured."""
    value, error = figures[field], figures[f"{field}_std_error"]
    if k is None:
        return f"{value:.4f} ± {error:.4f}"
    return f"{value[k]:.4f} ± {error[k]:.4f}" if k in value else ""


def show_one(checkpoint: str, data_file: str, rounds: dict[str, dict]) -> None:
    """Print the rounds side by side, then the splits."""
    table = Table(title=f"{checkpoint} on {data_file}")
    table.add_column("")
    for name, figures in rounds.items():
        each = (
            f"{figures['responses_per_problem']} responses per problem" if figures["responses_per_problem"] > 1 else ""
        )
        table.add_column(f"{name}\n{each}".strip(), justify="right")

    def row(label: str, cell: object) -> None:
        table.add_row(label, *(cell(figures) for figures in rounds.values()))

    row("problems", lambda f: f"{f['problems']:,}")
    row("reward", lambda f: with_error(f, "reward"))
    row("format reward", lambda f: f"{f['format_reward']:.4f}")
    row("right format, wrong answer", lambda f: f"{f['right_format_wrong_answer']:,}")
    row("wrong format", lambda f: f"{f['wrong_format']:,}")
    row("mean response length", lambda f: f"{f['mean_response_length']:.1f}")
    row("truncated", lambda f: f"{f['frac_truncated']:.1%}")
    for what in ("pass", "maj"):
        field = f"{what}_at_k"
        for k in sorted({k for figures in rounds.values() for k in figures[field]}, key=int):
            row(f"{what}@{k}", lambda f, field=field, k=k: with_error(f, field, k))
    for split in ("by_level", "by_subject"):
        for label in sorted({label for figures in rounds.values() for label in figures.get(split, {})}):
            row(label, lambda f, s=split, v=label: "{reward:.4f} ± {std_error:.4f} ({problems:,})".format(**f[s][v]))
    print_table(table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # as a shell shows SIGINT

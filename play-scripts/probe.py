"""Look at what a config's model does before any training: groups of responses, counted, and two of them in full.

    python play-scripts/probe.py --config configs/quickstart.yaml
    python play-scripts/probe.py --config configs/math.yaml training.max_tokens=512 --responses 128

Prompts are those of the config's validation problems; engine, sampling and rewards are the config's too. Nothing is
written. It prints how many responses are right, in the required format and truncated; in how many groups the rewards
differ; and why responses have no reward.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from configs.defaults import Config
from utils.adapter_files import is_in_4bit
from utils.preflight.adapter_checks import unusable_base
from utils.preflight.config import load_config_and_origins, to_dict
from utils.preflight.fit import fit_to_card
from utils.preflight.obstacles import refuse, shortfalls, unusable_files
from utils.run.ending import Status


def main(arguments: Sequence[str] | None = None) -> Status:
    options = parse_arguments(arguments)
    try:
        if options.responses < 1:
            raise ValueError(f"--responses {options.responses}: give 1 or more")
        config, _ = fit_to_card(*load_config_and_origins(options.config, options.overrides))
        refuse(unusable_base(config.paths.model_path))
        # nothing is trained, so what training needs may be missing here, and an adapter's base is as it was trained on
        unused = {"optimizer": "adamw", "use_gradient_checkpointing": False, "trackers": [], "wandb_project": ""}
        in_4bit = is_in_4bit(config.paths.model_path)
        config.training = replace(config.training, **unused, lora_rank=None, load_in_4bit=in_4bit)
        inputs = ("val_data_file", "prompt_template_file")
        refuse([*shortfalls(config, inputs), *unusable_files(config, inputs)])
        lines = probe(config, options.responses)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return Status.USER_MISTAKE
    print("\n".join(lines))
    return Status.FINISHED


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later files win")
    parser.add_argument(
        "--responses",
        type=int,
        default=64,
        metavar="N",
        help="about how many responses to sample, in whole groups (64)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    return parser.parse_intermixed_args(arguments)


def probe(config: Config, n_responses: int) -> list[str]:
    """The look, as lines."""
    from utils.algorithm.policy import load_policy, load_tokenizer
    from utils.engines import build_engine
    from utils.rewards.functions import RewardScorer
    from utils.rewards.grader import Grader
    from utils.run.build import load_prompts, try_own_code
    from utils.run.look import look_before_training

    t = config.training
    try_own_code(config)
    tokenizer = load_tokenizer(config.paths.model_path)
    prompts, notes = load_prompts(config, config.paths.val_data_file, tokenizer)
    policy = load_policy(config.paths.model_path, t)
    with Grader(**to_dict(config)["grader"]) as grader:
        scorer = RewardScorer(t.reward_fn, t.extra_rewards, grader)
        engine = build_engine(config, policy, tokenizer, longest_prompt=max(len(p.token_ids) for p in prompts))
        try:
            look = look_before_training(engine, prompts, scorer, t, n_responses)
        finally:
            engine.close()
    return [*(f"note: {note}" for note in notes), *look.lines()]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # as a shell shows SIGINT

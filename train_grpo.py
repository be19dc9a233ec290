"""Train a causal language model with GRPO (Group Relative Policy Optimization) on problems with verifiable answers.

    python train_grpo.py --config configs/quickstart.yaml
    python train_grpo.py --config configs/lr_sweep/3e-5.yaml --config configs/hardware/rtx4090.yaml training.seed=7

A GRPO step samples a group of responses to each of a few problems, scores them, takes as a response's advantage its
reward against its group's, and follows the policy gradient. `train` below is the algorithm, `utils/algorithm/` its
mathematics and inner loop; what surrounds a step (evaluating, saving, ending) is in `utils/run/`.

Exit status: 0 finished, 1 an error, 2 a mistake in what was asked for, 3 collapsed, 4 stopped by a signal and saved
(before the first step there is nothing to save), 5 time limit reached and saved, 6 too many non-finite numbers.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.preflight.command_line import parse_arguments
from utils.preflight.config import load_config
from utils.preflight.dry_run import show_dry_run
from utils.preflight.obstacles import check_before_loading
from utils.run.ending import Status, StopRequest, TimeLimit

if TYPE_CHECKING:
    from utils.run.run import Run


def train(run: Run) -> Status:
    """The outer loop of GRPO (DeepSeekMath, algorithm 1, with verified rewards and no reference policy)."""
    import torch  # here and not above: --help and --dry-run need none of it, and it takes seconds

    from utils.algorithm.batch import make_train_batch, pad_id_of
    from utils.algorithm.losses import group_advantages
    from utils.algorithm.update import update_policy
    from utils.seeding import derive_seed

    t = run.config.training
    while True:
        run.evaluate_if_due()
        run.save_if_due()
        ending = run.reason_to_end()
        if ending is not None:
            return ending

        run.start_step()
        step = run.state.grpo_step
        prompts = run.problem_stream.draw(t.rollout_batch_size // t.group_size)
        with run.phase("rollout"):
            rollouts = run.engine.generate(
                prompts, n=t.group_size, seed=derive_seed(t.seed, "rollouts", step), stop=lambda: run.stop.requested
            )
        if run.stop.requested:
            continue
        run.check_engine(rollouts)
        run.sleep_engine()
        with run.phase("grading"):
            rewards = run.scorer.score(rollouts)
        raw_rewards = torch.tensor([reward.total for reward in rewards])
        advantages = group_advantages(raw_rewards, t.group_size, t.use_std_normalization, t.advantage_eps)
        batch = make_train_batch(rollouts, raw_rewards, advantages, pad_id_of(run.tokenizer))
        with run.phase("train"):
            update = update_policy(run.policy, run.optimizer, batch, t, step, lambda: run.stop.requested)
        if update.abandoned:  # asked to stop: the state is still that of the last whole step
            continue
        with run.phase("push"):
            run.push_weights()
        run.finish_step(rollouts, rewards, advantages, update)


def main(arguments: Sequence[str] | None = None) -> Status:
    options = parse_arguments(arguments, __doc__)
    try:
        config = load_config(options.config, options.overrides)
        if options.dry_run:
            can_start = show_dry_run(config, options.resume, options.allow_changes, options.full)
            return Status.FINISHED if can_start else Status.USER_MISTAKE
        check_before_loading(config, options.resume, options.allow_changes)
    except ValueError as mistake:
        return report_mistake(mistake)

    limit = TimeLimit(config.training.max_hours)
    from utils.run.build import build_run

    with StopRequest() as stop:
        try:
            run = build_run(config, options.resume, options.allow_changes, stop, limit)
        except ValueError as mistake:
            return report_mistake(mistake)
        with run:
            return run.end(train(run))


def report_mistake(mistake: ValueError) -> Status:
    print(f"error: {mistake}", file=sys.stderr)
    return Status.USER_MISTAKE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # while torch is imported; from then on a StopRequest listens
        print("\ninterrupted before the run began", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # a shell shows it as 130

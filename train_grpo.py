"""Train a causal language model with GRPO (Group Relative Policy Optimization) on problems with verifiable answers.

    python train_grpo.py --config configs/quickstart.yaml
    python train_grpo.py --config configs/lr_sweep/3e-5.yaml --config configs/hardware/rtx4090.yaml training.seed=7

A GRPO step samples a group of responses per problem and scores them. A response's advantage is its reward compared with
the rewards of its group. The step then follows the policy gradient. In `train_grpo.py`, `train` is the outer
loop and `update_policy` the inner loop. Their mathematics is in `utils/algorithm/losses.py`, and what surrounds a step
in `utils/run/`.

Exit status: 0 finished, 1 an error, 2 a mistake in the command or config, 3 collapsed, 4 stopped by a signal and saved
(while loading and before the first step there is nothing to save), 5 time limit reached and saved, 6 too many
non-finite numbers.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from utils.log.files import CannotWrite
from utils.preflight.command_line import parse_arguments
from utils.preflight.config import load_config_and_origins
from utils.preflight.dry_run import show_dry_run
from utils.preflight.fit import fit_to_card
from utils.preflight.obstacles import check_before_loading
from utils.ranks import RankLost, keep_quiet_unless_first, launched
from utils.run.ending import Status, StoppedWhileLoading, StopRequest, TimeLimit
from utils.run.start import decided_by_first_rank

if TYPE_CHECKING:
    import argparse

    import torch

    from configs.defaults import Config, Training
    from utils.algorithm.batch import TrainBatch
    from utils.algorithm.statistics import UpdateResult
    from utils.run.run import Run


def train(run: Run) -> Status:
    """The outer loop of GRPO: DeepSeekMath, algorithm 1, with verified rewards."""
    import torch  # here and not above: it takes seconds, and --help and --dry-run do not need it

    from utils.algorithm.advantages import compute_advantages
    from utils.algorithm.batch import make_train_batch
    from utils.algorithm.groups import GroupCollector
    from utils.algorithm.update import with_reference_log_probs
    from utils.rewards.functions import totals_with_overlong_penalty

    t, learner, meter = run.config.training, run.learner, run.meter
    while True:
        run.evaluate_if_due()
        run.save_if_due()
        ending = run.reason_to_end()
        if ending is not None:
            return ending

        meter.start()
        groups, steps_done = GroupCollector(t), run.state.steps_done
        while groups.n_missing and not run.should_stop():  # one round; with refill_groups, until enough groups teach
            prompts = learner.problem_stream.draw(groups.n_missing)
            seed = groups.seed(steps_done)
            with meter.phase("rollout"):
                rollouts = learner.engine.generate(prompts, n=t.group_size, seed=seed, should_stop=run.signalled)
            with meter.phase("grading"):
                groups.add(rollouts, learner.scorer.score(rollouts))
        if run.should_stop():
            continue
        run.check_engine(groups.rollouts)
        meter.add(learner.engine.sleep())
        learner.problem_stream.retire(groups.solved(t.retire_pass_rate))
        rewards = torch.tensor(totals_with_overlong_penalty(groups.rollouts, groups.rewards, t))
        advantages = compute_advantages(rewards, t)
        batch = make_train_batch(groups.rollouts, rewards, advantages, len(learner.tokenizer), t.mask_truncated)
        with meter.phase("train"):
            if learner.reference is not None:
                batch = with_reference_log_probs(learner.reference, batch, t)
            update = update_policy(learner.policy, learner.optimizer, batch, t, steps_done, run.signalled)
        if update.abandoned:  # asked to stop: the state is still the last whole step's
            continue
        with meter.phase("push"):
            meter.add(learner.engine.update_weights(learner.policy))
        run.finish_step(groups, batch, update)


def update_policy(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    training: Training,
    steps_done: int,
    should_stop: Callable[[], bool] = lambda: False,
) -> UpdateResult:
    """The inner loop: `epochs_per_rollout_batch` passes over one rollout batch, an optimizer step per minibatch.

    Its objective is `utils.algorithm.losses.objective`. A step whose loss or gradient is not finite is skipped. If
    `should_stop` returns True before the first optimizer step, the update is abandoned and the weights are untouched.
    After that step the update is finished, so that the weights are always those of a whole GRPO step.
    """
    from utils.algorithm.aggregation import aggregate_loss
    from utils.algorithm.batch import mark_gradients, microbatches, minibatches
    from utils.algorithm.log_probs import policy_log_probs
    from utils.algorithm.loss_scale import loss_scale
    from utils.algorithm.losses import find_loss, per_token_loss
    from utils.algorithm.parallel import agree
    from utils.algorithm.statistics import UpdateStatistics
    from utils.algorithm.update import set_learning_rate, take_optimizer_step, with_old_log_probs

    set_learning_rate(optimizer, training, steps_done)
    loss = find_loss(training.loss_type)
    batch = mark_gradients(batch, loss, training)
    watch = UpdateStatistics(policy, batch, training)
    if loss.needs_old_log_probs(training):
        batch = with_old_log_probs(policy, batch, training)
    for rows in minibatches(len(batch.rewards), training, steps_done):
        watch.minibatch(rows)
        for microbatch in microbatches(policy, batch, rows, training):
            log_probs, entropy = policy_log_probs(policy, microbatch, training)
            per_token, extras = per_token_loss(microbatch.loss_inputs(log_probs), training)
            value = aggregate_loss(per_token, microbatch.response_mask, microbatch.denominators, len(rows))
            value.backward(loss_scale(optimizer))  # None, which is 1, but for float16
            watch.microbatch(microbatch, log_probs, entropy, value, extras)
            if watch.weights_untouched and should_stop():
                break
        if watch.weights_untouched and agree(should_stop()):  # on any rank
            optimizer.zero_grad()
            return watch.abandoned()
        take_optimizer_step(policy, optimizer, training, watch)
    return watch.result()


def main(arguments: Sequence[str] | None = None) -> Status:
    keep_quiet_unless_first()
    options = parse_arguments(arguments, __doc__)
    try:
        if options.dry_run:
            config, origins = load_config_and_origins(options.config, options.overrides)
            config, derived = fit_to_card(config, origins, options.resume)
            can_start = show_dry_run(config, options.resume, options.allow_changes, options.full, derived)
            return Status.FINISHED if can_start else Status.USER_MISTAKE
        config, derived = decided_by_first_rank(lambda: checked_config(options))
    except ValueError as mistake:
        return report_mistake(mistake)
    except RankLost as loss:
        print(f"error: {loss}", file=sys.stderr)
        return Status.ERROR

    limit = TimeLimit(config.training.max_hours)
    with StopRequest() as stop_request:
        try:
            from utils.run.build import build_run  # torch and the like, which takes seconds

            run = build_run(config, options.resume, options.allow_changes, stop_request, limit, derived)
        except StoppedWhileLoading as stopped:
            if launched().is_first:
                print(stopped, file=sys.stderr)
            return Status.STOPPED_BY_SIGNAL
        except (CannotWrite, RankLost) as refusal:
            print(f"error: {refusal}", file=sys.stderr)
            return Status.ERROR
        except ValueError as mistake:
            return report_mistake(mistake)
        try:
            with run:
                return run.end(train(run))
        except (CannotWrite, RankLost) as refusal:
            print(f"error: {refusal}. {run.how_to_resume()}", file=sys.stderr)
            return Status.ERROR


def checked_config(options: argparse.Namespace) -> tuple[Config, list[str]]:
    """The config with what follows from the card, and a line about each such field. Raises ValueError."""
    config, origins = load_config_and_origins(options.config, options.overrides)
    check_before_loading(config, options.resume, options.allow_changes)
    return fit_to_card(config, origins, options.resume, fetch=True)


def report_mistake(mistake: ValueError) -> Status:
    if launched().is_first:  # the other ranks have been told the same
        print(f"error: {mistake}", file=sys.stderr)
    return Status.USER_MISTAKE


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:  # before StopRequest handles the signal
        print("\ninterrupted before the run began", file=sys.stderr)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)  # a shell shows it as 130

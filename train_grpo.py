"""Train a causal language model with GRPO (Group Relative Policy Optimization) on problems with verifiable answers.

    python train_grpo.py --config configs/quickstart.yaml
    python train_grpo.py --config configs/lr_sweep/3e-5.yaml --config configs/hardware/rtx4090.yaml training.seed=7

A GRPO step samples a group of responses to each of a few problems, scores them, takes as a response's advantage its
reward against its group's, and follows the policy gradient. Below, `train` is the outer loop and `update_policy` the
inner one; `utils/algorithm/losses.py` is their mathematics. What surrounds a step is in `utils/run/`.

Exit status: 0 finished, 1 an error, 2 a mistake in what was asked for, 3 collapsed, 4 stopped by a signal and saved
(before the first step there is nothing to save), 5 time limit reached and saved, 6 too many non-finite numbers.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from utils.preflight.command_line import parse_arguments
from utils.preflight.config import load_config_and_origins
from utils.preflight.dry_run import show_dry_run
from utils.preflight.fit import fit_to_card
from utils.preflight.obstacles import check_before_loading
from utils.run.ending import Status, StopRequest, TimeLimit

if TYPE_CHECKING:
    import torch

    from configs.defaults import Training
    from utils.algorithm.batch import TrainBatch
    from utils.algorithm.statistics import UpdateResult
    from utils.run.run import Run


def train(run: Run) -> Status:
    """The outer loop of GRPO: DeepSeekMath, algorithm 1, with verified rewards and without a reference policy."""
    import torch  # here and not above: --help and --dry-run need none of it, and it takes seconds

    from utils.algorithm.batch import make_train_batch, pad_id_of
    from utils.algorithm.losses import compute_advantages
    from utils.seeding import derive_seed

    t, learner, meter = run.config.training, run.learner, run.meter
    while True:
        run.evaluate_if_due()
        run.save_if_due()
        ending = run.reason_to_end()
        if ending is not None:
            return ending

        meter.start()
        seed = derive_seed(t.seed, "rollouts", run.state.steps_done)
        prompts = learner.problem_stream.draw(t.rollout_batch_size // t.group_size)
        with meter.phase("rollout"):
            rollouts = learner.engine.generate(prompts, n=t.group_size, seed=seed, should_stop=run.should_stop)
        if run.should_stop():
            continue
        run.check_engine(rollouts)
        meter.add(learner.engine.sleep())
        with meter.phase("grading"):
            scored = learner.scorer.score(rollouts)
        rewards = torch.tensor([reward.total for reward in scored])
        batch = make_train_batch(rollouts, rewards, compute_advantages(rewards, t), pad_id_of(learner.tokenizer))
        with meter.phase("train"):
            update = update_policy(learner.policy, learner.optimizer, batch, t, run.state.steps_done, run.should_stop)
        if update.abandoned:  # asked to stop: the state is still that of the last whole step
            continue
        with meter.phase("push"):
            meter.add(learner.engine.update_weights(learner.policy))
        run.finish_step(rollouts, scored, batch, update)


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
    `should_stop` says yes before the first optimizer step, the update is abandoned with the weights untouched; later it
    is finished, so that weights are always those of a whole GRPO step.
    """
    from utils.algorithm.batch import mark_gradients, microbatches, minibatches
    from utils.algorithm.log_probs import policy_log_probs
    from utils.algorithm.losses import aggregate_loss, find_loss
    from utils.algorithm.statistics import UpdateStatistics
    from utils.algorithm.update import take_optimizer_step, with_old_log_probs

    loss = find_loss(training.loss_type)
    batch = mark_gradients(batch, loss, training)
    watch = UpdateStatistics(policy, batch, training)
    if loss.needs_old_log_probs(training):
        batch = with_old_log_probs(policy, batch, training)
    for rows in minibatches(len(batch.rewards), training, steps_done):
        watch.minibatch(rows)
        for microbatch in microbatches(policy, batch, rows, training):
            log_probs, entropy = policy_log_probs(policy, microbatch, training)
            per_token, extras = loss.per_token(microbatch.loss_inputs(log_probs), training)
            value = aggregate_loss(per_token, microbatch.response_mask, microbatch.denominators, len(rows))
            value.backward()
            watch.microbatch(microbatch, log_probs, entropy, value, extras)
            if watch.weights_untouched and should_stop():
                optimizer.zero_grad()
                return watch.abandoned()
        take_optimizer_step(policy, optimizer, training, watch)
    return watch.result()


def main(arguments: Sequence[str] | None = None) -> Status:
    options = parse_arguments(arguments, __doc__)
    try:
        config, origins = load_config_and_origins(options.config, options.overrides)
        if options.dry_run:
            config, derived = fit_to_card(config, origins, options.resume)
            can_start = show_dry_run(config, options.resume, options.allow_changes, options.full, derived)
            return Status.FINISHED if can_start else Status.USER_MISTAKE
        check_before_loading(config, options.resume, options.allow_changes)
        config, derived = fit_to_card(config, origins, options.resume, fetch=True)
    except ValueError as mistake:
        return report_mistake(mistake)

    limit = TimeLimit(config.training.max_hours)
    from utils.run.build import build_run

    with StopRequest() as stop_request:
        try:
            run = build_run(config, options.resume, options.allow_changes, stop_request, limit, derived)
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

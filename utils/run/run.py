"""A run: its parts, and what happens around the algorithm: evaluating, logging, saving, ending."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TextIO

from configs.defaults import Config
from utils.algorithm.advantages import zero_std_groups
from utils.algorithm.batch import TrainBatch
from utils.algorithm.groups import GroupCollector
from utils.algorithm.loss_scale import loss_scale_metrics
from utils.algorithm.parallel import agree, check_same_weights, is_first, meet, sum_counts
from utils.algorithm.statistics import UpdateResult
from utils.log.files import CannotWrite
from utils.log.null_log import NullLog
from utils.log.run_log import RunLog
from utils.preflight.machine import estimated_memory
from utils.ranks import RankLost
from utils.records import Prompt, Reward, Rollout
from utils.run.background_save import BackgroundSaver
from utils.run.checkpoint import Checkpoints, SaveFailure, TrainState
from utils.run.closing import closing_lines
from utils.run.ending import Status, StopRequest, TimeLimit
from utils.run.engine_check import EngineCheck
from utils.run.evaluate import evaluate, response_metrics
from utils.run.learner import Learner
from utils.run.look import LOOK_RESPONSES, look_before_training
from utils.run.step_meter import StepMeter
from utils.run.watchers import Watchers
from utils.seeding import capture_random_state, derive_seed


@dataclass
class Run:
    """What keeps a run going around its steps, and `state`, where it is between two of them.

    `state` is replaced as a whole when a step is done, so that an abandoned step leaves no trace in it.
    """

    config: Config
    learner: Learner
    validation_prompts: Sequence[Prompt]
    checkpoints: Checkpoints
    saver: BackgroundSaver
    watchers: Watchers
    engine_check: EngineCheck
    log: RunLog | NullLog
    meter: StepMeter
    stop_request: StopRequest
    limit: TimeLimit
    state: TrainState
    lock: TextIO
    told_of_failure: int | None = None  # the GRPO step whose failed save was warned of last

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close everything. If an exception ended the run, say where it can be resumed from; nothing more is saved."""
        if error is not None:
            self.saver.settle()
            if not isinstance(error, CannotWrite | RankLost):  # which `main` reports
                step = self.state.steps_done + 1
                self.log.warn(f"the run ends with {kind.__name__} in GRPO step {step}. {self.how_to_resume()}")
            with contextlib.suppress(CannotWrite):
                self.log.close("failed", f"{kind.__name__}: {error}")
        self.learner.engine.close()
        self.learner.scorer.grader.close()
        self.lock.close()

    def end(self, status: Status) -> Status:
        """Print how the run ended, where its files are, and what to do next; closes the log."""
        t, output_dir = self.config.training, Path(self.config.paths.output_dir)
        wider = {"float16": "autocast_dtype=bfloat16", "bfloat16": "dtype=float32"}.get(t.autocast_dtype or t.dtype)
        narrow = f"too narrow a dtype (try training.{wider}), " if wider else ""
        name, detail = {
            Status.ERROR: ("failed", f"the last steps are on no disk: {self.checkpoints.failure}"),
            Status.FINISHED: ("finished", f"all {t.n_grpo_steps} GRPO steps are done"),
            Status.COLLAPSED: (
                "collapsed",
                f"the guard stopped the run: {self.watchers.verdict and self.watchers.verdict.reason}",
            ),
            Status.STOPPED_BY_SIGNAL: ("interrupted", f"{self.stop_request.what} asked to stop"),
            Status.TIME_LIMIT: ("time_limit", f"no further step fits into training.max_hours = {t.max_hours}"),
            Status.NONFINITE: (
                "failed",
                f"{self.state.skipped_in_a_row} optimizer steps in a row were NaN or infinite; the usual causes are "
                f"too high a learning rate, {narrow}a broken checkpoint",
            ),
        }[status]
        if self.state.evaluated_step is not None and is_first():
            from utils.plots.figures import reward_curve  # matplotlib takes half a second, of no use before the end

            try:
                reward_curve(output_dir)
            except OSError as error:
                self.log.warn(f"the reward curve could not be drawn: {error}")
        self.log.end_progress()
        self.log.note(f"\n{name} after GRPO step {self.state.steps_done}: {detail}")
        self.log.note("\n".join(closing_lines(output_dir, status)))
        self.log.close(name, detail)
        meet()  # torchrun ends all ranks when one has ended: none does before rank 0 has written everything
        return status

    def signalled(self) -> bool:
        """Whether a signal has asked this process to end the run: for what stops in the middle, on its own rank."""
        return self.stop_request.requested

    def should_stop(self) -> bool:
        """Whether a signal has asked the run to end, on any rank: they meet here."""
        return agree(self.signalled())

    def check_engine(self, rollouts: Sequence[Rollout]) -> None:
        """Compare the engine's log-probs with the trainer's, if a check is due. Raises EngineOutOfStep."""
        self.meter.add(self.engine_check.if_due(self.learner, rollouts, self.state.steps_done))

    def finish_step(self, groups: GroupCollector, batch: TrainBatch, update: UpdateResult) -> None:
        """Log a finished GRPO step, check its metrics for trouble, and update the run's state."""
        t, step = self.config.training, self.state.steps_done + 1
        optimizer_step = self.state.optimizer_step + update.n_optimizer_steps
        rollouts, rewards = groups.rollouts, groups.rewards
        metrics = {
            **response_metrics(rollouts, rewards),
            "reward_std": batch.rewards.std(correction=0).item(),
            "frac_zero_std_groups": zero_std_groups(batch.rewards, t.group_size).float().mean().item(),
            **update.metrics,
            **self._grading_metrics(),
            **groups.metrics(),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            **loss_scale_metrics(self.learner.optimizer),
            **self.meter.finish(groups.n_sampled_tokens),
        }
        written = self.log.train_step(step, {"optimizer_step": optimizer_step, **metrics})
        self._report_nonfinite(step, rollouts, rewards, batch, update)
        if self._is_due(t.eval_interval, step):
            advantages, n = batch.advantages.tolist(), t.n_rollouts_to_log
            self.log.rollouts("train", step, rollouts, rewards, advantages, n=n, group_size=t.group_size)
        if self.state.steps_done == 0 and "train_peak_memory_gb" in metrics:
            self._compare_with_estimate(metrics["train_peak_memory_gb"])
        self.limit.record(step=metrics["step_dt"])
        self.state = replace(
            self.state,
            steps_done=step,
            optimizer_step=optimizer_step,
            skipped_in_a_row=update.skipped_in_a_row(self.state.skipped_in_a_row),
            problem_stream=self.learner.problem_stream.state_dict(),
            tracker_id=self.log.tracker_id,
            random=capture_random_state(),
        )
        if self.watchers.suspect_collapse(step, written):
            self.evaluate_if_due(always=True)
        self.watchers.observe(step, written, self.log)
        self.state = replace(self.state, **self.watchers.state_dict())
        check_same_weights(self.learner.policy)

    def evaluate_if_due(self, always: bool = False) -> None:
        """Evaluate before training, every `eval_interval` steps and at the end (or `always`), once a step."""
        t, step = self.config.training, self.state.steps_done
        if t.eval_interval is None or self.state.evaluated_step == step or self.should_stop():
            return
        if not (always or self._is_due(t.eval_interval, step)):
            return
        started = time.perf_counter()
        seed = derive_seed(t.seed, "evaluation")
        metrics, rollouts, rewards = evaluate(
            self.learner.engine, self.validation_prompts, self.learner.scorer, seed, should_stop=self.signalled
        )
        if not rollouts:  # asked to stop: a resumed run evaluates anew
            return
        seconds = time.perf_counter() - started
        written = self.log.evaluation(step, {**metrics, **self._grading_metrics(), "eval_dt": seconds})
        self.log.rollouts("eval", step, rollouts, rewards, n=t.n_rollouts_to_log)
        if step == 0:
            self._look()
        self.watchers.observe(step, written, self.log)
        self.limit.record(evaluation=seconds)
        reward = metrics["reward"]
        is_best = self.state.best_reward is None or reward > self.state.best_reward
        self.state = replace(
            self.state,
            evaluated_step=step,
            best_reward=reward if is_best else self.state.best_reward,
            best_step=step if is_best else self.state.best_step,
            random=capture_random_state(),
            **self.watchers.state_dict(),
        )

    def _look(self) -> None:
        """Show what the untrained model does, in groups; warn at once if none of them could teach anything.

        It samples no more responses than the evaluation did, has a seed of its own, and is in no metric.
        """
        learner, n_responses = self.learner, min(LOOK_RESPONSES, len(self.validation_prompts))
        look = look_before_training(
            learner.engine, self.validation_prompts, learner.scorer, self.config.training, n_responses, self.signalled
        )
        learner.scorer.grader.drain_counters()
        if look is None:
            return
        self.log.note("\n".join(look.lines()))
        warning = look.warning()
        if warning is not None:
            self.log.warn(warning)

    def save_if_due(self) -> None:
        """Save every `checkpoint_interval` steps, at a new best, at the end, and again after a save that failed."""
        step = self.state.steps_done
        due = self._is_due(self.config.training.checkpoint_interval, step) or self.state.best_step == step
        failed = not self.saver.is_writing and self._hear_of_the_last_save() is not None
        if step > 0 and (due or failed):
            self.save()

    def save(self) -> None:
        """Save the run's state in the background, once the save before this one has ended."""
        self._hear_of_the_last_save()
        is_best, learner = self.state.best_step == self.state.steps_done, self.learner
        self.saver.begin(self.state, learner.policy, learner.tokenizer, learner.optimizer, is_best)

    def _hear_of_the_last_save(self) -> SaveFailure | None:
        """Wait for the last save and record how long it took; a failure becomes a warning, once per step."""
        failure = self.saver.wait()
        if failure is not None and failure.grpo_step != self.told_of_failure:
            self.told_of_failure = failure.grpo_step
            self.log.warn(str(failure))
        if self.saver.seconds is not None:
            self.limit.record(save=self.saver.seconds)
            self.saver.seconds = None
        return failure

    def reason_to_end(self) -> Status | None:
        """The status to end with, once the state is saved; None if the run continues. The same on every rank."""
        t = self.config.training
        status = None
        if self.should_stop():
            status = Status.STOPPED_BY_SIGNAL
        elif self.state.steps_done >= t.n_grpo_steps:
            status = Status.FINISHED
        elif self.watchers.want_to_stop:
            status = Status.COLLAPSED
        elif self.state.skipped_in_a_row >= t.max_nonfinite_steps:
            status = Status.NONFINITE
        elif agree(not self.limit.allows_another_step(evaluates=t.eval_interval is not None)):
            self.evaluate_if_due(always=True)
            status = Status.TIME_LIMIT
        if status is None:
            return None
        if self.state.steps_done > 0:
            self.save()
        return Status.ERROR if agree(self._hear_of_the_last_save() is not None) else status

    def _grading_metrics(self) -> dict[str, float]:
        """What the grader has counted since the last call."""
        counts = sum_counts(self.learner.scorer.grader.drain_counters())
        return {f"grader_{name}": float(count) for name, count in counts.items()}

    def _compare_with_estimate(self, measured_gb: float) -> None:
        """On a GPU, compare the measured peak of the inner steps with the estimate of --dry-run."""
        if self.config.training.device.startswith("cuda"):
            try:
                estimate = f"{estimated_memory(self.config)['training_peak'] / 1e9:.2f} GB"
            except ValueError as error:
                estimate = f"unknown ({error})"
            self.log.note(f"peak memory while training: {measured_gb:.2f} GB; the longest case, estimated: {estimate}")

    def how_to_resume(self) -> str:
        """How to resume after a run that ended without a save."""
        newest = self.checkpoints.newest()
        if newest is None:
            return "No checkpoint was saved yet: --resume begins anew"
        return f"The newest checkpoint is {newest}; the same command with --resume goes on from there"

    def _is_due(self, interval: int | None, step: int) -> bool:
        return step >= self.config.training.n_grpo_steps or (interval is not None and step % interval == 0)

    def _report_nonfinite(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Sequence[Reward],
        batch: TrainBatch,
        update: UpdateResult,
    ) -> None:
        """Warn about skipped optimizer steps, and log the rollouts whose numbers were not finite."""
        if not any(update.skipped):
            return
        rows = sorted(set(update.nonfinite_rows))
        self.log.warn(
            f"GRPO step {step}: {sum(update.skipped)} of {len(update.skipped)} optimizer steps skipped, their loss or "
            f"gradient was NaN or infinite; rollouts.jsonl holds the {len(rows)} rollouts that may have caused it"
        )
        suspects = ([items[i] for i in rows] for items in (rollouts, rewards, batch.advantages.tolist()))
        self.log.rollouts("nonfinite", step, *suspects, n=len(rows))

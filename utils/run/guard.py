"""Watches a run's metrics: `CollapseGuard` says when it has collapsed, `Advisor` what a researcher may want to change.

Both see only what has happened so far. They judge by the run's own history and limits, not by one model's numbers.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from configs.defaults import Config

REWARD, REWARD_ERROR = "eval/reward", "eval/reward_std_error"
FORMAT, ANSWER = "eval/format_reward", "eval/answer_reward"
LENGTH, TRUNCATED = "train/mean_response_length", "train/frac_truncated"
EQUAL_GROUPS, SAMPLER_KL = "train/frac_zero_std_groups", "train/sampler_kl"
COLLAPSE_METRICS = (
    REWARD,
    REWARD_ERROR,
    LENGTH,
    TRUNCATED,
    "train/grad_norm",
    "train/entropy",
    "train/clip_fraction",
)
ADVICE_METRICS = (REWARD_ERROR, FORMAT, ANSWER, TRUNCATED, EQUAL_GROUPS, SAMPLER_KL)

REPEAT_INTERVAL = 20  # GRPO steps before the same warning is given again

RUNAWAY_SHARE = 0.9  # runaway: at least this share of the responses (or of max_tokens, by mean length) is at the limit
ENDED_SHARE = 0.75  # runaway needs an earlier step at or below this share
SHRUNK_SHARE = 0.5  # shrinking, if reward is down: responses below this share of the longest mean length
VANISHED_SHARE = 0.25  # shrinking, if reward is unknown or not up: the same
KEPT_SHARE = 0.85  # reward is down if it is below this share of its best
NOISE_STD_ERRORS = 2.0  # ... by more standard errors than this (plus the selection bias of the best of N evaluations)
FALLEN_EVALUATIONS = 3  # falling: reward has to be down in this many evaluations in a row

TRUNCATED_WARNING = 0.25  # warn if more than this share of the responses is truncated
HIGH_FORMAT_REWARD = 0.8  # warn if answers get worse while format reward is at least this
SAMPLER_KL_GROWTH = 3.0  # warn if the sampler's KL has grown by this factor ...
SAMPLER_KL_FLOOR = 1e-3  # ... and is at least this, nats


@dataclass(frozen=True)
class Verdict:
    """A run has collapsed: the reason, and the last value of each metric."""

    reason: str
    evidence: dict[str, float]

    def __str__(self) -> str:
        values = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.reason} (last values: {values})"


class Watcher:
    """What guard and advisor share: the history of a few metrics, and the step of each last warning."""

    def __init__(self, config: Config, names: tuple[str, ...]) -> None:
        self.options, self.training = config.guard, config.training
        self.series: dict[str, list[list[float]]] = {name: [] for name in names}  # [GRPO step, value], in order
        self.warned_at: dict[str, int] = {}  # name of a warning -> GRPO step at which it was last given

    def state_dict(self) -> dict:
        """The history and the warnings given so far, JSON-able."""
        return copy.deepcopy({"series": self.series, "warned_at": self.warned_at})

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`; an empty dict is a run's beginning."""
        state = copy.deepcopy(state)
        self.series |= state.get("series", {})
        self.warned_at = state.get("warned_at", {})

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series[name]]

    def _add(self, grpo_step: int, metrics: Mapping[str, float]) -> None:
        """Missing and non-finite values are left out. If a step is reported twice, the later value counts."""
        for name, series in self.series.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                if series and series[-1][0] == grpo_step:
                    series.pop()
                series.append([grpo_step, float(value)])

    def _may_warn(self, name: str, grpo_step: int) -> bool:
        """True if this warning was not given within the last REPEAT_INTERVAL steps; then it counts as given now."""
        is_due = self._is_due(name, grpo_step)
        if is_due:
            self.warned_at[name] = grpo_step
        return is_due

    def _is_due(self, name: str, grpo_step: int) -> bool:
        return name not in self.warned_at or grpo_step >= self.warned_at[name] + REPEAT_INTERVAL

    def _recent(self, name: str, n_steps: int | None = None, at_least: int = 2) -> list[float]:
        """The values of the last `n_steps` GRPO steps (None: `patience`), or the last `at_least` values if the metric
        is logged less often. Empty if the metric's history is shorter than that.
        """
        series, n_steps = self.series[name], n_steps or self.options.patience
        if not series or series[-1][0] - series[0][0] < n_steps - 1:
            return []
        n = max(at_least, sum(step > series[-1][0] - n_steps for step, _ in series))
        return self.values(name)[-n:] if len(series) >= n else []

    def _is_down(self, name: str, recent: list[float]) -> bool:
        """Whether the recent evaluations are all below KEPT_SHARE of the best one, by more than noise.

        The best of N equal evaluations is expected about sqrt(2 ln N) standard errors above their mean.
        """
        if not recent:
            return False
        values = self.values(name)
        best = max(values)
        margin = NOISE_STD_ERRORS + math.sqrt(2 * math.log(len(values)))
        floor = min(KEPT_SHARE * best, best - margin * self._standard_error(values))
        return max(recent) < floor

    def _standard_error(self, rewards: list[float]) -> float:
        """Standard error of an evaluation: the largest reported one, or the binomial one for `max_val_examples`
        problems, whichever is larger."""
        variance = max(reward * (1 - reward) for reward in rewards)
        coin = math.sqrt(max(variance, 0.0) / (self.training.max_val_examples or math.inf))
        return max([coin, *self.values(REWARD_ERROR)])


class CollapseGuard(Watcher):
    """Three rules. Each has to hold for `patience` GRPO steps before it gives a verdict.

    1. Runaway: almost all responses run into `max_tokens`, although fewer did before.
    2. Shrinking: responses are far shorter than before and reward is down; or they have almost vanished.
    3. Falling: reward has fallen from its best and stays down.

    A run that evaluates well is not judged by length: rules 1 and 2 pass it over while its last evaluation is above
    its first and near its best, until the next evaluation is overdue. Low entropy and spikes of the gradient norm give
    no verdict, because healthy runs have both; they are listed as evidence.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config, COLLAPSE_METRICS)

    def observe(self, grpo_step: int, metrics: Mapping[str, float]) -> Verdict | None:
        """Take in the metrics of a GRPO step, in one call or several; None while all is well.

        With `action` "warn" a verdict is repeated every REPEAT_INTERVAL steps, with "stop" at every step.
        """
        self._add(grpo_step, metrics)
        reason = self._reason()
        if reason is None or self.options.action == "off":
            return None
        if self.options.action != "stop" and not self._may_warn("collapse", grpo_step):
            return None
        return Verdict(reason, {name: series[-1][1] for name, series in self.series.items() if series})

    def suspects(self, grpo_step: int, metrics: Mapping[str, float]) -> bool:
        """Whether `observe`, which is called later, would give a verdict for these metrics.

        The caller may evaluate first: a good evaluation clears a run that was suspected by its lengths.
        """
        self._add(grpo_step, metrics)
        may_tell = self.options.action == "stop" or self._is_due("collapse", grpo_step)
        return self.options.action != "off" and may_tell and self._reason() is not None

    def _reason(self) -> str | None:
        return self._runaway() or self._shrinking() or self._falling()

    def _runaway(self) -> str | None:
        name, limit, meaning = TRUNCATED, 1.0, "of responses ran into"
        if not self.series[TRUNCATED]:  # the mean length says much the same
            name, limit, meaning = LENGTH, self.training.max_tokens, "was the mean part of"
        recent = [value / limit for value in self._recent(name)]
        if not recent or min(recent) < RUNAWAY_SHARE:
            return None
        if min(self.values(name)) / limit > ENDED_SHARE or self._evaluates_well():
            return None
        return f"responses run away: {min(recent):.0%} or more {meaning} max_tokens, {len(recent)} times in a row"

    def _shrinking(self) -> str | None:
        recent = self._recent(LENGTH)
        if not recent:
            return None
        longest = max(self.values(LENGTH))
        is_down = self._is_down(REWARD, self._recent(REWARD))
        shrunk = max(recent) < SHRUNK_SHARE * longest and is_down
        vanished = max(recent) < VANISHED_SHARE * longest and not self._evaluates_well()
        if not (shrunk or vanished):
            return None
        return f"responses shrink: {max(recent):.1f} tokens or fewer {len(recent)} times in a row, once {longest:.1f}"

    def _falling(self) -> str | None:
        """Evaluations are noisier than lengths, so a fall has to last twice as long."""
        recent = self._recent(REWARD, 2 * self.options.patience, FALLEN_EVALUATIONS)
        if not self._is_down(REWARD, recent):
            return None
        best, n = max(self.values(REWARD)), len(recent)
        return f"reward fell and stays down: eval/reward {recent[-1]:.3f}, once {best:.3f}, {n} evaluations in a row"

    def _evaluates_well(self) -> bool:
        """Whether the last evaluation is well above the first one and near the best; False if the next is overdue."""
        rewards = self.series[REWARD]
        if len(rewards) < 2:
            return False
        (_, first), (before, _), (last, reward) = rewards[0], rewards[-2], rewards[-1]
        now = max(series[-1][0] for name in (LENGTH, TRUNCATED) if (series := self.series[name]))
        if now - last > max(last - before, self.options.patience - 1):
            return False
        noise = NOISE_STD_ERRORS * self._standard_error(self.values(REWARD))
        return reward > first + noise and not self._is_down(REWARD, [reward])


class Advisor(Watcher):
    """Warnings about what wastes a run or misleads its reader. Each says what happened and what usually helps."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, ADVICE_METRICS)

    def observe(self, grpo_step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take in the metrics of a GRPO step; returns the warnings due, each once per REPEAT_INTERVAL steps."""
        self._add(grpo_step, metrics)
        rules = (self._no_signal, self._truncated, self._reward_hacking, self._sampler_drift)
        texts = {rule.__name__: rule() for rule in rules}
        return [text for name, text in texts.items() if text is not None and self._may_warn(name, grpo_step)]

    def _no_signal(self) -> str | None:
        recent = self._recent(EQUAL_GROUPS)
        if not recent or min(recent) < 1.0:
            return None
        return (
            f"no group had a gradient signal for {len(recent)} steps: the rewards within each were equal. "
            f"If all are 0, {self._read_rollouts()}: prompt{', stop strings' if self.training.stop else ''} or answer "
            "format are the usual cause, then problems that are too hard; if all are 1, take harder problems. A larger "
            "group_size or a higher temperature gives more variation"
        )

    def _truncated(self) -> str | None:
        recent = self._recent(TRUNCATED)
        if not recent or min(recent) <= TRUNCATED_WARNING:
            return None
        ends = "the stop strings and the end token fit" if self.training.stop else "the end token fits"
        return (
            f"{recent[-1]:.0%} of responses ran into max_tokens = {self.training.max_tokens}, and more than "
            f"{TRUNCATED_WARNING:.0%} for {len(recent)} steps; their answers are lost. Raise max_tokens, "
            f"or check that {ends} the prompt"
        )

    def _reward_hacking(self) -> str | None:
        formats, answers = self.values(FORMAT), self.values(ANSWER)
        if not formats or formats[-1] < HIGH_FORMAT_REWARD or not self._is_down(ANSWER, answers[-2:]):
            return None
        weights = "lower the weights in training.extra_rewards, or " if self.training.extra_rewards else ""
        return (
            f"the format is kept ({FORMAT} {formats[-1]:.3f}) while answers get worse ({ANSWER} {answers[-1]:.3f}, "
            f"once {max(answers):.3f}): the policy may be earning reward without solving problems. To see how, "
            f"{self._read_rollouts()}; {weights}start again with a lower learning rate"
        )

    def _read_rollouts(self) -> str:
        t = self.training
        if t.n_rollouts_to_log and t.eval_interval:
            return "read the logged rollouts (play-scripts/view_rollouts.py)"
        return "log rollouts and read them (training.n_rollouts_to_log, at every training.eval_interval)"

    def _sampler_drift(self) -> str | None:
        series, recent = self.values(SAMPLER_KL), self._recent(SAMPLER_KL)
        first = series[: self.options.patience]
        if not recent or len(series) < 2 * len(recent):
            return None
        before, after = statistics.median(first), statistics.median(recent)
        if after < SAMPLER_KL_FLOOR or after < SAMPLER_KL_GROWTH * before:
            return None
        how = "" if self.training.rollout_engine == "transformers" else " (vllm.dtype)"
        return (
            f"the engine samples further and further from the trainer's policy: {SAMPLER_KL} {after:.2g}, at first "
            f"{before:.2g}. Check that weights are pushed after every step; compute in the same dtype on both sides"
            f"{how}, or in float32; a lower learning rate slows it"
        )

"""Watches a run's metrics: `CollapseGuard` says when it has collapsed, `Advisor` what a researcher may want to mend.

Both see only what has happened so far, and judge by the run's own history and limits, not by one model's numbers.
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


@dataclass(frozen=True)
class Verdict:
    """A run has collapsed: why, and what was last seen of each metric."""

    reason: str
    evidence: dict[str, float]

    def __str__(self) -> str:
        seen = ", ".join(f"{name} {value:.4g}" for name, value in self.evidence.items())
        return f"{self.reason} (last seen: {seen})"


class Watcher:
    """What guard and advisor share: the history of a few metrics, and when each thing was last said."""

    def __init__(self, config: Config, names: tuple[str, ...]) -> None:
        self.options, self.training = config.guard, config.training
        self.series: dict[str, list[list[float]]] = {name: [] for name in names}  # [GRPO step, value], in order
        self.said: dict[str, int] = {}

    def state_dict(self) -> dict:
        """Everything seen and said, JSON-able."""
        return copy.deepcopy({"series": self.series, "said": self.said})

    def load_state_dict(self, state: dict) -> None:
        """Go on from `state_dict`; an empty dict is the beginning."""
        state = copy.deepcopy(state)
        self.series |= state.get("series", {})
        self.said = state.get("said", {})

    def values(self, name: str) -> list[float]:
        return [value for _, value in self.series[name]]

    def _add(self, grpo_step: int, metrics: Mapping[str, float]) -> None:
        """Missing and non-finite values are left out; a step that is told of twice keeps the later value."""
        for name, series in self.series.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                if series and series[-1][0] == grpo_step:
                    series.pop()
                series.append([grpo_step, float(value)])

    def _may_say(self, what: str, grpo_step: int) -> bool:
        """Whether it was not said within the last `repeat_interval` steps; then it counts as said."""
        if what in self.said and grpo_step < self.said[what] + self.options.repeat_interval:
            return False
        self.said[what] = grpo_step
        return True

    def _recent(self, name: str, n_steps: int | None = None, at_least: int = 2) -> list[float]:
        """The values of the last `n_steps` GRPO steps (None: `patience`), but `at_least` so many where they are rare.

        Empty where the metric has not been seen for that long.
        """
        series, n_steps = self.series[name], n_steps or self.options.patience
        if not series or series[-1][0] - series[0][0] < n_steps - 1:
            return []
        n = max(at_least, sum(step > series[-1][0] - n_steps for step, _ in series))
        return self.values(name)[-n:] if len(series) >= n else []

    def _is_down(self, name: str, recent: list[float]) -> bool:
        """Whether the recent evaluations are all below a share of the best one, by more than noise.

        The best of N equal evaluations is expected about sqrt(2 ln N) standard errors above their mean.
        """
        if not recent:
            return False
        values = self.values(name)
        best = max(values)
        margin = self.options.noise_std_errors + math.sqrt(2 * math.log(len(values)))
        floor = min(self.options.kept_share * best, best - margin * self._standard_error(values))
        return max(recent) < floor

    def _standard_error(self, rewards: list[float]) -> float:
        """Of an evaluation: the largest reported, or that of as many coins as there are validation problems."""
        variance = max(reward * (1 - reward) for reward in rewards)
        coin = math.sqrt(max(variance, 0.0) / (self.training.max_val_examples or math.inf))
        return max([coin, *self.values(REWARD_ERROR)])


class CollapseGuard(Watcher):
    """Three rules, each of which has to hold for a while before it speaks (thresholds: `Guard` in configs/defaults.py).

    1. Runaway: almost all responses run into `max_tokens`, after they once ended before it.
    2. Shrinking: responses are far shorter than they once were and reward is down; or they are all but gone.
    3. Falling: reward has left its best and stays down.

    Length condemns no run that evaluates well: what is above its first evaluation and near its best is left alone by
    1 and 2, until the next evaluation is overdue. Low entropy and spikes of the gradient norm condemn nobody, as
    healthy runs have both; they are evidence.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config, COLLAPSE_METRICS)

    def observe(self, grpo_step: int, metrics: Mapping[str, float]) -> Verdict | None:
        """Take in what is known of a GRPO step, in one call or several; None while all is well.

        A run that goes on in spite of a verdict hears of it again every `repeat_interval` steps; one that is to stop,
        at every step.
        """
        self._add(grpo_step, metrics)
        reason = self._runaway() or self._shrinking() or self._falling()
        if reason is None or self.options.action == "off":
            return None
        if self.options.action != "stop" and not self._may_say("collapse", grpo_step):
            return None
        return Verdict(reason, {name: series[-1][1] for name, series in self.series.items() if series})

    def _runaway(self) -> str | None:
        name, limit, what = TRUNCATED, 1.0, "of responses ran into"
        if not self.series[TRUNCATED]:  # the mean length says much the same
            name, limit, what = LENGTH, self.training.max_tokens, "was the mean part of"
        recent = [value / limit for value in self._recent(name)]
        if not recent or min(recent) < self.options.runaway_share:
            return None
        if min(self.values(name)) / limit > self.options.ended_share or self._evaluates_well():
            return None
        return f"responses run away: {min(recent):.0%} or more {what} max_tokens, {len(recent)} times in a row"

    def _shrinking(self) -> str | None:
        recent = self._recent(LENGTH)
        if not recent:
            return None
        longest = max(self.values(LENGTH))
        is_down = self._is_down(REWARD, self._recent(REWARD))
        shrunk = max(recent) < self.options.shrunk_share * longest and is_down
        vanished = max(recent) < self.options.vanished_share * longest and not self._evaluates_well()
        if not (shrunk or vanished):
            return None
        return f"responses shrink: {max(recent):.1f} tokens or fewer {len(recent)} times in a row, once {longest:.1f}"

    def _falling(self) -> str | None:
        """Evaluations waver more than lengths, so a fall has to last twice as long."""
        recent = self._recent(REWARD, 2 * self.options.patience, self.options.fallen_evaluations)
        if not self._is_down(REWARD, recent):
            return None
        best, n = max(self.values(REWARD)), len(recent)
        return f"reward fell and stays down: eval/reward {recent[-1]:.3f}, once {best:.3f}, {n} evaluations in a row"

    def _evaluates_well(self) -> bool:
        """Whether the last evaluation, unless another is overdue, is well above the first one and near the best."""
        rewards = self.series[REWARD]
        if len(rewards) < 2:
            return False
        (_, first), (before, _), (last, reward) = rewards[0], rewards[-2], rewards[-1]
        now = max(series[-1][0] for name in (LENGTH, TRUNCATED) if (series := self.series[name]))
        if now - last > max(last - before, self.options.patience - 1):
            return False
        noise = self.options.noise_std_errors * self._standard_error(self.values(REWARD))
        return reward > first + noise and not self._is_down(REWARD, [reward])


class Advisor(Watcher):
    """Warnings of what wastes a run or misleads its reader. Each says what was seen and what people usually do."""

    def __init__(self, config: Config) -> None:
        super().__init__(config, ADVICE_METRICS)

    def observe(self, grpo_step: int, metrics: Mapping[str, float]) -> list[str]:
        """Take in what is known of a GRPO step; the warnings that are due, each once in `repeat_interval` steps."""
        self._add(grpo_step, metrics)
        rules = (self._no_signal, self._truncated, self._reward_hacking, self._sampler_drift)
        found = {rule.__name__: rule() for rule in rules}
        return [text for name, text in found.items() if text is not None and self._may_say(name, grpo_step)]

    def _no_signal(self) -> str | None:
        recent = self._recent(EQUAL_GROUPS)
        if not recent or min(recent) < 1.0:
            return None
        return (
            f"no group had a gradient signal for {len(recent)} steps: the rewards within each were equal. "
            "If all are 0, read logged rollouts: prompt, stop strings or answer format are the usual cause, then too "
            "hard problems; if all are 1, take harder problems. A larger group_size or a higher temperature varies more"
        )

    def _truncated(self) -> str | None:
        recent = self._recent(TRUNCATED)
        if not recent or min(recent) <= self.options.truncated_warning:
            return None
        return (
            f"{recent[-1]:.0%} of responses ran into max_tokens = {self.training.max_tokens}, and more than "
            f"{self.options.truncated_warning:.0%} for {len(recent)} steps; their answers are lost. Raise max_tokens, "
            "or check that the stop strings and the end token fit the prompt"
        )

    def _reward_hacking(self) -> str | None:
        formats, answers = self.values(FORMAT), self.values(ANSWER)
        if not formats or formats[-1] < self.options.high_format_reward or not self._is_down(ANSWER, answers[-2:]):
            return None
        return (
            f"the format is kept ({FORMAT} {formats[-1]:.3f}) while answers get worse ({ANSWER} {answers[-1]:.3f}, "
            f"once {max(answers):.3f}): the policy may be earning reward without solving problems. Read logged "
            "rollouts, weigh format less in the reward, or go back to the best checkpoint with a lower learning rate"
        )

    def _sampler_drift(self) -> str | None:
        series, recent = self.values(SAMPLER_KL), self._recent(SAMPLER_KL)
        first = series[: self.options.patience]
        if not recent or len(series) < 2 * len(recent):
            return None
        before, after = statistics.median(first), statistics.median(recent)
        if after < self.options.sampler_kl_floor or after < self.options.sampler_kl_growth * before:
            return None
        return (
            f"the engine samples further and further from the trainer's policy: {SAMPLER_KL} {after:.2g}, at first "
            f"{before:.2g}. Check that weights are pushed after every step; compute in the same dtype on both sides "
            "(vllm.dtype), or in float32; a lower learning rate slows it"
        )

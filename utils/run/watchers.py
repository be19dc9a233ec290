"""The guard and advisor of a run: their warnings are shown, and the guard's last verdict is kept."""

from __future__ import annotations

from collections.abc import Mapping

from configs.defaults import Config
from utils.log.run_log import RunLog
from utils.run.guard import Advisor, CollapseGuard, Verdict


class Watchers:
    """Asked about every step and evaluation. `verdict` is the guard's last one, None while all is well."""

    def __init__(self, config: Config) -> None:
        self._guard, self._advisor = CollapseGuard(config), Advisor(config)
        self._may_stop = config.guard.action == "stop"
        self._is_on = config.guard.action != "off"
        self.verdict: Verdict | None = None
        self._told_at: int | None = None  # the GRPO step of the last verdict

    def suspect_collapse(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Whether `observe` would report a collapse; evaluate before it does."""
        return self._is_on and self._guard.suspects(step, metrics)

    def observe(self, step: int, metrics: Mapping[str, float], log: RunLog) -> None:
        """Show warnings about the metrics of a GRPO step, which have the names that they are logged by."""
        for advice in self._advisor.observe(step, metrics):
            log.warn(advice)
        verdict = self._guard.observe(step, metrics) if self._is_on else None
        if verdict is not None:
            self.verdict = verdict
            if self._told_at != step:  # its metrics come in two calls where it is evaluated
                log.warn(f"collapse at GRPO step {step}: {verdict}")
            self._told_at = step

    @property
    def want_to_stop(self) -> bool:
        """Whether the run has collapsed and should end because of it."""
        return self._may_stop and self.verdict is not None

    def state_dict(self) -> dict[str, dict]:
        """What a resumed run needs, JSON-able, under the names of `TrainState`."""
        return {"guard": self._guard.state_dict(), "advisor": self._advisor.state_dict()}

    def load_state_dict(self, guard: dict, advisor: dict) -> None:
        """Go on from `state_dict`; empty dicts are the beginning."""
        self._guard.load_state_dict(guard)
        self._advisor.load_state_dict(advisor)

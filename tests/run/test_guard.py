"""The collapse guard on published and made-up runs, and the advisor's warnings."""

from __future__ import annotations

import csv
import json
import math
import random
from collections import defaultdict
from pathlib import Path

import pytest

from configs.defaults import Config, Training
from utils.run.guard import Advisor, CollapseGuard, Verdict

REFERENCE = Path(__file__).parents[3] / "shared" / "reference"
COLLAPSED = "lr_sweep_1e-4"  # the other published runs stayed healthy; those called crashed were stopped by hand

needs_reference = pytest.mark.skipif(not REFERENCE.is_dir(), reason="no shared/reference beside the repository")


def published_runs() -> dict[str, dict[int, dict[str, float]]]:
    """run -> grpo_step -> metric -> value."""
    runs: dict = defaultdict(lambda: defaultdict(dict))
    for path in REFERENCE.glob("*.csv"):
        if path.stem == "run_summary":
            continue
        with path.open() as file:
            for row in csv.DictReader(file):
                runs[row["run_name"]][int(row["step"])][row["metric"]] = float(row["value"])
    return runs


def first_verdict(rows: dict[int, dict[str, float]], config: Config | None = None) -> tuple[int, Verdict] | None:
    guard = CollapseGuard(config or Config())
    for step in sorted(rows):
        verdict = guard.observe(step, rows[step])
        if verdict is not None:
            return step, verdict
    return None


def small_config(max_val_examples: int | None = 64, max_tokens: int = 32, action: str = "warn") -> Config:
    config = Config()
    config.training.max_val_examples, config.training.max_tokens = max_val_examples, max_tokens
    config.guard.action = action
    return config


@needs_reference
@pytest.mark.parametrize("metrics", ["all", "eval/reward", "train/mean_response_length"])
def test_published_collapse_is_caught_within_twelve_steps(metrics):
    rows = published_runs()[COLLAPSED]
    rows = {step: {k: v for k, v in row.items() if metrics in ("all", k)} for step, row in rows.items()}
    step, verdict = first_verdict(rows)
    assert step < 12
    assert ("run away" in verdict.reason) == (metrics != "eval/reward")
    assert "max_tokens" in str(verdict) or "0.030" in str(verdict)


@needs_reference
def test_published_healthy_runs_raise_no_verdict():
    runs = published_runs()
    healthy = {name: rows for name, rows in runs.items() if name != COLLAPSED}
    assert len(healthy) == 13
    for every_step in (True, False):  # also with the evaluations alone, or the lengths alone
        for name, rows in healthy.items():
            for part in ("", "eval/", "train/"):
                chosen = {step: {k: v for k, v in row.items() if k.startswith(part)} for step, row in rows.items()}
                chosen = {step: row for step, row in chosen.items() if every_step or step % 4 == 3}
                assert first_verdict(chosen) is None, (name, part, every_step)


@needs_reference
@pytest.mark.parametrize("n_problems", [16, 64, 1024])
@pytest.mark.parametrize("interval", [1, 4])
def test_small_noisy_evaluations_of_healthy_runs_raise_no_verdict(n_problems, interval):
    """The published reward curves, each evaluation drawn again from `n_problems` coins; the limit made much shorter."""
    rng = random.Random(n_problems + interval)
    for name, published in published_runs().items():
        if name == COLLAPSED:
            continue
        rows, true_reward = {}, 0.0
        for step, row in sorted(published.items()):
            true_reward = row.get("eval/reward", true_reward)
            rows[step] = {"train/mean_response_length": row.get("train/mean_response_length", 500.0) / 32}
            if step % interval == 0:
                rows[step]["eval/reward"] = sum(rng.random() < true_reward for _ in range(n_problems)) / n_problems
        assert first_verdict(rows, small_config(n_problems)) is None, name


def test_tiny_model_at_too_high_a_rate_is_caught():
    """Reward starts at 0.45 and drops to 0 with every response at the limit of 32 tokens."""
    rows = {step: {"train/mean_response_length": 20.0, "train/frac_truncated": 0.3} for step in range(4)}
    rows |= {step: {"train/mean_response_length": 32.0, "train/frac_truncated": 1.0} for step in range(4, 20)}
    for step in range(0, 20, 2):
        rows[step]["eval/reward"] = 0.45 if step < 4 else 0.0
    step, verdict = first_verdict(rows, small_config())
    assert step == 8  # the fifth step at the limit
    assert verdict.evidence["train/frac_truncated"] == 1.0
    assert verdict.evidence["eval/reward"] == 0.0


@pytest.mark.parametrize("knows_reward", [True, False])
def test_responses_shrinking_to_a_few_tokens_are_caught(knows_reward):
    rows = {step: {"train/mean_response_length": max(6.0, 440 * 0.8**step)} for step in range(40)}
    for step in range(0, 40, 4 if knows_reward else 100):
        rows[step]["eval/reward"] = max(0.01, 0.3 - 0.02 * step)
    step, verdict = first_verdict(rows)
    assert "shrink" in verdict.reason
    assert step <= 11  # 440 * 0.8**7 is the first below a quarter of 440
    assert "440" in verdict.reason


def test_shortening_to_a_hundred_tokens_while_reward_falls_is_caught():
    """Too many optimizer steps per GRPO step: reward and lengths fall after step 15; spikes throughout."""
    rows = {}
    for step in range(31):
        length = 441 - 18 * step if step < 15 else max(100, 190 - 15 * (step - 15))
        rows[step] = {"train/mean_response_length": length, "train/grad_norm": 8.0 if step % 5 == 0 else 0.4}
    for step in range(3, 31, 4):
        rows[step]["eval/reward"] = 0.46 * step / 15 if step <= 15 else 0.46 - 0.03 * (step - 15)
    step, verdict = first_verdict(rows)
    assert 19 <= step <= 27
    assert "shrink" in verdict.reason or "fell" in verdict.reason
    assert verdict.evidence["train/grad_norm"] in (8.0, 0.4)


def test_reward_that_falls_from_its_best_and_stays_down_is_caught_at_the_third_evaluation():
    rewards = {0: 0.03, 4: 0.2, 8: 0.34, 12: 0.33, 16: 0.25, 20: 0.24, 24: 0.24, 28: 0.23}
    rows = {step: {"eval/reward": value, "train/mean_response_length": 300.0} for step, value in rewards.items()}
    step, verdict = first_verdict(rows)
    assert (step, "fell" in verdict.reason) == (24, True)


def seen_every(every: int, rows: dict[int, dict[str, float]], part: str = "eval/") -> dict[int, dict[str, float]]:
    """The rows with the metrics of one part left out but every so many steps."""
    return {
        step: {name: value for name, value in row.items() if step % every == 0 or not name.startswith(part)}
        for step, row in rows.items()
    }


@pytest.mark.parametrize("interval", [1, 2, 4])
@pytest.mark.parametrize("lost", [0.3, 0.5])
def test_reward_that_dips_for_eight_steps_is_no_collapse_and_one_that_stays_down_is(lost, interval):
    """However often it is evaluated."""

    def rows(until: int) -> dict[int, dict[str, float]]:
        rewards = {s: 0.6 * (1 - math.exp(-s / 10)) * (1 - lost if 41 <= s < until else 1) for s in range(80)}
        return {s: {"eval/reward": reward, "train/mean_response_length": 300.0} for s, reward in rewards.items()}

    assert first_verdict(seen_every(interval, rows(until=49))) is None
    step, verdict = first_verdict(seen_every(interval, rows(until=80)))
    assert step in (50, 52)
    assert "fell" in verdict.reason


def test_one_bad_evaluation_is_no_collapse_while_responses_are_short():
    rows = {s: {"train/mean_response_length": 440.0 if s < 5 else 200.0, "eval/reward": 0.5} for s in range(60)}
    rows[0]["eval/reward"], rows[40]["eval/reward"] = 0.03, 0.25
    assert first_verdict(seen_every(4, rows)) is None


def test_a_rate_too_small_to_move_is_no_collapse():
    rng = random.Random(0)
    rows = {s: {"eval/reward": 0.03 + rng.gauss(0, 0.005), "train/mean_response_length": 350.0} for s in range(200)}
    assert first_verdict(rows) is None


def test_a_run_that_starts_at_the_limit_and_one_that_grows_into_it_with_good_reward_are_no_collapse():
    never_ended = {step: {"train/frac_truncated": 0.97, "eval/reward": 0.02} for step in range(50)}
    assert first_verdict(never_ended) is None
    grown = {
        s: {"train/mean_response_length": min(1000, 300 + 10 * s), "eval/reward": 0.1 + s / 200} for s in range(100)
    }
    assert first_verdict(grown) is None


def test_rambling_that_ends_as_reward_rises_is_no_collapse():
    rows = {s: {"train/mean_response_length": max(60, 900 - 100 * s), "eval/reward": 0.05 + s / 100} for s in range(40)}
    assert first_verdict(rows) is None


@pytest.mark.parametrize("interval", [4, 10])
def test_a_good_evaluation_counts_until_the_next_is_overdue(interval):
    """Rambling ends, or responses grow into the limit, between two evaluations of a reward that rises all the while."""
    shorter = {s: 100 + 850 * math.exp(-s / 10) for s in range(100)}
    longer = {s: min(1000.0, 300 + 10 * s) for s in range(100)}
    for lengths in (shorter, longer):
        rows = {
            s: {"train/mean_response_length": length, "eval/reward": 0.03 + s / 200} for s, length in lengths.items()
        }
        assert first_verdict(seen_every(interval, rows)) is None
        evaluated_until_40 = {s: row if s <= 40 else seen_every(1000, {s: row})[s] for s, row in rows.items()}
        step, _ = first_verdict(seen_every(interval, evaluated_until_40))
        assert step > 40 + interval


def test_responses_may_vanish_no_sooner_for_a_reward_that_is_up_by_chance():
    """Nothing is learned: 0.03, give or take the noise of 1,024 problems."""
    rows = {s: {"train/mean_response_length": max(5.0, 500 * 0.86**s), "eval/reward": 0.035} for s in range(40)}
    rows[0]["eval/reward"] = 0.03
    step, verdict = first_verdict(seen_every(4, rows))
    assert step == 14  # 500 * 0.86**10 is the first below a quarter of 500
    assert "shrink" in verdict.reason


@pytest.mark.parametrize("interval", [2, 4, 6])
def test_lengths_that_are_seen_rarely_are_judged_by_steps(interval):
    runaway = {s: {"train/mean_response_length": 300.0 if s < 24 else 1020.0} for s in range(60)}
    vanishing = {s: {"train/mean_response_length": 300.0 if s < 24 else 20.0} for s in range(60)}
    for rows in (runaway, vanishing):
        step, _ = first_verdict(seen_every(interval, rows, part="train/"))
        assert step in (28, 30)


def test_without_a_baseline_reward_peaks_early_and_responses_shrink():
    """Best at step 7, as published (0.34); then it slides, the gradient norm grows and responses become shorter."""
    rows = {}
    for s in range(96):
        length, norm = (440 - 2 * s if s < 40 else max(40, 360 - 12 * (s - 40))), 0.3 * 1.05**s
        rows[s] = {"train/mean_response_length": length, "train/grad_norm": norm}
        rows[s]["eval/reward"] = 0.03 + 0.31 * s / 7 if s <= 7 else max(0.15, 0.34 - 0.004 * (s - 7))
    step, verdict = first_verdict(seen_every(4, rows))
    assert step <= 48
    assert "fell" in verdict.reason
    without_reward = {s: {k: v for k, v in row.items() if k != "eval/reward"} for s, row in rows.items()}
    step, verdict = first_verdict(without_reward)
    assert step <= 70
    assert "shrink" in verdict.reason


def test_thresholds_follow_max_tokens():
    rows = {step: {"train/mean_response_length": 20.0 if step < 5 else 31.0} for step in range(20)}
    assert first_verdict(rows, small_config(max_tokens=32)) is not None
    assert first_verdict(rows, small_config(max_tokens=1024)) is None


def test_non_finite_and_missing_metrics_are_passed_over():
    guard = CollapseGuard(Config())
    for step in range(20):
        assert (
            guard.observe(step, {"train/grad_norm": math.nan, "eval/reward": math.inf, "train/entropy": None}) is None
        )
    assert json.loads(json.dumps(guard.state_dict(), allow_nan=False)) == guard.state_dict()


FALLEN = [{"eval/reward": value} for value in [0.5, 0.6] + 60 * [0.1]]


def test_warn_speaks_again_after_the_repeat_interval_stop_at_every_step_and_off_never():
    heard = {}
    for action in ("warn", "stop", "off"):
        guard = CollapseGuard(small_config(None, action=action))
        heard[action] = [step for step, row in enumerate(FALLEN) if guard.observe(step, row) is not None]
    assert heard["warn"] == [11, 31, 51]  # ten steps down, although three evaluations would do if they were rarer
    assert heard["stop"] == list(range(11, 62))
    assert heard["off"] == []


def test_saved_history_goes_on_as_if_uninterrupted():
    whole = CollapseGuard(small_config(None))
    expected = [whole.observe(step, row) for step, row in enumerate(FALLEN)]
    for cut in (1, 3, 5, 6, 7, 40):
        guard, seen = CollapseGuard(small_config(None)), []
        for step, row in enumerate(FALLEN):
            if step == cut:
                state = json.loads(json.dumps(guard.state_dict()))
                guard = CollapseGuard(small_config(None))
                guard.load_state_dict(state)
            seen.append(guard.observe(step, row))
        assert seen == expected


def test_state_is_a_snapshot():
    guard = CollapseGuard(Config())
    guard.observe(0, {"eval/reward": 0.5})
    state = guard.state_dict()
    guard.observe(1, {"eval/reward": 0.6})
    assert state["series"]["eval/reward"] == [[0, 0.5]]


def test_metrics_of_one_step_may_come_in_several_calls_and_the_later_value_stands():
    guard = CollapseGuard(Config())
    guard.observe(1, {"train/entropy": 1.0, "eval/reward": 0.2})
    guard.observe(1, {"train/entropy": 2.0})
    assert guard.state_dict()["series"]["train/entropy"] == [[1, 2.0]]
    assert guard.state_dict()["series"]["eval/reward"] == [[1, 0.2]]


def warnings_of(rows: list[dict[str, float]], config: Config | None = None) -> list[tuple[int, str]]:
    advisor = Advisor(config or Config())
    return [(step, text) for step, row in enumerate(rows) for text in advisor.observe(step, row)]


def test_advice_when_no_group_teaches_anything():
    rows = [{"train/frac_zero_std_groups": 1.0}] * 30
    (first, text), (second, _) = warnings_of(rows)
    assert (first, second) == (4, 24)
    assert "5 steps" in text
    assert "group_size" in text
    broken = [{"train/frac_zero_std_groups": 0.97 if step % 5 == 4 else 1.0} for step in range(30)]
    assert warnings_of(broken) == []


def test_advice_when_more_than_a_quarter_is_truncated():
    ((first, text),) = warnings_of([{"train/frac_truncated": 0.1}] * 3 + [{"train/frac_truncated": 0.4}] * 10)
    assert first == 7
    assert "40%" in text
    assert "1024" in text
    assert warnings_of([{"train/frac_truncated": 0.25}] * 10) == []


def test_advice_when_the_format_is_kept_and_answers_get_worse():
    answers = [0.3, 0.5, 0.5, 0.3, 0.3]
    rows = [{"eval/format_reward": 0.95, "eval/answer_reward": answer} for answer in answers]
    ((first, text),) = warnings_of(rows)
    assert first == 4
    assert "0.950" in text
    assert "0.300" in text
    assert "0.500" in text
    assert warnings_of([{**row, "eval/format_reward": 0.5} for row in rows]) == []
    assert warnings_of([{**row, "eval/answer_reward": 0.5} for row in rows]) == []


@pytest.mark.parametrize(("last", "warned"), [(5e-2, True), (2e-3, False)])
def test_advice_when_the_sampler_drifts(last, warned):
    rows = [{"train/sampler_kl": 1e-3 + (last - 1e-3) * step / 19} for step in range(20)]
    assert [("sampler_kl" in text) for _, text in warnings_of(rows)] == [True] * warned
    assert warnings_of([{"train/sampler_kl": 1e-8 * 2**step} for step in range(15)]) == []  # growing, but from nothing


def test_advice_is_not_repeated_after_a_resume():
    config, rows = Config(), [{"train/frac_truncated": 0.5}] * 10
    advisor = Advisor(config)
    assert [step for step, row in enumerate(rows) if advisor.observe(step, row)] == [4]
    resumed = Advisor(config)
    resumed.load_state_dict(json.loads(json.dumps(advisor.state_dict())))
    assert [step for step in range(10, 30) if resumed.observe(step, rows[0])] == [24]


def test_advice_names_only_what_there_is():
    rows = [{"train/frac_zero_std_groups": 1.0, "train/frac_truncated": 0.5}] * 6

    def said(**training: object) -> str:
        config = Config(training=Training(**training))
        advisor = Advisor(config)
        return " ".join(text for step, row in enumerate(rows) for text in advisor.observe(step, row))

    usual = said()
    assert "stop strings" in usual and "view_rollouts.py" in usual
    assert "stop strings" not in said(stop=[])
    assert "view_rollouts.py" not in said(n_rollouts_to_log=0)
    assert "training.n_rollouts_to_log" in said(eval_interval=None)

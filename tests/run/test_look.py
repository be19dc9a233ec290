"""The look before training: what it counts, why rewards are 0, and that the command shows it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import forked
import pytest
from quickstart_cases import rows, train

from configs.defaults import Training
from utils.records import Problem, Prompt, Reward, Rollout
from utils.rewards.functions import REWARD_FNS, RewardScorer
from utils.rewards.grader import Grader
from utils.run.look import Look, look_before_training

ROOT = Path(__file__).parents[2]
RIGHT, WRONG, OPEN, BARE = (
    "so </think> <answer>5</answer>",
    "so </think> <answer>6</answer>",
    "so </think> <answer>5",
    "five",
)


def prompt(i: int) -> Prompt:
    return Prompt(Problem(f"question {i}", "5"), f"x{i} " * 200 + f"prompt {i} ends", (1, i))


def look(*texts: str, group_size: int = 2, reward_fn: str = "r1_zero") -> Look:
    """A look at these responses; those that end with "..." were truncated."""
    endings = ["length" if "..." in text else "stop" for text in texts]
    rollouts = [
        Rollout(prompt(i // group_size), text, (7,) * len(text), (-1.0,) * len(text), endings[i])
        for i, text in enumerate(texts)
    ]
    with Grader(workers=1) as grader:
        scorer = RewardScorer(reward_fn, {}, grader)
        return Look(rollouts, scorer.score(rollouts), Training(group_size=group_size, max_tokens=40), scorer)


def test_counts_by_hand() -> None:
    seen = look(RIGHT, WRONG, OPEN, "so </think> ...", RIGHT, RIGHT, BARE, BARE)
    assert seen.counts() == {
        "right answer": 3,
        "groups with a signal": 1,
        "in the asked-for format": 4,
        "hold `</think> <answer>`": 5,
        "hold `</answer>`": 4,
        "ran into max_tokens": 1,
    }
    table = "\n".join(seen.lines())
    assert "8 responses, 2 to each of 4 validation problems" in table
    assert "groups with a signal           25.0%  1 of 4" in table
    lengths = sorted(len(r.response) for r in seen.rollouts)
    assert f"median {(lengths[3] + lengths[4]) / 2:g}, longest {lengths[-1]} tokens (max_tokens 40)" in table


def test_each_response_without_a_reward_has_one_reason() -> None:
    seen = look(RIGHT, WRONG, OPEN, "so ...", BARE, "</answer> </think> <answer>")
    assert [seen.reason(*pair) for pair in zip(seen.rollouts, seen.rewards, strict=True)] == [
        None,
        "in the right format, with a wrong answer",
        "without `</answer>`, which r1_zero looks for",
        "ran into max_tokens = 40",
        "without `</think> <answer>` and `</answer>`, which r1_zero looks for",
        "with all that r1_zero looks for, but not as it asks",
    ]
    assert seen.why_zero().startswith("why 5 of 6 responses have no reward: 1 ")
    assert look(RIGHT, RIGHT).why_zero() is None


def test_a_start_without_any_signal_is_a_warning_that_says_why() -> None:
    warning = look(BARE, BARE, "...", BARE).warning()
    assert "none of 2 groups of 2 responses has a signal" in warning
    assert "3 without `</think> <answer>` and `</answer>`, which r1_zero looks for; 1 ran into max_tokens" in warning
    assert look(RIGHT, BARE).warning() is None
    assert "the rewards within each are equal" in look(RIGHT, RIGHT).warning()


def test_without_a_baseline_any_reward_is_a_signal() -> None:
    seen = look(RIGHT, RIGHT, BARE, BARE)
    assert seen.n_groups_with_signal == 0
    raw = dataclasses.replace(seen, training=Training(group_size=2, loss_type="no_baseline"))
    assert raw.n_groups_with_signal == 1
    alone = dataclasses.replace(raw, training=Training(group_size=1, loss_type="no_baseline"))
    assert (alone.n_groups_with_signal, alone.warning()) == (2, None)


def test_two_responses_in_full_one_of_each_kind() -> None:
    text = "\n".join(look(BARE, BARE + "\x1b[31m", RIGHT, RIGHT).lines())
    assert text.count("after a prompt that ends with") == 2
    assert f"  | {BARE}\nreward 0" in text
    assert f"  | {RIGHT}\nreward 1" in text
    assert "\n  | ...x0 x0 " not in text
    assert "prompt 0 ends" in text and "prompt 1 ends" in text
    assert "\x1b" not in text


@pytest.mark.parametrize("name", [name for name, function in REWARD_FNS.items() if hasattr(function, "needs")])
def test_a_reward_function_says_truly_what_it_looks_for(name: str) -> None:
    """A right response holds it all, and without one of the texts there is no format."""
    function = REWARD_FNS[name]
    with Grader(workers=1) as grader:

        def has_format(text: str) -> bool:
            (reward,) = function([Rollout(prompt(0), text, (1,), (0.0,), "stop")], grader)
            return reward.format > 0

        answers = [RIGHT, r"\boxed{5}", r"\fbox{5}", "#### 5", "<answer>5</answer>"]
        formatted = [text for text in answers if has_format(text)]
        assert formatted
        for texts in function.needs:
            assert {s for s in texts if any(s in text for text in formatted)} == set(texts)
            for text in formatted:
                for spelling in texts:
                    text = text.replace(spelling, "")
                assert not has_format(text)


def test_the_look_samples_whole_groups_of_a_fixed_choice() -> None:
    class Engine:
        def generate(self, prompts, n, seed, label, should_stop):
            if should_stop():
                return []
            return [Rollout(prompt, BARE, (1,), (0.0,), "stop") for prompt in prompts for _ in range(n)]

    class Scorer:
        def score(self, rollouts):
            return [Reward(0.0, 0.0, 0.0)] * len(rollouts)

    prompts = [prompt(i) for i in range(50)]
    seen = [look_before_training(Engine(), prompts, Scorer(), Training(group_size=4), 18) for _ in range(2)]
    assert [rollout.prompt for rollout in seen[0].rollouts] == [rollout.prompt for rollout in seen[1].rollouts]
    assert [len(seen[0].rollouts), len(seen[0].groups), len({r.prompt for r in seen[0].rollouts})] == [16, 4, 4]
    assert look_before_training(Engine(), prompts, Scorer(), Training(), 18, should_stop=lambda: True) is None


def test_a_run_warns_before_its_first_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "model").symlink_to(tiny_model_dir)
    for name in ("train", "validation"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"problem": "{i}", "answer": "2"}}\n' for i in range(8)))
    small = (
        "training.n_grpo_steps=1", "training.rollout_batch_size=4", "training.train_batch_size=4",
        "training.group_size=2", "training.max_tokens=8",
    )  # fmt: skip
    done = train(tmp_path, tmp_path / "run", *small)
    assert done.returncode == 0, done.stderr
    assert "8 responses, 2 to each of 4 validation problems" in done.stdout
    (warning,) = [
        row
        for line in (tmp_path / "run" / "warnings.jsonl").read_text().splitlines()
        if "has a signal" in (row := json.loads(line))["warning"]
    ]
    assert warning["grpo_step"] == 0
    assert done.stdout.index("has a signal") < done.stdout.index("step 1/1")
    first = next(row for row in rows(tmp_path / "run") if row.get("eval_step") == 0)
    assert first.get("eval/grader_answers", 0) <= 8  # what the look graded is in no metric


def test_the_command(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i}+1=?", "answer": str(i + 1)}) + "\n" for i in range(6)))
    command = [sys.executable, str(ROOT / "play-scripts" / "probe.py")]
    options = ["--config", str(ROOT / "configs" / "quickstart.yaml"), f"paths.val_data_file={data}"]
    options += [f"paths.prompt_template_file={ROOT / 'data' / 'tiny.prompt'}", f"paths.model_path={tiny_model_dir}"]
    done = forked.run([*command, *options, "--responses", "16"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "16 responses, 8 to each of 2 validation problems" in done.stdout
    assert "in the asked-for format         0.0%  0 of 16" in done.stdout
    assert "why 16 of 16 responses have no reward" in done.stdout
    assert list(tmp_path.iterdir()) == [data]
    refused = forked.run([*command, *options, "paths.val_data_file=none.jsonl"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "paths.val_data_file = 'none.jsonl': no such file" in refused.stderr

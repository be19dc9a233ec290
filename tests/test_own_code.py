"""Rewards and losses in a user's own file: tried at the start, mistakes told with their line, compared on resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from run_cases import arguments, finish, printed_file, rows_of, trained_steps

from configs.defaults import Config, Training
from utils.algorithm.losses import LossInputs, find_loss, grpo_clip, objective
from utils.own_code import is_own, unusable_own
from utils.preflight.config import load_config
from utils.preflight.config_rules import ConfigError
from utils.preflight.obstacles import obstacles
from utils.records import Problem, Prompt, Reward, Rollout
from utils.rewards.functions import RewardScorer, find_reward_fn
from utils.run.look import Look

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "docs" / "examples"


def write(folder: Path, *lines: str) -> Path:
    path = folder / "mine.py"
    path.write_text("\n".join(lines) + "\n")
    return path


def rollout(response: str, finish_reason: str = "stop") -> Rollout:
    prompt = Prompt(Problem("What is 2 + 3?", "5"), "Question: what is 2 + 3?", (1, 2))
    return Rollout(prompt, response, (3,) * len(response), (-1.0,) * len(response), finish_reason)


def test_what_is_a_function_in_a_file() -> None:
    assert [is_own(name) for name in ("a/b.py:f", "b.py:f_1", "r1_zero", "b.py", "b.py:", "b.py:f()", "b.txt:f")] == [
        True, True, False, False, False, False, False
    ]  # fmt: skip


def test_an_own_reward_sees_the_rollout_and_may_return_either_form(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def plain(r):",
        "    told = (r.response, r.finish_reason, r.prompt.text, r.prompt.problem.answer, len(r.response_ids))",
        "    return told == ('abc', 'length', 'Question: what is 2 + 3?', '5', 3)",
        "def parts(r):",
        "    return {'format': 1, 'answer': 0.5, 'total': 2.5}",
    )
    scorer = RewardScorer(f"{path}:plain", {f"{path}:parts": 0.1}, grader=None)
    assert scorer.score([rollout("abc", "length"), rollout("abc")]) == [
        Reward(1.0, 1.0, pytest.approx(1.25)),
        Reward(0.0, 0.0, pytest.approx(0.25)),
    ]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["def f(r):", "    x = r.response", "    return 1 / len(x)"], ":3: f raised ZeroDivisionError: division"),
        (["import nowhere_to_be_found", "def f(r):", "    return 1"], ":1: f raised ModuleNotFoundError"),
        (["", "def f(r):", "    return 'good'"], ":2: f returned 'good'; return a finite number, or a dict"),
        (["def f(r):", "    return float('nan')"], ":1: f returned nan"),
        (["def f(r):", "    return {'total': 1.0}"], ":1: f returned {'total': 1.0}"),
        (["def f(response, truth):", "    return 1.0"], ":1: f raised TypeError"),
        (["def g(r):", "    return 1.0"], " defines no function 'f'; it defines: g"),
        (["def f(r)", "    return 1.0"], ":1: not Python"),
    ],
)
def test_a_mistake_is_told_with_file_and_line_at_the_start(tmp_path: Path, lines: list[str], complaint: str) -> None:
    path = write(tmp_path, *lines)
    with pytest.raises(ValueError) as raised:
        find_reward_fn(f"{path}:f")
    assert f"{path}{complaint}" in str(raised.value)


def test_the_config_takes_such_names_and_what_is_missing_is_an_obstacle(tmp_path: Path) -> None:
    write(tmp_path, "def f(r):", "    return 1.0")
    name = f"{tmp_path}/mine.py:f"
    own = [f"training.reward_fn={name}", f"training.extra_rewards={{{name}: 0.5}}", f"training.loss_type={name}"]
    config = load_config([], own)
    assert (config.training.reward_fn, config.training.extra_rewards, config.training.loss_type) == (
        name, {name: 0.5}, name
    )  # fmt: skip
    assert not [line for line in obstacles(config, False, False) if "mine.py" in line]
    config.training.reward_fn = f"{tmp_path}/mine.py:g"
    config.training.loss_type = f"{tmp_path}/yours.py:f"
    told = [line for line in obstacles(config, False, False) if ".py:" in line]
    assert "training.reward_fn" in told[0] and "defines no function 'g'; it defines: f" in told[0]
    assert "training.loss_type" in told[1] and "no file" in told[1]
    with pytest.raises(ConfigError, match=r"path/to/file\.py:function"):
        load_config([], ["training.loss_type=ppo"])
    with pytest.raises(ConfigError, match=r"path/to/file\.py:function"):
        load_config([], ["training.reward_fn=r2_zero"])


def test_the_example_reward() -> None:
    scorer = RewardScorer(f"{EXAMPLES}/reward.py:bracketed", {f"{EXAMPLES}/reward.py:brief": 0.1}, grader=None)
    rollouts = [rollout("[[4]] [[5]]"), rollout("[[6]]"), rollout("5", "length")]
    rewards = scorer.score(rollouts)
    assert [reward.total for reward in rewards] == pytest.approx([1 - 0.0011, -0.0005, -0.1])
    assert [reward.format for reward in rewards] == [1.0, 1.0, 0.0]
    assert scorer.needs == (("[[",), ("]]",))
    assert "1 ran into" in Look(rollouts, rewards, Training(group_size=3), scorer).why_zero()


INPUTS = LossInputs(
    policy_log_probs=torch.tensor([[-1.0, -0.5, -2.0], [-0.2, -0.9, -0.4]], requires_grad=True),
    response_mask=torch.tensor([[True, True, True], [True, False, False]]),
    rewards=torch.tensor([1.0, 0.0]),
    advantages=torch.tensor([1.0, -1.0]),
    old_log_probs=torch.tensor([[-1.1, -0.4, -1.7], [-0.1, -0.9, -0.4]]),
)


def test_the_example_loss_by_hand() -> None:
    """Sequence ratios exp((0.1 - 0.1 - 0.3) / 3) = exp(-0.1) and exp(-0.1); within the clip range of 0.2."""
    training = Training(loss_type=f"{EXAMPLES}/loss.py:gspo", group_size=2)
    loss = find_loss(training.loss_type)
    values, extras = loss.per_token(INPUTS, training)
    ratio = torch.exp(torch.tensor(-0.1))
    assert torch.allclose(values, torch.stack([-ratio, ratio])[:, None].expand(2, 3))
    assert not extras["clipped"].any()
    assert loss.has_gradient(INPUTS.rewards, torch.tensor([0.0, 1.0]), Training()).tolist() == [False, True]
    assert loss.needs_old_log_probs(Training(epochs_per_rollout_batch=2))
    assert objective(INPUTS, training).item() == pytest.approx(0.0)


def test_a_loss_that_says_nothing_of_itself_is_taken_to_need_everything(tmp_path: Path) -> None:
    path = write(tmp_path, "def f(inputs, training):", "    return -inputs.policy_log_probs")
    loss = find_loss(f"{path}:f")
    assert loss.has_gradient(torch.zeros(2), torch.zeros(2), Training()).all()
    assert loss.has_ratio


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ("inputs.policy_log_probs.sum()", ":1: the loss returned (); return a tensor of shape (2, 3)"),
        ("inputs.policy_log_probs.detach()", ":1: the loss returned (2, 3); return a tensor of shape (2, 3), the loss"),
        ("3.0", ":1: the loss returned float"),
        ("inputs.reference_log_probs + 1", ":2: f raised TypeError"),
    ],
)
def test_a_loss_that_does_not_fit_is_told_with_file_and_line(tmp_path: Path, body: str, complaint: str) -> None:
    path = write(tmp_path, "def f(inputs, training):", f"    return {body}")
    with pytest.raises(ValueError) as raised:
        find_loss(f"{path}:f")
    assert f"{path}{complaint}" in str(raised.value)


def test_an_own_copy_of_a_loss_is_that_loss(tmp_path: Path) -> None:
    path = write(tmp_path, "from utils.algorithm.losses import grpo_clip as f")
    assert unusable_own(f"{path}:f") is None
    expected, _ = grpo_clip(INPUTS, Training())
    assert torch.equal(find_loss(f"{path}:f").per_token(INPUTS, Training())[0], expected)


def test_a_dry_run_lists_the_file(tmp_path: Path) -> None:
    from utils.preflight.dry_run import describe_run

    config = Config()
    config.training.reward_fn = f"{EXAMPLES}/reward.py:bracketed"
    assert f"reads  {EXAMPLES}/reward.py\n" in describe_run(config)


@pytest.mark.slow
def test_a_run_with_both_and_a_resume_that_compares_the_file(world: Path, tmp_path: Path) -> None:
    reward, loss = (shutil.copy(EXAMPLES / f"{name}.py", tmp_path / f"{name}.py") for name in ("reward", "loss"))
    options = arguments(
        world, tmp_path / "run",
        f"training.reward_fn={reward}:bracketed", f"training.loss_type={loss}:gspo", "training.n_grpo_steps=1",
    )  # fmt: skip
    assert finish(options) == 0, printed_file(tmp_path / "run").read_text()
    (launch,) = json.loads((tmp_path / "run" / "run.json").read_text())["launches"]
    assert list(launch["own_code"]) == [f"{reward}:bracketed", f"{loss}:gspo"]
    more = [*options, "training.n_grpo_steps=2", "--resume"]
    with Path(reward).open("a") as file:
        file.write("# changed\n")
    assert finish(more) == 2
    told = printed_file(tmp_path / "run").read_text()
    assert f"training.reward_fn = '{reward}:bracketed': the file has changed" in told
    assert "loss.py:gspo': the file has changed" not in told
    assert finish([*more, "--allow-changes"]) == 0
    assert trained_steps(tmp_path / "run") == [1, 2]
    assert rows_of(tmp_path / "run" / "rollouts.jsonl")


@pytest.mark.slow
def test_a_reward_that_fails_on_a_sample_stops_the_start(world: Path, tmp_path: Path) -> None:
    path = write(tmp_path, "def f(rollout):", "    return rollout.text")
    assert finish(arguments(world, tmp_path / "run", f"training.reward_fn={path}:f")) == 2
    told = printed_file(tmp_path / "run").read_text()
    assert f"error: training.reward_fn = '{path}:f': {path}:2: f raised AttributeError" in told
    assert "Traceback" not in told
    assert not (tmp_path / "run").exists()

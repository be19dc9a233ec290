from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.defaults import Training
from utils import tiny
from utils.algorithm import sft as sft_steps
from utils.problems import load_demonstrations
from utils.run.ending import Status

SCRIPT = Path(__file__).parents[2] / "play-scripts" / "train_sft.py"
spec = importlib.util.spec_from_file_location("train_sft", SCRIPT)
train_sft = importlib.util.module_from_spec(spec)
sys.modules["train_sft"] = train_sft
spec.loader.exec_module(train_sft)

TOKENIZER = tiny.build_tokenizer()
ROWS = [
    {"prompt": "a", "response": "bcdefgh"},
    {"prompt": "User: 1+1=?", "response": " 2"},
    {"prompt": "0123456789", "response": "x"},
    {"prompt": "a b", "response": "answer think"},
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "demonstrations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def options(**changes) -> Training:
    common = {"device": "cpu", "dtype": "float32", "use_bnb_adamw8bit": False, "max_grad_norm": 1e9}
    return Training(**{**common, "train_batch_size": 4, "gradient_accumulation_steps": 1, **changes})


def slow_loss(policy: torch.nn.Module) -> torch.Tensor:
    """Mean negative log-likelihood over all response tokens, row by row and token by token."""
    terms = []
    for row in ROWS:
        prompt = TOKENIZER(row["prompt"]).input_ids
        ids = [*prompt, *TOKENIZER(row["response"]).input_ids, TOKENIZER.eos_token_id]
        log_probs = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        terms += [-log_probs[t - 1, ids[t]] for t in range(len(prompt), len(ids))]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_step_is_the_mean_over_response_tokens_however_it_is_cut(data: Path, accumulation: int) -> None:
    demonstrations, _ = load_demonstrations(data, TOKENIZER, max_tokens=100)
    policy, reference = tiny.build_model(seed=3), tiny.build_model(seed=3)
    expected = slow_loss(reference)
    expected.backward()
    expected_norm = torch.cat([p.grad.flatten() for p in reference.parameters()]).norm()

    kept: dict[str, torch.Tensor] = {}

    class Keeper(torch.optim.SGD):
        def step(self, closure=None):
            kept.update({name: p.grad.clone() for name, p in policy.named_parameters()})

    training = options(gradient_accumulation_steps=accumulation)
    loss, grad_norm = sft_steps.train_step(policy, Keeper(policy.parameters()), demonstrations, training)
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert grad_norm == pytest.approx(expected_norm.item(), rel=1e-4)
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(kept[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_training_learns_the_responses_and_their_end(data: Path) -> None:
    demonstrations, _ = load_demonstrations(data, TOKENIZER, max_tokens=100)
    policy = tiny.build_model(seed=3)
    rows = list(sft_steps.train(policy, demonstrations, options(learning_rate=3e-3, max_grad_norm=1.0), 60))
    assert rows[0]["loss"] == pytest.approx(torch.log(torch.tensor(len(TOKENIZER))).item(), abs=0.2)  # knows nothing
    assert rows[-1]["loss"] < 0.1
    for row in ROWS:
        ids = TOKENIZER(row["prompt"], return_tensors="pt").input_ids
        generated = policy.eval().generate(ids, do_sample=False, max_new_tokens=20)[0, ids.shape[1] :]
        assert TOKENIZER.decode(generated) == row["response"] + "<|endoftext|>"


def test_schedules(data: Path) -> None:
    demonstrations, _ = load_demonstrations(data, TOKENIZER, max_tokens=100)

    def rates(schedule: str) -> list[float]:
        policy = tiny.build_model(seed=3, hidden_size=16, n_layers=1)
        steps = sft_steps.train(policy, demonstrations, options(learning_rate=1.0), 6, schedule, warmup_steps=2)
        return [row["learning_rate"] for row in steps]

    assert rates("constant") == pytest.approx([0, 0.5, 1, 1, 1, 1])
    assert rates("linear") == pytest.approx([0, 0.5, 1, 0.75, 0.5, 0.25])
    assert rates("cosine") == pytest.approx([0, 0.5, 1, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5])


def test_nonfinite_stops_and_leaves_the_weights(data: Path) -> None:
    demonstrations, _ = load_demonstrations(data, TOKENIZER, max_tokens=100)
    policy = tiny.build_model(seed=3)
    with torch.no_grad():
        policy.model.norm.weight[0] = torch.nan
    before = {name: p.clone() for name, p in policy.named_parameters()}
    with pytest.raises(ValueError, match=r"the loss is nan, .* lower the learning rate"):
        list(sft_steps.train(policy, demonstrations, options(), 1))
    torch.testing.assert_close(dict(policy.named_parameters()), before, rtol=0, atol=0, equal_nan=True)


def test_long_demonstrations_are_counted_and_left_out(data: Path) -> None:
    # tokens, prompt + response + end: 1 + 7 + 1, 8 + 2 + 1, 10 + 1 + 1, 3 + 3 + 1
    demonstrations, n_left_out = load_demonstrations(data, TOKENIZER, max_tokens=11)
    assert (len(demonstrations), n_left_out) == (3, 1)
    assert max(map(len, demonstrations)) == 11
    with pytest.raises(ValueError, match="none of its 4 rows has 6 tokens or fewer"):
        load_demonstrations(data, TOKENIZER, max_tokens=6)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a"}', "d.jsonl:2: no `response` among the keys \\['prompt'\\]"),
        ('{"prompt": "a", "response": null}', "d.jsonl:2: `response` should be text, not null"),
        ('{"prompt": ["a"], "response": "b"}', "d.jsonl:2: `prompt` should be text, not list"),
        ('{"prompt": "a", "response": ""}', "d.jsonl:2: `response` is empty"),
        ("{", "d.jsonl:2: not JSON"),
    ],
)
def test_bad_rows(tmp_path: Path, line: str, complaint: str) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        load_demonstrations(tmp_path / "d.jsonl", TOKENIZER, max_tokens=100)


def sft(*arguments: str | Path | int) -> subprocess.CompletedProcess:
    return forked.run([sys.executable, SCRIPT, *map(str, arguments)])


@pytest.mark.slow
def test_the_command(tmp_path: Path, data: Path, tiny_model_dir: Path) -> None:
    common = ("--model", tiny_model_dir, "--data", data, "--batch-size", 4, "--learning-rate", 1e-3, "--device", "cpu")
    output = tmp_path / "out" / "sft"
    arguments = (*common, "--output", output, "--steps", 3, "--save-at", 1, 2)
    result = sft(*arguments)
    assert result.returncode == 0, result.stderr
    weights = []
    for name in ("step_1", "step_2", "final"):
        weights.append(AutoModelForCausalLM.from_pretrained(output / name).lm_head.weight)
        assert AutoTokenizer.from_pretrained(output / name)("think").input_ids == TOKENIZER("think").input_ids
    assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 3
    metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[2]["loss"] < metrics[0]["loss"]
    assert json.loads((output / "options.json").read_text())["learning_rate"] == 1e-3
    assert "step 3/3" in result.stdout and str(output / "final") in result.stdout

    again = sft(*arguments)
    assert again.returncode == 2 and "already holds something; choose another folder" in again.stderr


@pytest.mark.slow
def test_epochs_are_steps_over_the_data(tmp_path: Path, data: Path, tiny_model_dir: Path) -> None:
    common = ("--model", tiny_model_dir, "--data", data, "--batch-size", 4, "--device", "cpu")
    n_rows = len(data.read_text().splitlines())
    done = sft(*common, "--output", tmp_path / "out", "--epochs", 1.5)
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == -(-3 * n_rows // 8)
    assert json.loads((tmp_path / "out" / "options.json").read_text())["epochs"] == 1.5
    for wrong in (("--epochs", 0), ("--epochs", 1, "--steps", 2), ()):
        assert sft(*common, "--output", tmp_path / "other", *wrong).returncode == 2
    too_late = sft(*common, "--output", tmp_path / "other", "--epochs", 1, "--save-at", 1000)
    assert "--save-at 1000 is not one of the" in too_late.stderr
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (("--save-at", 11), "--save-at 11 is not one of the 10 steps"),
        (("--gradient-accumulation-steps", 3), "--batch-size 4 does not divide into --gradient-accumulation-steps 3"),
        (("--learning-rate", 0), "--learning-rate 0.0 should be above 0"),
        (("--batch-size", 0), "--batch-size 0 should be 1 or more"),
        (("--model", "./missing"), "--model ./missing: no config.json there"),
        (("--model", "models/missing"), "--model models/missing: no config.json there"),
        (("--model", "models/broken"), "--model 'models/broken': cannot load a tokenizer"),
        (("--data", "missing.jsonl"), "missing.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, data: Path, tiny_model_dir: Path, capsys, monkeypatch, changes: tuple, complaint: str
) -> None:
    (tmp_path / "models" / "broken").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    common = ("--model", tiny_model_dir, "--data", data, "--output", tmp_path / "out", "--batch-size", 4, "--steps", 10)
    monkeypatch.setattr(sys, "argv", ["train_sft.py", *map(str, (*common, *changes))])
    assert train_sft.run_command(train_sft.build_parser(), train_sft.run) == Status.USER_MISTAKE
    error = capsys.readouterr().err
    assert complaint in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()

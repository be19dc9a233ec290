"""Whole training runs of the quickstart's command and config, on a world that is learned in seconds."""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import made_once
from quickstart_cases import ROOT, command_line, rows, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils.log.output import claimed
from utils.preflight.model_files import is_local
from utils.run.ending import Status
from utils.run.start import what_resume_found

TIMES = ("_dt", "time", "tokens_per_second", "memory_gb")


def one_problem(model: Path, folder: Path) -> Path:
    """Make the folder a world of one problem."""
    (folder / "model").symlink_to(model)
    for name in ("train", "validation"):
        (folder / f"{name}.jsonl").write_text('{"problem": "1+1=?", "answer": "2"}\n')
    return folder


def without_times(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if not name.endswith(TIMES)} for row in rows]


@pytest.fixture(scope="module")
def finished_run(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = ("min_tokens=0", "n_grpo_steps=12", "eval_interval=4", "checkpoint_interval=5")

    def make(folder: Path) -> None:
        output = folder / "whole"
        done = train(world, output, *(f"training.{option}" for option in options))
        assert done.returncode == 0, done.stderr
        for word in ("metrics.jsonl", "rollouts.jsonl", "checkpoints/last", "checkpoints/best", "reward_curve.png"):
            assert str(output / word) in done.stdout

    return made_once(tmp_path_factory, "finished_run", make) / "whole"


@pytest.mark.slow
def test_reward_rises(finished_run: Path) -> None:
    assert [row["eval_step"] for row in rows(finished_run) if "eval_step" in row] == [0, 4, 8, 12]
    first, *_, last = (row["train/reward"] for row in rows(finished_run) if "grpo_step" in row)
    assert 0.35 < first < 0.65  # the mean of 256 guesses of 1 or 2, where 1 is right: with a standard error of 0.03
    assert last > first + 0.15


@pytest.mark.slow
def test_what_the_run_wrote(finished_run: Path) -> None:
    steps = [row for row in rows(finished_run) if "grpo_step" in row]
    assert [row["grpo_step"] for row in steps] == list(range(1, 13))
    assert all(row["train/mean_ratio"] == 1.0 for row in steps)  # on-policy
    # float32: engine and trainer compute the same log-probs by different ways
    assert all(row["train/sampler_max_diff"] < 1e-3 for row in steps)
    rollouts = [json.loads(line) for line in (finished_run / "rollouts.jsonl").read_text().splitlines()]
    assert {(row["split"], row["grpo_step"]) for row in rollouts} == {
        ("eval", 0), ("eval", 4), ("train", 4), ("eval", 8), ("train", 8), ("eval", 12), ("train", 12)
    }  # fmt: skip
    assert all(row["reward"] == float(row["format_reward"] and row["answer_reward"]) for row in rollouts)
    assert json.loads((finished_run / "status.json").read_text())["status"] == "finished"
    assert (finished_run / "reward_curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_checkpoints_load_and_differ_from_the_start(finished_run: Path, world: Path) -> None:
    start = AutoModelForCausalLM.from_pretrained(world / "model")
    for name in ("best", "last"):
        folder = finished_run / "checkpoints" / name
        policy = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder)("1+1").input_ids
        assert not all(torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters(), strict=True))


@pytest.mark.slow
def test_same_seed_same_metrics_and_another_seed_others(world: Path, tmp_path: Path) -> None:
    short = ("training.n_grpo_steps=3", "training.eval_interval=2", "training.max_val_examples=64")
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert train(world, tmp_path / name, *short, f"training.seed={seed}").returncode == 0
    one, again, other = (without_times(rows(tmp_path / name)) for name in ("one", "again", "other"))
    assert one == again
    assert one != other


@pytest.mark.slow
def test_evaluating_and_logging_more_changes_nothing_that_is_trained(world: Path, tmp_path: Path) -> None:
    short = ("training.n_grpo_steps=3", "training.max_val_examples=32")
    assert train(world, tmp_path / "rarely", *short, "training.eval_interval=null").returncode == 0
    often = ("training.eval_interval=1", "training.n_rollouts_to_log=3")
    assert train(world, tmp_path / "often", *short, *often).returncode == 0
    trained = [
        [row for row in without_times(rows(tmp_path / name)) if "grpo_step" in row] for name in ("rarely", "often")
    ]
    assert trained[0] == trained[1]


@pytest.mark.slow
def test_off_policy_run_moves_the_ratio(world: Path, tmp_path: Path) -> None:
    settings = (
        "training.n_grpo_steps=2", "training.eval_interval=null", "training.epochs_per_rollout_batch=2",
        "training.train_batch_size=64", "training.gradient_accumulation_steps=2", "training.learning_rate=1e-3",
    )  # fmt: skip
    done = train(world, tmp_path / "run", *settings)
    assert done.returncode == 0, done.stderr
    last = rows(tmp_path / "run")[-1]
    assert last["optimizer_step"] == 16
    assert last["train/mean_ratio"] != 1.0
    assert last["train/clip_fraction"] > 0


def test_a_folder_that_holds_a_run_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    world = one_problem(tiny_model_dir, tmp_path)
    small = (
        "training.n_grpo_steps=1", "training.rollout_batch_size=4", "training.train_batch_size=4",
        "training.group_size=2", "training.eval_interval=null", "training.max_tokens=8",
    )  # fmt: skip
    assert train(world, tmp_path / "run", *small).returncode == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    done = train(world, tmp_path / "run", *small)
    assert done.returncode == 2
    assert "already holds a run; continue it with --resume, or choose another folder" in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_folder_that_another_process_runs_in_is_left_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    one_problem(tiny_model_dir, tmp_path)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = train(tmp_path, tmp_path / "run")
    assert done.returncode == 2
    assert "another process is running there" in done.stderr


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("paths.model_path=nowhere/model/here", "paths.model_path = 'nowhere/model/here': no config.json there"),
        ("training.reward_fn=r2_zero", "training.reward_fn = 'r2_zero' (command line): no reward function 'r2_zero'"),
        ("training.max_prompt_tokens=2", "max_prompt_tokens is 2"),
        ("training.max_tokens=5000", "2048 tokens; lower it"),
        ("training.use_chat_template=true", "has no chat template"),
        ("training.device=cuda:0", "no NVIDIA GPU here; set training.device=cpu"),
    ],
)
def test_mistakes_are_told_in_one_line_and_nothing_is_written(
    tiny_model_dir: Path, tmp_path: Path, override: str, complaint: str
) -> None:
    if "cuda" in override and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    one_problem(tiny_model_dir, tmp_path)
    done = train(tmp_path, tmp_path / "runs" / "run", override)
    assert done.returncode == 2, done.stderr
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_claim_that_fails_takes_back_what_it_made(tmp_path: Path) -> None:
    there, other = tmp_path / "there", tmp_path / "other"
    for folder in (there, other):
        folder.mkdir()
    (other / ".lock").touch()
    for folder in (there, other, tmp_path / "runs" / "lr" / "seed_1"):
        with pytest.raises(ValueError, match="mistake"), claimed(folder) as lock:
            assert folder.is_dir()
            raise ValueError("mistake")
        assert lock.closed
    assert sorted(tmp_path.rglob("*")) == [other, other / ".lock", there]

    with pytest.raises(RuntimeError), claimed(tmp_path / "runs" / "run"):
        (tmp_path / "runs" / "run" / "metrics.jsonl").touch()
        raise RuntimeError
    assert sorted((tmp_path / "runs").rglob("*")) == [tmp_path / "runs" / "run", tmp_path / "runs/run/metrics.jsonl"]


def test_a_claim_holds_until_its_file_is_closed(tmp_path: Path) -> None:
    with claimed(tmp_path / "run") as lock:
        pass
    with pytest.raises(ValueError, match="run: another process is running there"), claimed(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / ".lock").exists()
    lock.close()
    with claimed(tmp_path / "run") as lock:
        lock.close()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; give another"), claimed(tmp_path / "file" / "run"):
        pass


def test_an_interrupt_while_torch_is_imported_has_nothing_to_save(tiny_model_dir: Path, tmp_path: Path) -> None:
    command = command_line(one_problem(tiny_model_dir, tmp_path), tmp_path / "run")
    probe = """if True:
        import runpy, signal, sys
        class Interrupt:
            def find_spec(self, name, *_):
                if name == "torch" and signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Interrupt())
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    done = subprocess.run([sys.executable, "-c", probe, *command[1:]], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == Status.STOPPED_BY_SIGNAL
    assert done.stderr.splitlines()[-1].startswith("stopped by SIGINT while loading: ")
    assert "nothing was saved" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_resume_says_what_it_found() -> None:
    folder = Path("runs/a")
    assert what_resume_found(folder, 0, 8) == "no checkpoint in runs/a yet: starting from the beginning"
    assert "runs/a held NO RUN: a new one starts from the beginning" in what_resume_found(folder, 0, 8, held_run=False)
    assert what_resume_found(folder, 3, 8) == "resuming after GRPO step 3 of 8"
    done = what_resume_found(folder, 8, 8)
    assert done.startswith("runs/a holds a run that has done 8 of 8 GRPO steps: nothing is left to train")
    assert "to run it again, delete that folder or set another paths.output_dir" in done


def test_a_bad_row_is_named_by_file_and_line(tiny_model_dir: Path, tmp_path: Path) -> None:
    one_problem(tiny_model_dir, tmp_path)
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1=?", "answer": "2"}\n{"problem": "2+2=?"}\n')
    done = train(tmp_path, tmp_path / "run")
    assert done.returncode == 2
    assert f"{tmp_path}/train.jsonl:2: no `answer`" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "prompt", "reward_fn"), [("math", "r1_zero", "r1_zero"), ("gsm8k", "question_only", "gsm8k")]
)
def test_real_problems_flow_through_a_whole_step(
    shared_dir: Path, tiny_model_dir: Path, tmp_path: Path, data: str, prompt: str, reward_fn: str
) -> None:
    files = {"math": ("train", "validation"), "gsm8k": ("train", "test")}[data]
    (tmp_path / "model").symlink_to(tiny_model_dir)
    for name, source in zip(("train", "validation"), files, strict=True):
        lines = (shared_dir / "data" / data / f"{source}.jsonl").read_text().splitlines()[:40]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    small = (
        "training.n_grpo_steps=1", "training.rollout_batch_size=8", "training.train_batch_size=8",
        "training.group_size=4", "training.max_val_examples=8", "training.max_tokens=24", "training.stop=[]",
        f"paths.prompt_template_file={ROOT}/data/{prompt}.prompt", f"training.reward_fn={reward_fn}",
    )  # fmt: skip
    done = train(tmp_path, tmp_path / "run", *small)
    assert done.returncode == 0, done.stderr
    (step,) = [row for row in rows(tmp_path / "run") if "grpo_step" in row]
    assert step["train/frac_zero_std_groups"] == 1.0  # random weights solve nothing
    rollouts = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    truths = [json.loads(line)["answer"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert all(any(truth.endswith(row["truth"]) for truth in truths) for row in rollouts if row["split"] == "train")


def test_a_folder_that_is_not_there_is_no_name_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    assert [is_local(path) for path in ("data/nope", "./nope", "a/b/c", "Qwen/Qwen2.5-Math-1.5B", "gpt2")] == [
        True,
        True,
        True,
        False,
        False,
    ]

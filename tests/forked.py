"""Commands in a fork of the test's own process: it has imported torch already, which costs a new Python five seconds.

`run` stands in for `subprocess.run` where a test is about what a command does. What a command imports, and what it does
before torch is there, needs a Python of its own. That the whole command starts from nothing and trains the same is
tested by test_resume.py (in a terminal that closes) and by the Makefile's targets.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401
from transformers.utils.logging import disable_progress_bar

import train_grpo  # noqa: F401
import utils.plots.figures
import utils.run.build  # noqa: F401 (forked processes then need not import it)

disable_progress_bar()  # its lock is shared with forked processes: one killed while it holds it blocks all others


def write_to(output: io.IOBase, errors: io.IOBase) -> None:
    """In a fork: standard output and standard error go to these files, and are no longer pytest's."""
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


def run(
    command: Sequence[object],
    *,
    input: str = "",
    cwd: Path | str | None = None,
    env: dict[str, str] | None = None,
    **_captured: object,
) -> subprocess.CompletedProcess:
    """What `subprocess.run(command, capture_output=True, text=True)` returns, for a Python script and its arguments."""
    text = tempfile.TemporaryFile
    with text("w+") as output, text("w+") as errors, text("w+") as typed:
        typed.write(input)
        typed.seek(0)

        def child() -> None:
            os.setsid()
            write_to(output, errors)
            os.dup2(typed.fileno(), 0)
            sys.stdin = os.fdopen(0)
            torch.set_num_threads(1)
            os.chdir(cwd or Path.cwd())
            if env is not None:
                os.environ.clear()
                os.environ.update(env)
            sys.argv = [str(word) for word in command[1:]]
            sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
            runpy.run_path(sys.argv[0], run_name="__main__")

        assert command[0] == sys.executable
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join()
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, process.exitcode, output.read(), errors.read())

"""Commands in a fork of the test's own process: it has imported torch already, which costs a new Python five seconds.

`Popen` and `run` stand in for those of `subprocess` where a test is about what a command does. What a command imports,
and what it does before torch is there, needs a Python of its own. That the whole command starts from nothing and trains
the same is tested by test_resume.py, in a terminal that closes.
"""

from __future__ import annotations

import inspect
import io
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: F401
from transformers.utils.logging import disable_progress_bar

import train_grpo  # noqa: F401
import utils.plots.figures
import utils.run.build  # noqa: F401 (forked processes then need not import it)

disable_progress_bar()  # its lock is shared with forked processes: one killed while it holds it blocks all others
HOW_TO_START = inspect.signature(subprocess.Popen._execute_child)
PIPE_ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
in_new_python = subprocess.Popen


def write_to(output: io.IOBase, errors: io.IOBase) -> None:
    """In a fork: standard output and standard error go to these files, and are no longer pytest's."""
    os.dup2(output.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)


class Popen(in_new_python):
    """`subprocess.Popen` of a Python script and its arguments, but that the script runs in a fork of this process."""

    def _execute_child(self, *arguments: Any, **named: Any) -> None:
        options = HOW_TO_START.bind(self, *arguments, **named).arguments
        self.pid = os.fork()
        if self.pid == 0:
            _become(options)
        self._child_created = True
        self._close_pipe_fds(*(options[name] for name in PIPE_ENDS))


def _become(options: dict[str, Any]) -> NoReturn:
    """In the fork: be the script, and end as Python would end with it."""
    status = 1
    try:
        own = (options["p2cread"], options["c2pwrite"], options["errwrite"])
        for end in (options["p2cwrite"], options["c2pread"], options["errread"]):
            if end != -1:
                os.close(end)
        for end, place in zip(own, range(3), strict=True):
            if end != -1:
                os.dup2(end, place)
        if options["start_new_session"]:
            os.setsid()
        sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        if options["env"] is not None:
            os.environ.clear()
            os.environ.update(options["env"])
        os.chdir(options["cwd"] or Path.cwd())
        assert options["args"][0] == sys.executable
        sys.argv = list(map(str, options["args"][1:]))
        sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except Exception:  # noqa: BLE001 (whatever the script raises)
        traceback.print_exc()
    finally:
        threading._shutdown()  # waits for the script's threads
        sys.stdout.flush()
        os._exit(status)  # without what pytest does at its end


def popen_of(*scripts: str) -> Callable[..., in_new_python]:
    """To put in the place of `subprocess.Popen`: scripts of these names are forked, whoever starts them."""

    def popen(command: Sequence[object], **options: Any) -> in_new_python:
        is_forked = command[0] == sys.executable and Path(command[1]).name in scripts
        return (Popen if is_forked else in_new_python)(command, **options)

    return popen


def run(command: Sequence[object], *, input: str = "", **options: Any) -> subprocess.CompletedProcess:
    """`subprocess.run(command, capture_output=True, text=True)`, in a fork."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with Popen(command, **pipes, text=True, **options) as process:
        output, errors = process.communicate(input)
    return subprocess.CompletedProcess(command, process.returncode, output, errors)

"""Fixtures that several test files share."""

from __future__ import annotations

import os

# Before torch is imported: spinning OpenMP threads slow everything down as soon as another process is busy.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two threads of a fork that load weights at once may both build torch's thread pool anew, which then refuses both.
os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings

from utils import tiny

# No deadline: a busy machine is no bug. The same examples for everybody; HYPOTHESIS_PROFILE=explore asks for others.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: at the end of a parallel run no process then waits long for another's last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills, once for all processes of pytest-xdist. Treat it as read-only."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, done = root / name, root / f"{name}.done"
    with FileLock(root / f"{name}.lock"):
        if not done.exists():
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a randomly initialised tiny Qwen2 checkpoint (float32) and its tokenizer."""

    def make(folder: Path) -> None:
        tiny.build_model(seed=0).save_pretrained(folder)
        tiny.build_tokenizer().save_pretrained(folder)

    return made_once(tmp_path_factory, "tiny_model", make)


@pytest.fixture(scope="session")
def one_layer_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `tiny_model_dir`, with one layer: for what is compiled, which takes seconds per layer."""

    def make(folder: Path) -> None:
        tiny.build_model(seed=0, n_layers=1).save_pretrained(folder)
        tiny.build_tokenizer().save_pretrained(folder)

    return made_once(tmp_path_factory, "one_layer_model", make)


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as play-scripts/make_tiny.py makes it."""
    import forked

    script = Path(__file__).parents[1] / "play-scripts" / "make_tiny.py"

    def make(folder: Path) -> None:
        forked.run([sys.executable, script, "--output", folder]).check_returncode()

    return made_once(tmp_path_factory, "tiny_world", make)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the runs of run_cases.py read."""
    from run_cases import make_world

    return made_once(tmp_path_factory, "world", make_world)


@pytest.fixture(scope="session")
def reference(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a run of run_cases.py that nothing disturbed."""
    from run_cases import N_STEPS, arguments, finish, trained_steps

    def make(folder: Path) -> None:
        assert finish(arguments(world, folder / "run")) == 0
        assert trained_steps(folder / "run") == list(range(1, N_STEPS + 1))

    return made_once(tmp_path_factory, "reference", make) / "run"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder `shared/` beside the repository, which holds MATH and GSM8K; skips where there is none."""
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("no shared/data beside the repository")
    return folder


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a test marked `own_process` in a pytest of its own, where Triton keeps float32 as it is."""
    if pyfuncitem.get_closest_marker("own_process") is None or os.environ.get("PYTEST_OWN_PROCESS"):
        return None
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", pyfuncitem.nodeid],
        cwd=pyfuncitem.config.rootpath,
        env=os.environ | {"PYTEST_OWN_PROCESS": "1", "TRITON_F32_DEFAULT": "ieee"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return True

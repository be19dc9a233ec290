"""The Modal app, as far as it goes without an account: its commands here, its functions called in this process."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).parents[2]
pytest.importorskip("modal")
sys.path.insert(0, str(ROOT / "tests" / "ablations"))
from place_cases import Volume  # noqa: E402

CONFIGS = ["--config", f"{ROOT}/configs/math.yaml", "--config", f"{ROOT}/configs/hardware/h100.yaml"]


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The module, with folders in place of its volumes."""
    spec = importlib.util.spec_from_file_location("modal_app", ROOT / "play-scripts" / "modal_app.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "modal_app", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "results", Volume(tmp_path / "cloud" / "runs"))
    monkeypatch.setattr(
        module.place.ModalPlace, "obstacles", lambda self, launch: module.place.misplaced(launch.config)
    )
    monkeypatch.chdir(tmp_path)
    return module


class Calls:
    """In place of the function that trains."""

    def __init__(self) -> None:
        self.options: dict = {}
        self.arguments: dict = {}

    def with_options(self, **options: object) -> Calls:
        self.options = options
        return self

    def spawn(self, **arguments: object) -> SimpleNamespace:
        self.arguments = arguments
        return SimpleNamespace(object_id="fc-1", get=lambda: (0, 1800.0))


@pytest.fixture
def calls(app: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    calls = Calls()
    monkeypatch.setattr(app, "train_run", calls)
    (tmp_path / "cloud" / "runs").mkdir(parents=True)
    for name in ("train.jsonl", "validation.jsonl"):
        (tmp_path / "data" / "math").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "math" / name).touch()
    return calls


def train(app: ModuleType, *words: str) -> object:
    """What the entry point does with the words of its command; its exit status, None if it does not wait."""
    try:
        app.train.info.raw_f(*words)
    except SystemExit as end:
        return end.code
    return None


def test_train_is_called_with_what_the_config_sets_and_says_what_it_cost(
    app: ModuleType, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(app, *CONFIGS, "training.seed=7") == 0
    printed = capsys.readouterr().out
    # 200 steps of 30 s, and half an hour in the end, at $3.95 per hour
    assert "estimate: 1.7 hours, about $6.58" in printed
    assert "0.50 hours, about $1.98 at $3.95 per hour" in printed
    assert calls.options == {"gpu": "H100", "timeout": 24 * 3600}
    assert calls.arguments["folder"] == "runs/math"
    assert "seed: 7" in calls.arguments["settings"]
    assert "group_size" not in calls.arguments["settings"]  # what nothing sets may be derived from the card there
    assert calls.arguments["source"].keys() == {"commit", "dirty"}
    assert train(app, *CONFIGS, "--spawn", "--gpu", "L40S", "elsewhere.timeout_hours=2") is None
    assert calls.options == {"gpu": "L40S", "timeout": 2 * 3600}
    assert "running on Modal as call fc-1, on L40S" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["paths.output_dir=results/math"], "outside the volume"),
        (["training.sede=1"], "training.seed"),
        (["paths.output_dir=runs/taken"], "is taken on the volume"),
    ],
)
def test_mistakes_start_nothing(
    app: ModuleType, calls: Calls, words: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = app.results.folder / "taken"
    taken.mkdir()
    (taken / "config.yaml").touch()
    assert train(app, *CONFIGS, *words) == 2
    assert complaint in capsys.readouterr().err
    assert not calls.arguments
    assert train(app, *CONFIGS, "paths.output_dir=runs/taken", "--resume", "--spawn") is None


def test_the_function_runs_train_grpo_and_passes_requests_to_stop_on(
    app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def run_in_container(folder: Path, *rest: object) -> tuple[int, float]:
        settings, hours, max_hours, env, n_stops, commit = rest
        seen.extend([folder, settings, hours, max_hours, json.loads(env["GRPO_SOURCE"]), n_stops(), commit()])
        return 3, 1.0

    monkeypatch.setattr(app, "run_in_container", run_in_container)
    monkeypatch.setattr(app.modal.Dict, "from_name", lambda name, create_if_missing: {"sweep/a": 1})
    monkeypatch.setattr(app, "results", SimpleNamespace(reload=lambda: seen.append("reload"), commit=lambda: "kept"))
    source = {"commit": "abc", "dirty": False}
    with pytest.warns(UserWarning, match="mounted Volume"):
        assert app.train_run.local("runs/sweep/a", "text", 24.0, None, source) == (3, 1.0)
    assert seen == ["reload", Path("runs/sweep/a"), "text", 24.0, None, source, 1, "kept"]


def test_pull_brings_every_run_of_a_folder_back(app: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in ("seed_1", "seed_2"):
        checkpoint = app.results.folder / "sweep" / "a" / seed / "checkpoints" / "step_000004"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_text(seed)
        (checkpoint / "trainer_state.json").write_text('{"is_best": true}')
        for name in ("config.yaml", "metrics.jsonl"):
            (checkpoint.parents[1] / name).write_text(name)
    assert app.pull(["sweep"]) == 0
    run = Path("runs", "sweep", "a", "seed_2")
    assert (run / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert not (run / "checkpoints").exists()
    assert app.pull(["sweep/a/seed_2", "--checkpoints"]) == 0
    assert (run / "checkpoints" / "step_000004" / "weights").read_text() == "seed_2"
    for name in ("best", "last"):
        assert (run / "checkpoints" / name).resolve().name == "step_000004"
    assert app.pull(["other"]) == 2
    assert "no run other" in capsys.readouterr().err
    (run / "run.json").write_text('{"launches": [{"started": "here"}]}')
    assert app.pull(["sweep"]) == 2
    assert "holds another run" in capsys.readouterr().err


def test_upload_puts_a_folder_where_the_container_looks_for_it(
    app: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = []

    class Batch:
        def __enter__(self) -> Batch:
            return self

        def __exit__(self, *_: object) -> None: ...

        def put_directory(self, local: str, target: str) -> None:
            put.append((local, target))

        put_file = put_directory

    volume = SimpleNamespace(batch_upload=lambda force: Batch())
    for name in ("data", "results"):
        monkeypatch.setattr(app, name, volume)
    for folder in ("data/math", "runs/sft/step_10"):
        (tmp_path / folder).mkdir(parents=True)
    for path in ("data", "data/math", "runs/sft/step_10"):
        app.upload_data.info.raw_f(path)
    assert put == [("data", "/"), ("data/math", "/math"), ("runs/sft/step_10", "/sft/step_10")]
    for path in ("docs", "data/none", ""):
        with pytest.raises(SystemExit) as exit_:
            app.upload_data.info.raw_f(path)
        assert exit_.value.code == 2 and "give what exists" in capsys.readouterr().err

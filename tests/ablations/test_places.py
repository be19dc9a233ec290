"""Places other than this machine: what they refuse, and a Modal that is a folder and threads of this machine."""

from __future__ import annotations

import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from place_cases import ConnectionFailed, FakeModal, FunctionTimeoutError, ResourceExhaustedError

from utils.ablations.estimate import estimate, used
from utils.ablations.jobs import Job, check_place, find_topics, finish, plan
from utils.ablations.places import container, find_place, ray, worker
from utils.ablations.places import modal as modal_place
from utils.ablations.places.container import TimeIsUp, run_in_container
from utils.ablations.places.place import Ending
from utils.ablations.places.worker import RunOnWorker
from utils.log.files import SOURCE_VARIABLE, git_state
from utils.preflight.config import save_config

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "play-scripts" / "run_ablations.py"
MODEL = "owner/model"
# Plays what the rate in its settings says; what it has done by then it finds in its folder, as a run that is resumed.
TRAINER = """
import json, os, signal, sys, time, yaml
from pathlib import Path
settings = next(word.split("=", 1)[1] for word in sys.argv if word.startswith("--config="))
config = yaml.safe_load(Path(settings).read_text())
folder = Path(config["paths"]["output_dir"])
role = {1: "finishes", 2: "sleeps", 3: "runs out", 4: "mistake"}[config["training"]["learning_rate"]]
Path(folder, "config.yaml").write_text(Path(settings).read_text())
done = len(Path(folder, "metrics.jsonl").read_text().splitlines()) if Path(folder, "metrics.jsonl").exists() else 0
print("launched after", done, [word for word in sys.argv if "max_hours" in word], os.environ["GRPO_SOURCE"], flush=True)
def end(status, code):
    Path(folder, "status.json").write_text(json.dumps({"status": status, "grpo_step": done}))
    sys.exit(code)
signal.signal(signal.SIGINT, lambda *_: end("interrupted", 4))
while done < 4:
    done += 1
    with Path(folder, "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"grpo_step": done, "time": float(done), "eval/reward": 0.5}) + chr(10))
    checkpoint = folder / "checkpoints" / f"step_{done:06d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_text("large")
    if role == "mistake":
        print("error: no such thing")
        sys.exit(2)
    if role == "runs out" and done == 2:
        end("time_limit", 5)
    if role == "sleeps" and done == 2:
        print("asleep", flush=True)
        time.sleep(600)
end("finished", 0)
"""
CONFIG = """
paths: {{train_data_file: data/train.jsonl, val_data_file: data/train.jsonl, prompt_template_file: data/prompt,
         model_path: owner/model}}
training: {{n_grpo_steps: 4, learning_rate: {role}, use_bnb_adamw8bit: false}}
elsewhere: {{seconds_per_step: 90, price_per_hour: 4}}
"""
ROLES = {"finishes": 1, "sleeps": 2, "runs_out": 3, "mistake": 4}


@pytest.fixture
def trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "trainer.py"
    path.write_text(TRAINER)
    for module in (container, worker):
        monkeypatch.setattr(module, "TRAIN", path)
    monkeypatch.setattr(container, "POLL_SECONDS", 0.02)
    return path


@pytest.fixture
def here(tmp_path: Path, trainer: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the user runs from."""
    here = tmp_path / "here"
    (here / "data").mkdir(parents=True)
    (here / "data" / "train.jsonl").write_text('{"problem": "1+1=?", "answer": "2"}\n')
    (here / "data" / "prompt").write_text("{question}")
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def cloud(tmp_path: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> FakeModal:
    """A Modal whose containers start in a folder of their own, where its volumes are mounted."""
    root = tmp_path / "cloud"

    def train_run(folder: str, settings: str, hours: float, max_hours: float | None, source: dict) -> tuple[int, float]:
        def in_container(*arguments: object) -> subprocess.Popen:
            command, inside, env, *_ = arguments
            return worker.start_process(command, inside, env, cwd=root)

        monkeypatch.setattr(container, "start_process", lambda *a, **_: in_container(*a))
        env = {SOURCE_VARIABLE: json.dumps(source)}
        key = folder.removeprefix("runs/")
        return run_in_container(
            root / folder, settings, hours, max_hours, env, lambda: cloud.stops.get(key, 0), lambda: None
        )

    cloud = FakeModal(root, train_run)
    for path in ("data/train.jsonl", "data/prompt", "models/hub/models--owner--model/config.json"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text("{}")
    monkeypatch.setitem(sys.modules, "modal", cloud)
    monkeypatch.setattr(modal_place, "SYNC_SECONDS", 0.05)
    monkeypatch.setattr(modal_place, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name)))
    monkeypatch.setattr(modal_place.ModalPlace, "_deployed", cloud)
    return cloud


def add(here: Path, *roles: str) -> None:
    (here / "configs" / "roles").mkdir(parents=True, exist_ok=True)
    for role in roles:
        (here / "configs" / "roles" / f"{role}.yaml").write_text(CONFIG.format(role=ROLES[role]))


def main(*words: str) -> int:
    return runpy.run_path(str(SCRIPT))["main"](list(words))


def jobs_of(*words: str) -> list[Job]:
    return plan(find_topics(["configs/roles"]), 1, [], words, Path("runs"))


def states(printed: str) -> list[tuple[str, ...]]:
    return [tuple(line.split()[:2]) for line in printed.splitlines() if "roles/" in line and "seed" in line]


def rows(path: Path) -> list[int]:
    return [json.loads(line)["grpo_step"] for line in path.read_text().splitlines()]


def test_runs_on_modal_end_with_a_report_and_what_they_cost(
    here: Path, cloud: FakeModal, capsys: pytest.CaptureFixture[str]
) -> None:
    add(here, "finishes", "mistake", "runs_out")
    assert main("configs/roles", "--on", "modal", "elsewhere.gpu=L40S") == 1
    printed = capsys.readouterr().out
    first = printed.splitlines()[0]
    # three runs of four steps of 90 s: 0.3 hours at $4
    assert all(word in first for word in ("3 runs with 12 GRPO steps", "0.3 hours", "$1.20 at $4.00 per hour"))
    assert {("finished", "roles/finishes"), ("failed", "roles/mistake"), ("finished", "roles/runs_out")} <= set(
        states(printed)
    )
    assert "exit status 2: error: no such thing" in printed
    assert "used: 0.00 hours of machines, about $0.0" in printed
    for role in ("finishes", "runs_out"):
        folder = here / "runs" / "roles" / role / "seed_1337"
        assert rows(folder / "metrics.jsonl") == [1, 2, 3, 4]
        assert not (folder / "checkpoints").exists()
        assert not (folder / modal_place.CALL_FILE).exists()
        assert (cloud.root / folder.relative_to(here) / "checkpoints" / "step_000004").is_dir()
    console = (here / "runs" / "roles" / "runs_out" / "seed_1337" / "console.log").read_text()
    # 24 hours, of which a quarter is kept for the end; a second container goes on
    assert [line.split("[")[0] for line in console.splitlines()] == ["launched after 0 ", "launched after 2 "]
    assert "training.max_hours=23.75" in console
    assert json.dumps(git_state(ROOT)) in console
    assert cloud.options == [{"gpu": "L40S", "timeout": 24 * 3600}] * 3
    assert (here / "results" / "roles" / "README.md").exists()

    assert main("configs/roles", "--on", "modal", "--estimate") == 0
    assert "2 of 3 runs have ended already" in capsys.readouterr().out
    assert len(cloud.calls) == 3


def test_a_call_that_outlives_the_runner_is_found_again(
    here: Path, cloud: FakeModal, capsys: pytest.CaptureFixture[str]
) -> None:
    add(here, "sleeps")
    (job,) = jobs_of()
    place = find_place("modal")
    job.folder.mkdir(parents=True)
    job.work = place.start(job.launch)
    wait_for(lambda: (job.folder / "console.log").exists() and "asleep" in (job.folder / "console.log").read_text())
    with pytest.raises(ValueError, match="another process"):  # the folder is claimed meanwhile
        from utils.log.output import claimed

        with claimed(job.folder):
            pass
    call = json.loads((job.folder / modal_place.CALL_FILE).read_text())["call"]
    again = modal_place.ModalWork.__new__(modal_place.ModalWork)
    again.place, again.modal, again.launch = place, cloud, job.launch
    assert again._earlier_call() is cloud.calls[call]
    job.work.interrupt()
    wait_for(lambda: job.work.poll() is not None)
    finish(job, job.work.poll(), retries=2)
    assert job.state == "interrupted"
    assert json.loads((job.folder / "status.json").read_text())["grpo_step"] == 2
    assert len(cloud.calls) == 1


def test_what_modal_refuses_is_a_line_and_names_the_run(
    here: Path, cloud: FakeModal, capsys: pytest.CaptureFixture[str]
) -> None:
    add(here, "finishes")
    cloud.refusal = ResourceExhaustedError("GPU limit reached")
    assert main("configs/roles", "--on", "modal") == 1
    printed = capsys.readouterr().out
    assert "failed      roles/finishes seed 1337: a quota is used up" in printed
    assert "GPU limit reached" in printed
    cloud.refusal = None
    cloud.function = lambda **_: (_ for _ in ()).throw(FunctionTimeoutError("24 hours"))
    assert main("configs/roles", "--on", "modal", "--retries", "1") == 1
    assert [state for state, _ in states(capsys.readouterr().out)] == ["running", "cut_off", "running", "failed"]


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--runs", "elsewhere"], ("finishes.yaml", "paths.output_dir", "outside the volume", "--runs")),
        (["paths.train_data_file=other.jsonl"], ("paths.train_data_file = 'other.jsonl' is on no volume", "data/")),
        (["paths.val_data_file=data/none.jsonl"], ("data/none.jsonl", "upload_data")),
        (["paths.model_path=owner/none"], ("owner/none", "setup_model --model owner/none")),
        (["paths.model_path=./model"], ("paths.model_path = 'model' is on no volume",)),
        (["training.reward_fn=own.py:reward"], ("own.py", "on no volume")),
        (["elsewhere.secrets=[huggingface]"], ("'huggingface'", "modal secret create huggingface")),
        (["training.wandb_project=sums"], ("WANDB_API_KEY", "elsewhere.secrets")),
        (["training.trackers=[tensorboard,trackio]"], ("trackio", "TRACKIO_SPACE_ID", "elsewhere.secrets")),
        (["training.max_hours=23.8"], ("training.max_hours = 23.8", "23.75")),
        (["training.device=cpu"], ("training.device", "idle")),
    ],
)
def test_what_would_fail_on_modal_is_said_before_anything_starts(
    here: Path, cloud: FakeModal, capsys: pytest.CaptureFixture[str], words: list[str], complaint: tuple[str, ...]
) -> None:
    add(here, "finishes")
    (here / "own.py").write_text("def reward(rollout): return 1.0")
    assert main("configs/roles", "--on", "modal", *words) == 2
    printed = capsys.readouterr()
    assert all(word in printed.err for word in complaint), printed.err
    assert "estimate: 1 run" in printed.out
    assert not cloud.calls


def test_a_run_that_is_here_alone_is_not_written_over(
    here: Path, cloud: FakeModal, capsys: pytest.CaptureFixture[str]
) -> None:
    add(here, "finishes")
    (job,) = jobs_of()
    save_config(job.config, make(job.folder) / "config.yaml")
    (job.folder / "metrics.jsonl").write_text('{"grpo_step": 1, "time": 1.0}\n')
    (job.folder / "run.json").write_text('{"launches": [{"started": "then"}]}')
    assert main("configs/roles", "--on", "modal") == 2
    assert "is not the one on Modal" in capsys.readouterr().err and not cloud.calls
    there = make(cloud.root / job.folder)
    for started, is_other in (("now", True), ("then", False)):
        (there / "run.json").write_text(json.dumps({"launches": [{"started": started}, {"started": "later"}]}))
        assert bool(list(find_place("modal").obstacles(job.launch))) is is_other


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_a_call_that_cannot_be_asked_for_is_not_started_twice(here: Path, cloud: FakeModal) -> None:
    add(here, "finishes")
    (job,) = jobs_of()
    (make(job.folder) / modal_place.CALL_FILE).write_text('{"call": "fc-1"}')
    with pytest.raises(ValueError, match="may be running on Modal"):
        check_place([job], find_place("local"))
    answers = iter([ConnectionFailed("no network"), TimeIsUp("saved"), FunctionTimeoutError("24 hours")])
    cloud.FunctionCall.from_id = lambda call_id: (_ for _ in ()).throw(next(answers))
    work = modal_place.ModalWork.__new__(modal_place.ModalWork)
    work.modal, work.launch = cloud, job.launch
    with pytest.raises(ConnectionFailed):
        work._earlier_call()
    assert work._earlier_call() is work._earlier_call() is None


def test_the_modal_app_without_modal_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "modal", None)
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "play-scripts" / "modal_app.py"))
    assert exit_.value.code == 2 and ".[modal]" in capsys.readouterr().err


def test_no_login_to_modal(here: Path, cloud: FakeModal, capsys: pytest.CaptureFixture[str]) -> None:
    add(here, "finishes")
    cloud.no_login = True
    assert main("configs/roles", "--on", "modal") == 2
    assert "modal token new" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("slurm", "choose local, ray, ray:ADDRESS or modal"),
        ("modal:there", "choose local"),
        ("ray", r"pip install -e \"\.\[ray\]\""),
        ("modal", r"pip install -e \"\.\[modal\]\""),
    ],
)
def test_places_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, name: str, complaint: str) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ValueError, match=complaint):
        find_place(name)


def test_an_address_that_does_not_answer() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and not listening
        with pytest.raises(ValueError, match="does not answer"):
            ray.check_answers(f"127.0.0.1:{taken.getsockname()[1]}")
        taken.listen()
        ray.check_answers(f"ray://127.0.0.1:{taken.getsockname()[1]}")
    with pytest.raises(ValueError, match="host:port"):
        ray.check_answers("head")


def test_how_many_runs_a_node_holds() -> None:
    def launch(device: str, gpus: float) -> SimpleNamespace:
        config = SimpleNamespace(
            training=SimpleNamespace(device=device), elsewhere=SimpleNamespace(ray_gpus=gpus, ray_cpus=2.0)
        )
        return SimpleNamespace(config=config)

    node = {"CPU": 16.0, "GPU": 2.0}
    assert ray.fitting(node, ray.needed(launch("cuda:0", 1.0))) == 2
    assert ray.fitting(node, ray.needed(launch("cuda:0", 0.1))) == 8  # the cores are used up
    assert ray.fitting(node, ray.needed(launch("cuda:0", 4.0))) == 0
    assert ray.fitting(node, ray.needed(launch("cpu", 1.0))) == 8
    assert ray.fitting({"CPU": 16.0}, ray.needed(launch("cuda:0", 0.5))) == 0


def test_the_container_that_is_taken_away_saves_first(here: Path) -> None:
    folder = Path("runs/a")
    add(here, "sleeps")
    settings = jobs_of("paths.output_dir=runs/a")[0].settings.replace("runs/roles/sleeps/seed_1337", "runs/a")
    commits: list[int] = []
    before = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # what a shell starts in the background ignores it

    def take_away() -> int:
        if "asleep" in (folder / "console.log").read_text():
            os.kill(os.getpid(), signal.SIGINT)  # as Modal does, seconds before the end
        return 0

    try:
        with pytest.raises(KeyboardInterrupt):
            run_in_container(folder, settings, 24.0, 1.0, {SOURCE_VARIABLE: "{}"}, take_away, lambda: commits.append(1))
    finally:
        signal.signal(signal.SIGINT, before)
    assert json.loads((folder / "status.json").read_text()) == {"status": "interrupted", "grpo_step": 2}
    assert commits == [1]
    assert "max_hours" not in (folder / "console.log").read_text().replace("[]", "")  # the user's hour is shorter


def test_the_end_of_the_containers_time_is_told_from_the_end_of_the_users(here: Path) -> None:
    add(here, "runs_out")
    for hours, max_hours, is_ours in ((2.0, None, True), (2.0, 3.0, True), (2.0, 1.0, False)):
        (job,) = jobs_of(f"paths.model_path=x{hours}{max_hours}/y")
        folder = Path("runs") / f"{hours}_{max_hours}"
        settings = job.settings.replace(str(job.folder), str(folder))
        arguments = (folder, settings, hours, max_hours, {SOURCE_VARIABLE: "{}"}, lambda: 0, lambda: None)
        if is_ours:
            with pytest.raises(TimeIsUp):
                run_in_container(*arguments)
        else:
            assert run_in_container(*arguments)[0] == 5


def test_a_worker_keeps_its_files_apart_and_its_run_dies_with_it(here: Path, tmp_path: Path) -> None:
    add(here, "sleeps")
    (job,) = jobs_of()
    code = f"""
import sys, time
from pathlib import Path
from utils.ablations.places import worker
worker.TRAIN = Path({str(tmp_path / "trainer.py")!r})
run = worker.RunOnWorker({{"GRPO_SOURCE": "{{}}"}})
run.open({str(job.folder)!r})
run.start(sys.stdin.read())
print(run.process.pid, run.work, flush=True)
time.sleep(600)
"""
    host = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    host.stdin.write(job.settings)
    host.stdin.close()
    pid, work = host.stdout.readline().split()
    wait_for(lambda: "asleep" in (Path(work) / job.folder / "console.log").read_text())
    host.kill()
    host.wait()
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text())
    assert not (here / "runs").exists()


def test_a_worker_receives_files_and_refuses_others() -> None:
    run = RunOnWorker({})
    try:
        run.receive("data/a", 0, b"abc")
        run.receive("data/a", 3, b"de")
        run.receive_link("data/last", "a")
        assert (run.work / "data" / "last").read_bytes() == b"abcde"
        with pytest.raises(AssertionError):
            run.receive("../a", 0, b"")
    finally:
        run.clear()
    assert not run.work.exists()


def test_a_run_that_is_cut_off_is_retried_while_it_gets_further(here: Path) -> None:
    add(here, "finishes")
    (job,) = jobs_of()
    job.folder.mkdir(parents=True)
    seen = []
    for steps in (1, 1, 2, 2, 2):
        lines = [json.dumps({"grpo_step": i + 1, "time": float(i)}) + "\n" for i in range(steps)]
        (job.folder / "metrics.jsonl").write_text("".join(lines))
        finish(job, Ending(None, "the worker was lost", 2.0, lost=True), retries=2)
        seen.append(job.state)
    # the second step is reached after two losses, and counts anew
    assert seen == ["cut_off", "cut_off", "cut_off", "cut_off", "failed"]
    assert job.seconds == 10.0
    finish(job, Ending(-signal.SIGKILL), retries=9)
    assert job.state == "cut_off"
    for ending in (Ending(1), Ending(None, "no quota")):
        finish(job, ending, retries=9)
        assert job.state == "failed"


def test_estimate_by_hand(here: Path) -> None:
    add(here, "finishes", "mistake")
    jobs = jobs_of()
    assert estimate(jobs, 1).startswith("estimate: 2 runs with 8 GRPO steps, 0.2 hours")
    assert "give elsewhere.seconds_per_step" in estimate(jobs_of("elsewhere.seconds_per_step=null"), 1)
    jobs[0].folder.mkdir(parents=True)
    rows = [{"grpo_step": i, "time": 3600.0 * i} for i in (1, 2)]
    (jobs[0].folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # two steps left at an hour each, and four of 90 s; the longest run alone takes two hours
    line = estimate(jobs, 2)
    assert all(word in line for word in ("2 runs with 6 GRPO steps, 2.1 hours", "$8.40", "2.0 h with 2 at once"))
    assert "1 by the pace of runs so far, 1 by elsewhere.seconds_per_step" in line
    # an hour each for the four steps of which nothing else tells
    assert "6 GRPO steps, 6.0 hours" in estimate(jobs_of("elsewhere.seconds_per_step=null"), 1)
    assert "$" not in estimate(jobs_of("elsewhere.price_per_hour=null"), 1)
    for job in jobs:
        job.state = "finished"
    assert estimate(jobs, 1) is None
    assert used(jobs) is None
    jobs[0].seconds = 1800.0
    assert used(jobs) == "used: 0.50 hours of machines, about $2.00 at $4.00 per hour"


def wait_for(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        assert time.monotonic() < end
        time.sleep(0.02)

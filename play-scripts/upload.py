"""Put a run, or a folder of runs, on the Hugging Face Hub: checkpoints that others can load, and how they were made.

    python play-scripts/upload.py runs/quickstart --repo owner/name              what would go
    python play-scripts/upload.py runs/quickstart --repo owner/name --upload
    python play-scripts/upload.py runs/lr_sweep --repo owner/lr_sweep --upload --public

What goes: the weights and the tokenizer of the best checkpoint (at the top, so that `from_pretrained("owner/name")`
loads them) and of the last one (in last/), metadata.json (steps, best, config, versions, commit), config.yaml,
metrics.jsonl, the rollouts of the first, the best and the last evaluation, the reward curve, and a model card with the
curve, the command and the evaluation. The runs of a folder go to one repository, each in a folder of its own.

Without --upload nothing is sent. An upload that was cut off goes on with the same command, and what is there already is
not sent again. A repository that holds anything else is refused. The Hub's own client finds the access token (HF_TOKEN,
or `hf auth login`); it is written nowhere, and a config or command that holds one is refused.

Exit status: 0 all is there, or would be; 2 a mistake, or the Hub refused: one line.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from utils.hub.bundle import METADATA_FILE, Part, plan
from utils.hub.facts import SharedRun, add_evaluations, find_runs
from utils.hub.repository import HubError, Repository
from utils.log.output import claimed
from utils.run.ending import Status


def main(arguments: Sequence[str] | None = None) -> Status:
    options = parse_arguments(arguments)
    try:
        repository = Repository(options.repo)
        with contextlib.ExitStack() as claims:
            runs = find_runs(options.folders)
            for run in runs:  # a run that goes on would replace its checkpoints meanwhile
                claims.enter_context(claims.enter_context(claimed(run.folder)))
            add_evaluations(runs, options.evaluation)
            parts = plan(options.repo, runs, figure_of(runs))
            if options.upload:
                upload(repository, parts, private=not options.public)
            else:
                show(repository, parts)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return Status.USER_MISTAKE
    return Status.FINISHED


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, metavar="RUN", help="a run's folder, or folders of runs")
    add("--repo", required=True, metavar="OWNER/NAME", help="the repository, which is made if it is absent")
    add("--evaluation", nargs="+", type=Path, default=[], metavar="FOLDER", help="what evaluate.py --output wrote")
    add("--upload", action="store_true", help="do it; without this, what would go is shown")
    add("--public", action="store_true", help="make a new repository public; without this it is private")
    return parser.parse_args(arguments)


def figure_of(runs: Sequence[SharedRun]) -> bytes | None:
    """The reward curve as PNG, or the curves of several runs; None if no run was evaluated."""
    from utils.plots.figures import draw_figure, reward_curve, save_figure

    try:
        if runs[0].place == ".":
            return reward_curve(runs[0].folder).read_bytes()
        figure, _ = draw_figure({"ours": [run.curves for run in runs]}, ["eval/reward", "train/reward"])
    except ValueError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        return save_figure(figure, Path(folder) / "curves.png")[0].read_bytes()


def show(repository: Repository, parts: Sequence[Part]) -> None:
    """What would go, and what is there already as far as the Hub can be asked. Raises HubError for another's place."""
    try:
        repository.look()
        state = "a new repository" if repository.files is None else "which is there already"
    except HubError as error:
        state = f"which could not be looked at ({error})"
    repository.check_owner(parts[0].files[0].read())
    print(f"{repository.name} on {repository.endpoint}, {state}")
    n_bytes = 0
    for part in parts:
        missing = {file.place for file in repository.missing(part)}
        print(part.title)
        for file in part.files:
            print(f"  {size(file.size):>9}  {file.place}{'' if file.place in missing else '  (there already)'}")
        n_bytes += sum(file.size for file in part.files if file.place in missing)
    print(f"{size(n_bytes)} would be uploaded. Nothing was: add --upload")


def upload(repository: Repository, parts: Sequence[Part], private: bool) -> None:
    """Put there what is missing, a commit per part. Raises HubError; what was put there before stays."""
    assert parts[0].files[0].place == METADATA_FILE
    repository.check_access()
    repository.look()
    repository.check_owner(parts[0].files[0].read())
    if repository.files is None:
        repository.create(private)
    for part in parts:
        missing = repository.missing(part)
        gone = repository.left_over(parts) if part is parts[-1] else []
        if not missing and not gone:
            print(f"there already: {part.title}")
            continue
        print(f"uploading: {part.title} ({size(sum(file.size for file in missing))})", flush=True)
        repository.commit(part.title, missing, gone)
    print(f"all of it is on {repository.endpoint}/{repository.name}")


def size(n_bytes: int) -> str:
    """1,234,567 -> 1.2 MB."""
    for unit in ("B", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}" if unit == "B" else f"{n_bytes:.1f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted; the same command with --upload goes on", file=sys.stderr)
        sys.exit(130)  # as a shell shows SIGINT

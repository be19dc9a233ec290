"""What goes to a repository on the Hub, in the order in which it goes: nothing here knows the network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.hub.card import model_card
from utils.hub.facts import HEADLINE, SharedRun
from utils.log.checkpoints import OPTIMIZER_FILE, STATE_FILE, step_of_checkpoint
from utils.log.files import CONFIG_FILE, METRICS_FILE, ROLLOUTS_FILE, encode_row, read_rows, step_of

METADATA_FILE = "metadata.json"
CARD_FILE = "README.md"
CURVE_FILE = "reward_curve.png"
LEFT_OUT = (OPTIMIZER_FILE, STATE_FILE)  # of a checkpoint: only --resume needs them, and they are twice the weights
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "TRACKIO_WRITE_TOKEN")
LOOKS_LIKE_A_TOKEN = re.compile(rb"hf_[A-Za-z0-9]{30,}")
TEXTS = (".json", ".jsonl", ".yaml", ".md", ".txt", ".jinja")


@dataclass(frozen=True)
class File:
    """A file there, and what is in it: a file here, or bytes."""

    place: str
    content: Path | bytes

    @property
    def size(self) -> int:
        return self.content.stat().st_size if isinstance(self.content, Path) else len(self.content)

    def read(self) -> bytes:
        return self.content.read_bytes() if isinstance(self.content, Path) else self.content


@dataclass(frozen=True)
class Part:
    """Files that are uploaded as one commit. An upload that is cut off goes on with the parts that are missing."""

    title: str
    files: list[File]


def plan(repo: str, runs: Sequence[SharedRun], figure: bytes | None) -> list[Part]:
    """The parts, in order: what describes the runs, each checkpoint, and last the card, which says that all is there.

    Raises ValueError if a text holds an access token.
    """
    about = [File(METADATA_FILE, metadata_of(runs))]
    about += [File(CURVE_FILE, figure)] if figure else []
    parts = [Part("metadata, config, metrics and rollouts", [*about, *(f for run in runs for f in _records(run))])]
    for run in runs:
        for name, (here, there) in run.checkpoints().items():
            of_run = "" if run.place == "." else f" of {run.place}"
            title = f"{name} checkpoint{of_run}, GRPO step {step_of_checkpoint(here)}"
            parts.append(Part(title, list(_checkpoint_files(here, there))))
    card = model_card(repo, runs, CURVE_FILE if figure else None)
    parts.append(Part("model card", [File(CARD_FILE, card.encode(errors="replace"))]))
    files = [file for part in parts for file in part.files]
    for file in sorted(files, key=lambda file: isinstance(file.content, bytes)):  # the source before its copies
        _refuse_tokens(file)
    return parts


def metadata_of(runs: Sequence[SharedRun]) -> bytes:
    return (json.dumps({"runs": {run.place: run.metadata() for run in runs}}, indent=2) + "\n").encode()


def _in(folder: str, name: str) -> str:
    return name if folder == "." else f"{folder}/{name}"


def _records(run: SharedRun) -> Iterator[File]:
    for name in (CONFIG_FILE, METRICS_FILE):
        yield File(_in(run.place, name), run.folder / name)
    if (run.folder / ROLLOUTS_FILE).is_file():
        yield File(_in(run.place, ROLLOUTS_FILE), key_rollouts(run))


def key_rollouts(run: SharedRun) -> bytes:
    """The rollouts that were logged at the first, the best and the last evaluation, which show what was learned."""
    rows, _ = read_rows(run.folder / ROLLOUTS_FILE)
    rows = [row for row in rows if step_of(row) is not None]
    steps = sorted({row["grpo_step"] for row in rows})
    rewards = {step: p.value for step, p in run.curves.curves.get(HEADLINE, {}).items() if p.value == p.value}
    wanted = {steps[0], steps[-1]} if steps else set()
    if rewards:
        wanted.add(max(rewards, key=lambda step: (rewards[step], -step)))
    return "".join(encode_row(row) + "\n" for row in rows if row["grpo_step"] in wanted).encode()


def _checkpoint_files(here: Path, there: str) -> Iterator[File]:
    for path in sorted(here.iterdir()):
        if path.is_file() and path.name not in LEFT_OUT:
            yield File(_in(there, path.name), path)


def _refuse_tokens(file: File) -> None:
    """An access token in a config or a command would be public with it."""
    if not file.place.endswith(TEXTS):
        return
    content = file.read()
    known = [value.encode() for name in SECRETS if (value := os.environ.get(name, ""))]
    if LOOKS_LIKE_A_TOKEN.search(content) or any(secret in content for secret in known):
        source = file.content if isinstance(file.content, Path) else "the run"
        raise ValueError(f"{file.place} would hold an access token; take it out of {source}, and revoke it")

"""published.yaml: what is in it fits the configs, and a slip in it is named by its key."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import yaml

from utils.ablations import published
from utils.ablations.published import Ablation, Claim, find_ablation, is_shipped, load_published
from utils.log.metrics import METRICS
from utils.preflight.config import load_config

ROOT = Path(__file__).parents[2]
FILE = Path(published.__file__).with_suffix(".yaml")
SHARED = {".", "gsm8k", "hardware", "lora", "recipes", "recipes/hardware", "smollm2", "tiny"}  # no ablations
FOLDERS = {path.parent.relative_to(ROOT / "configs").as_posix() for path in ROOT.glob("configs/**/*.yaml")}


@pytest.mark.parametrize("topic", sorted(FOLDERS - SHARED))
def test_every_ablation_has_an_entry_short_configs_and_claims_about_its_own_runs(topic: str) -> None:
    configs = sorted((ROOT / "configs" / topic).glob("*.yaml"))
    names = {path.stem for path in configs}
    for path in configs:
        assert len(path.read_text().splitlines()) <= 8
        assert load_config([path]).paths.output_dir == f"runs/{topic}/{path.stem}"
    assert is_shipped(topic)
    ablation = find_ablation(topic)
    assert 0 < len(ablation.short) <= 100
    mentioned = {claim.run for claim in ablation.claims} | {claim.other for claim in ablation.claims if claim.other}
    if topic != "clip_ablation":  # its on-policy pair is in the tiny suite alone
        assert mentioned <= names
    assert {claim.metric for claim in ablation.claims} | set(ablation.also_drawn) <= set(METRICS)


def write(path: Path, entry: object, **top: object) -> Path:
    path.write_text(yaml.safe_dump({"source": "runs", "ablations": {"lr": entry}} | top))
    return path


def test_entries_are_read_as_they_are_written(tmp_path: Path) -> None:
    claims = [
        {"text": "hot collapses", "run": "1e-4", "relation": "collapses"},
        {"text": "a above b", "run": "a", "relation": "above", "other": "b", "metric": "train/grad_norm"},
    ]
    entry = {"question": "How high?", "claims": claims, "prepare": ["make it"], "also_drawn": ["train/loss"]}
    source, ablations = load_published(write(tmp_path / "p.yaml", entry))
    expected = (Claim("hot collapses", "1e-4", "collapses"), Claim("a above b", "a", "above", "b", "train/grad_norm"))
    assert source == "runs"
    assert ablations == {"lr": Ablation("How high?", "", expected, ("train/loss",), ("make it",))}


@pytest.mark.parametrize(
    ("change", "key", "word"),
    [
        ({"question": None}, "lr.question", "text"),
        ({"qestion": "x"}, "lr.qestion", "question"),
        ({"prepare": "make it"}, "lr.prepare", "list"),
        ({"also_drawn": [1]}, "lr.also_drawn[0]", "text"),
        ({"claims": ["a above b"]}, "lr.claims[0]", "keys"),
        ({"claims": [{"text": "t", "run": 1e-4, "relation": "collapses"}]}, "lr.claims[0].run", "quotes"),
        ({"claims": [{"text": "t", "run": "a", "relation": ">", "other": "b"}]}, "lr.claims[0].relation", "above"),
        ({"claims": [{"text": "t", "run": "a", "relation": "above"}]}, "lr.claims[0].other", "above"),
        ({"claims": [{"text": "t", "run": "a", "relation": "collapses", "other": "b"}]}, "lr.claims[0].other", "above"),
        ({"claims": [{"run": "a", "relation": "collapses"}]}, "lr.claims[0].text", "missing"),
    ],
)
def test_a_malformed_entry_is_named_by_its_key(tmp_path: Path, change: dict, key: str, word: str) -> None:
    path = write(tmp_path / "p.yaml", {"question": "How high?"} | change)
    with pytest.raises(ValueError) as error:
        load_published(path)
    assert f"{path}: {key}:" in str(error.value)
    assert word in str(error.value)


def test_a_file_that_holds_something_else(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    for text, word in (("a: [", "p.yaml"), ("[]", "ablations"), ("source: x", "ablations")):
        path.write_text(text)
        with pytest.raises(ValueError, match=word):
            load_published(path)
    with pytest.raises(ValueError, match="source"):
        load_published(write(path, {"question": "x"}, source=3))
    with pytest.raises(ValueError, match=r"p.yaml: lr.question: missing"):
        load_published(write(path, {}))


def test_the_entry_of_a_folder() -> None:
    assert find_ablation("tiny/std_dev") is find_ablation("std_dev")
    assert find_ablation("tiny/lr_sweep") is not find_ablation("lr_sweep")
    for own in ("my_sweep", "mine/lr_sweep", "tiny/my_sweep"):
        assert not is_shipped(own)
        assert find_ablation(own) == Ablation(f"Runs of `configs/{own}`.")


def test_the_file_is_shipped_with_the_package() -> None:
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = setup["package-data"]["utils.ablations"]
    assert any(FILE.match(pattern) for pattern in patterns)

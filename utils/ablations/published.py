"""The published outcomes of the ablations, read from published.yaml and checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

RELATIONS = ("above", "equals", "collapses")


@dataclass(frozen=True)
class Claim:
    """`run` ends above `other` in `metric`, equals it, or collapses."""

    text: str
    run: str
    relation: str  # one of RELATIONS
    other: str = ""
    metric: str = "eval/reward"


@dataclass(frozen=True)
class Ablation:
    """An ablation's question and published outcome. `prepare` are commands to be run before it."""

    question: str
    published: str = ""
    claims: tuple[Claim, ...] = ()
    also_drawn: tuple[str, ...] = ()
    prepare: tuple[str, ...] = ()
    note: str = ""
    source: str = ""  # of `published`; empty: SOURCE
    short: str = ""  # `published` in a few words, or what was expected, for the table of all ablations


def load_published(path: Path) -> tuple[str, dict[str, Ablation]]:
    """The source of the published runs, and each ablation by its folder of configs.

    Raises ValueError with the file and the key for an entry that is missing, unknown or of another kind.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or sorted(data) != ["ablations", "source"]:
            raise ValueError("expected the keys source and ablations")
        entries = _typed(data["ablations"], dict, "ablations")
        return _typed(data["source"], str, "source"), {
            topic: _ablation(entry, topic) for topic, entry in entries.items()
        }
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _ablation(entry: Any, key: str) -> Ablation:
    values = _fields(entry, Ablation, key)
    claims = values.pop("claims", ())
    return Ablation(**values, claims=tuple(_claim(claim, f"{key}.claims[{i}]") for i, claim in enumerate(claims)))


def _claim(entry: Any, key: str) -> Claim:
    claim = Claim(**_fields(entry, Claim, key))
    if claim.relation not in RELATIONS:
        raise ValueError(f"{key}.relation: {claim.relation!r} is none of {', '.join(RELATIONS)}")
    if bool(claim.other) == (claim.relation == "collapses"):
        raise ValueError(f"{key}.other: wanted by `above` and `equals`, and by them alone")
    return claim


def _fields(entry: Any, kind: type, key: str) -> dict[str, Any]:
    """The entry's values by field, lists as tuples, each of the field's kind."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    values = {}
    for name, value in _typed(entry, dict, key).items():
        if name not in known:
            raise ValueError(f"{key}.{name}: unknown; choose from {', '.join(known)}")
        is_list = known[name].type.startswith("tuple")
        values[name] = tuple(_typed(value, list, f"{key}.{name}")) if is_list else _typed(value, str, f"{key}.{name}")
        if is_list and name != "claims":
            for i, item in enumerate(values[name]):
                _typed(item, str, f"{key}.{name}[{i}]")
    for name, field in known.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ValueError(f"{key}.{name}: missing")
    return values


def _typed(value: Any, kind: type, key: str) -> Any:
    if not isinstance(value, kind):
        names = {str: "text (in quotes, if it looks like a number)", list: "a list", dict: "keys with values"}
        raise ValueError(f"{key}: expected {names[kind]}, not {value!r}")
    return value


SOURCE, ABLATIONS = load_published(Path(__file__).with_suffix(".yaml"))


SUITE = "tiny"  # the folder of the same questions, asked of a small model


def _entry(topic: str) -> Ablation | None:
    """tiny/prompt is looked up under this name, then as prompt."""
    suite, _, name = topic.partition("/")
    return ABLATIONS.get(topic) or (ABLATIONS.get(name) if suite == SUITE else None)


def is_shipped(topic: str) -> bool:
    """Whether the repository ships the ablation; a user's own has no entry."""
    return _entry(topic) is not None


def find_ablation(topic: str) -> Ablation:
    """By the folder of configs, in the suite also by its name there. Absent: an ablation without an outcome."""
    return _entry(topic) or Ablation(f"Runs of `configs/{topic}`.")

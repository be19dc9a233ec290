"""A config is data: any text in it is read and written exactly, and nothing in it is resolved."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.defaults import Config
from utils.preflight.config import load_config, read_config, save_config, to_dict
from utils.preflight.config_rules import ConfigError, fields, sections
from utils.preflight.yaml_values import to_yaml_value

SECRET = "${oc.env:GRPO_TEST_SECRET}"
ODD = [
    SECRET, r"\${x}", r"${\boxed{}}$", "$", "$$", "${", "}", "${x.y}", "???", "0E0", "1e5", ".5", "-.inf", "0x1F",
    "1_000", "12:30", "yes", "null", "~", "", " ", "2001-01-01", "<<", "=", "- a", "a: b", "a #b", "# a", "'", '"',
    "'a'", '"a', "a\nb\n", "a\r\n", "\t", "\x85", "\u2028", "\ufeff", "\x00", "\ud800", "\U0001f600", "%a", "@a",
    "`", "!a", "!!int 3", "&a", "*a", "|", ">", "{a}", "[a]", "---",
]  # fmt: skip
texts = st.text(st.characters(), max_size=12) | st.text("${}\\:.#'\" \nx", max_size=12) | st.sampled_from(ODD)
FIELD_TYPES = {
    f"{section}.{name}": kind
    for section, cls in sections().items()
    for name, kind in typing.get_type_hints(cls).items()
}
VALUES = {str: texts, list[str]: st.lists(texts, max_size=3), dict[str, float]: st.dictionaries(texts, st.floats(0, 9))}
TEXT_FIELDS = [key for key, kind in FIELD_TYPES.items() if kind in VALUES]


def config_with(values: dict[str, object]) -> Config:
    config = Config()
    for key, value in values.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    return config


assignments = st.fixed_dictionaries({}, optional={key: VALUES[FIELD_TYPES[key]] for key in TEXT_FIELDS})


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved") / "config.yaml"


def test_there_are_text_fields_of_every_kind() -> None:
    assert {FIELD_TYPES[key] for key in TEXT_FIELDS} == set(VALUES)
    assert len(TEXT_FIELDS) > 15
    assert set(FIELD_TYPES) == set(fields())


@settings(max_examples=40)
@given(assignments)
@example({"training.stop": ODD, "training.wandb_tags": ODD, "training.extra_rewards": dict.fromkeys(ODD, 0.5)})
def test_a_file_holds_any_text(file: Path, values: dict[str, object]) -> None:
    config = config_with(values)
    save_config(config, file)
    assert read_config([file], [])[0] == config
    file.write_text(yaml.safe_dump(to_dict(config)))  # as another program would write it, in lines of 80 characters
    assert read_config([file], [])[0] == config


@settings(max_examples=40)
@given(assignments)
@example({"training.stop": ODD, "training.wandb_tags": ODD, "training.extra_rewards": dict.fromkeys(ODD, 0.5)})
def test_an_override_in_yaml_holds_any_text(values: dict[str, object]) -> None:
    overrides = [f"{key}={to_yaml_value(value)}" for key, value in values.items()]
    assert read_config([], overrides)[0] == config_with(values)


@given(texts.filter(lambda text: text[:1] not in ("'", '"') and text not in ("null", "~")))
def test_an_override_of_a_text_is_taken_as_it_is(text: str) -> None:
    assert read_config([], [f"training.system_prompt={text}"])[0].training.system_prompt == text


@settings(max_examples=40)
@given(
    st.floats(allow_nan=False),
    st.integers(-(10**20), 10**20),
    st.booleans(),
    st.none() | st.integers(),
)
def test_numbers_come_back(file: Path, rate: float, seed: int, flag: bool, interval: int | None) -> None:
    values = {
        "training.learning_rate": rate,
        "training.seed": seed,
        "training.use_compile": flag,
        "training.eval_interval": interval,
        "training.max_hours": rate,
    }
    save_config(config_with(values), file)
    assert read_config([file], [])[0] == config_with(values)
    overrides = [f"{key}={to_yaml_value(value)}" for key, value in values.items()]
    assert read_config([], overrides)[0] == config_with(values)


def test_no_secret_is_read_and_a_resumed_config_is_the_same(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("GRPO_TEST_SECRET", "hunter2")
    config = load_config([], [f"training.wandb_run_name={SECRET}", r"training.stop=['\${x}', '???']"])
    assert (config.training.wandb_run_name, config.training.stop) == (SECRET, [r"\${x}", "???"])
    save_config(config, tmp_path / "config.yaml")
    assert "hunter2" not in (tmp_path / "config.yaml").read_text()
    assert load_config([tmp_path / "config.yaml"]) == config


@pytest.mark.parametrize("text", ["yes", "True", "on", "1", "'true'"])
def test_ways_to_say_true(text: str) -> None:
    assert load_config([], [f"training.use_compile={text}"]).training.use_compile is True


BOMB = "a: &a0 [lol, lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
CIRCLE = "training:\n  stop: &s [*s]\n"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("training:\n  stop: " + "[" * 100_000, "nested too deeply"),
        ("training:\n  stop: " + "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("training:\n" + "".join(" " * i + "a:\n" for i in range(1, 2000)), "nested too deeply"),
        ("training: " + "{a: " * 100_000, "nested too deeply"),
        (BOMB, "bad.yaml:1: unknown key 'a'"),
        (BOMB.replace("\na29:", "\ntraining:\n  stop:"), "unknown key 'a'"),
        ("training:\n  wandb_tags: &a0 [b]\n  stop: &a1 [*a0, *a0]\n", r"bad.yaml:3: training.stop = .* list\[str\]"),
        (CIRCLE, r"bad.yaml:2: training.stop = .* takes list\[str\]"),
        ("training:\n  extra_rewards: &e {gsm8k: *e}\n", "training.extra_rewards = .* takes dict"),
        ("training:\n  extra_rewards: {gsm8k: 1, gsm8k: 2}\n", "training.extra_rewards = .* takes dict"),
        ("training:\n  stop: [a, null]\n", r"training.stop = \[a, null\] .* takes list\[str\]"),
        ("training:\n  wandb_run_name:\n", r"bad.yaml:2: training.wandb_run_name = null .* quotes"),
        ("training:\n  wandb_run_name: !!binary aGk=\n", "training.wandb_run_name = .* wrong type"),
        ("training:\n  wandb_run_name: !!python/name:os.system a\n", "wandb_run_name = .* wrong type"),
        ("training:\n  [a]: 1\n", r"bad.yaml:2: .*\[a\] cannot be a key"),
        ("training:\n  seed: 1\n---\ntraining:\n  seed: 2\n", "bad.yaml:3: not valid YAML: .*single document"),
        ("training:\n  seed: \x01\n", "not valid YAML: .*special characters"),
        ("training:\n  seed: " + "9" * 5000, "training.seed = .* takes int"),
    ],
)
def test_what_no_config_holds_is_refused_in_one_short_line(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        load_config([path])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.stop=" + "[" * 5000, "nested too deeply"),
        ("training.stop=[a]\nb: c", "more than one value"),
        ("training.wandb_run_name='a", "not valid YAML"),
        ("training.wandb_run_name=null", "quotes"),
        ("training.seed=7.0", "takes int"),
    ],
)
def test_overrides_that_are_no_values(override: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config([], [override])


def test_every_field_of_the_defaults_is_read_back_by_its_type() -> None:
    config = Config()
    overrides = [
        f"{section}.{field.name}={to_yaml_value(getattr(getattr(config, section), field.name))}"
        for section, cls in sections().items()
        for field in dataclasses.fields(cls)
    ]
    assert read_config([], overrides)[0] == config

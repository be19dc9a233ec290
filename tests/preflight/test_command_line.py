"""The command line: flags, overrides, help, and mistakes in one line."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import train_grpo
from configs.defaults import default_of
from utils.preflight.command_line import parse_arguments
from utils.preflight.config import load_config
from utils.preflight.config_rules import fields


def overrides(*words: str) -> list[str]:
    return parse_arguments(words, "what it does").overrides


def test_fields_as_flags_and_as_overrides_are_the_same() -> None:
    flags = ["--n-grpo-steps", "10", "--learning-rate=1e-5", "--vllm.dtype", "float32", "--training.seed", "3"]
    plain = ["training.n_grpo_steps=10", "training.learning_rate=1e-5", "vllm.dtype=float32", "training.seed=3"]
    assert overrides(*flags) == plain
    assert overrides(*plain) == plain
    assert overrides("--n_grpo_steps", "10") == plain[:1]


def test_every_field_has_a_flag() -> None:
    for key in fields():
        assert overrides(f"--{key.replace('_', '-')}", "1") == [f"{key}=1"]
    for key in ("training.stop", "training.system_prompt", "paths.output_dir"):
        assert overrides(f"--{key.partition('.')[2].replace('_', '-')}=a b") == [f"{key}=a b"]


def test_later_words_win_whatever_their_form() -> None:
    words = ["training.seed=1", "--seed", "2", "--config", "a.yaml", "training.seed=3", "--config=b.yaml"]
    options = parse_arguments(words, None)
    assert options.overrides == ["training.seed=1", "training.seed=2", "training.seed=3"]
    assert options.config == ["a.yaml", "b.yaml"]
    assert load_config([], options.overrides).training.seed == 3


def test_a_switch_may_stand_alone() -> None:
    words = ["--use-compile", "training.seed=1", "--use-packing", "false", "--enforce-eager", "--resume"]
    options = parse_arguments(words, None)
    expected = ["training.use_compile=true", "training.seed=1", "training.use_packing=false", "vllm.enforce_eager=true"]
    assert options.overrides == expected
    assert options.resume


def test_options_of_its_own() -> None:
    options = parse_arguments(["--dry-run", "--full", "--allow-changes"], None)
    assert (options.dry_run, options.full, options.allow_changes, options.resume) == (True, True, True, False)
    assert (options.config, options.overrides, options.help_config) == ([], [], None)


def test_negative_numbers_and_dollar_signs_are_values() -> None:
    assert overrides("--learning-rate", "-1", "--wandb-run-name", "${x}") == [
        "training.learning_rate=-1",
        "training.wandb_run_name=${x}",
    ]


@settings(max_examples=40)
@given(st.text().filter(lambda text: text[:1] not in ("'", '"', "-") and text not in ("null", "~")))
def test_a_text_given_as_a_flag_is_taken_as_it_is(text: str) -> None:
    for words in (["--system-prompt", text], [f"--system-prompt={text}"]):
        config = load_config([], [*overrides(*words), "training.use_chat_template=true"])
        assert config.training.system_prompt == text


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--dtype", "float32"], "--dtype could be --training.dtype or --vllm.dtype"),
        (["--n-grpo-step", "3"], "unknown option --n-grpo-step; did you mean --n-grpo-steps?"),
        (["--lr", "3"], "did you mean --learning-rate?"),
        (["--vllm.seed", "3"], "did you mean --seed?"),
        (["--dry"], "unknown option --dry; did you mean --dry-run?"),
        (["--zzzz"], "unknown option --zzzz; --help-config"),
        (["--seed"], "--seed needs a value, for example --seed 1337"),
        (["--seed", "--resume"], "--seed needs a value"),
        (["--config"], "--config: expected one argument"),
        (["--resume=yes"], "--resume"),
        (["--help-config", "zzzz"], "no field has that"),
    ],
)
def test_mistakes_are_one_line_with_status_2(words: list[str], complaint: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(words, None)
    complaints = capsys.readouterr().err
    assert ended.value.code == 2
    assert complaint in complaints and complaints.startswith("error: ") and complaints.count("\n") == 1


def help_text(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        parse_arguments(words, "What it does.")
    assert not ended.value.code
    return capsys.readouterr().out


def test_help_is_short_and_says_where_the_fields_are(capsys) -> None:
    with pytest.raises(SystemExit):
        train_grpo.main(["--help"])
    assert len(capsys.readouterr().out.splitlines()) <= 40
    text = help_text(capsys, "--help")
    for option in ("--dry-run", "--full", "--resume", "--allow-changes", "--help-config", "What it does."):
        assert option in text


def test_help_config_lists_every_field_under_its_heading(capsys) -> None:
    text = help_text(capsys, "--help-config")
    assert all(f"{key} = " in text for key in fields())
    places = [
        text.index(part) for part in ("\n  Optimizer\n", "training.learning_rate", "\n  Sampling\n", "training.stop")
    ]
    assert places == sorted(places)


def test_help_config_with_a_word_lists_what_has_it(capsys) -> None:
    text = help_text(capsys, "--help-config", "ADAM")
    assert "training.adam_beta1" in text and "training.use_bnb_adamw8bit" in text
    assert "training.weight_decay" in text  # its doc says AdamW
    assert "training.group_size" not in text and "Sampling" not in text and "vllm:" not in text


def test_defaults_that_are_true_can_be_turned_off_by_a_flag() -> None:
    switched = [key for key, field in fields().items() if default_of(field) is True]
    words = [word for key in switched for word in (f"--{key.replace('_', '-')}", "false")]
    assert overrides(*words) == [f"{key}=false" for key in switched]

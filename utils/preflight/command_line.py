"""The command line of train_grpo.py: its options, and config fields given as `section.field=value` or as flags."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import NoReturn

from configs.defaults import default_of
from utils.preflight.config_rules import fields, nearest
from utils.preflight.field_docs import describe_fields
from utils.preflight.yaml_values import BOOLEANS

EPILOG = """A field of the config may be given as section.field=value or as a flag, with the same effect:

    python train_grpo.py training.n_grpo_steps=10 training.learning_rate=1e-5
    python train_grpo.py --n-grpo-steps 10 --learning-rate 1e-5

A flag whose name two sections share needs the section: --vllm.dtype. Later files win over earlier ones, and the
command line wins over all files. `null` is off. `--help-config` lists every field."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def parse_arguments(argv: Sequence[str] | None, description: str | None) -> argparse.Namespace:
    """`config` (files), `overrides` (`section.field=value`, flags among them), and the options that are on or off.

    Prints help and exits with status 0 if asked to; a mistake is one line and exit status 2.
    """
    parser = _build_parser(description)
    try:
        words = list(_flags_as_overrides(sys.argv[1:] if argv is None else argv, _own_options(parser)))
    except ValueError as mistake:
        parser.error(str(mistake))
    options = parser.parse_intermixed_args(words)
    if options.help_config is not None:
        text = describe_fields(options.help_config)
        if not text:
            parser.error(f"--help-config {options.help_config}: no field has that in its name or doc")
        print(text)
        parser.exit(0)
    return options


def _build_parser(description: str | None) -> Parser:
    parser = Parser(
        prog="train_grpo.py",
        usage="train_grpo.py [--config FILE] [section.field=value | --field value] ... [options]",
        description=description,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", action="append", default=[], metavar="FILE", help="YAML file; may be given several times")
    add("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    add(
        "--dry-run",
        action="store_true",
        help="print what the config implies and anything that would stop the run, then exit",
    )
    add("--full", action="store_true", help="with --dry-run: show every field of the config")
    add("--resume", action="store_true", help="continue the run in paths.output_dir")
    add(
        "--allow-changes",
        action="store_true",
        help="with --resume: accept changed fields that are normally refused, and list them",
    )
    add(
        "--help-config",
        nargs="?",
        const="",
        metavar="WORD",
        help="list the config's fields; with WORD, only those whose name or doc has it",
    )
    return parser


def _own_options(parser: argparse.ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def _flags_as_overrides(argv: Sequence[str], own_options: set[str]) -> Iterator[str]:
    """The words of a command line, with `--field value` in the form `section.field=value`.

    Raises ValueError for a flag that is neither a field nor one of `own_options`, and for one without a value.
    """
    words = list(argv)
    while words:
        word = words.pop(0)
        flag, equals, value = word.partition("=")
        if not flag.startswith("--") or flag in own_options:
            yield word
            continue
        key = _field_of(flag, own_options)
        if not equals:
            value = _value_of(flag, key, words)
        yield f"{key}={value}"


def _field_of(flag: str, own_options: set[str]) -> str:
    """The dotted name of the field that a flag means: `--n-grpo-steps`, or `--training.n-grpo-steps`."""
    name = flag.removeprefix("--").replace("-", "_")
    known = fields()
    matching = [key for key in known if name in (key, key.partition(".")[2])]
    if not matching:
        similar = nearest(name, known)
        options = [option for option in own_options if option.startswith(flag) and flag != "--"]
        guess = options[0] if options else None if similar is None else _shortest_flag(similar)
        raise ValueError(
            f"unknown option {flag}; " + (f"did you mean {guess}?" if guess else "--help-config lists all")
        )
    if len(matching) > 1:
        raise ValueError(f"{flag} could be {' or '.join(f'--{_dashed(key)}' for key in matching)}; give one of these")
    return matching[0]


def _value_of(flag: str, key: str, words: list[str]) -> str:
    """The value after a flag, taken off the words that follow it; a flag that is true or false needs none."""
    is_switch = isinstance(default_of(fields()[key]), bool)
    if words and (words[0].lower() in BOOLEANS if is_switch else not words[0].startswith("--")):
        return words.pop(0)
    if is_switch:
        return "true"
    raise ValueError(f"{flag} needs a value, for example {flag} {default_of(fields()[key])}")


def _shortest_flag(key: str) -> str:
    name = key.partition(".")[2]
    is_shared = sum(other.partition(".")[2] == name for other in fields()) > 1
    return f"--{_dashed(key if is_shared else name)}"


def _dashed(name: str) -> str:
    return name.replace("_", "-")

"""How long the prompts are that a config makes of its data, counted without torch."""

from __future__ import annotations

from dataclasses import dataclass

from configs.defaults import Config
from utils.preflight.machine import ASSUMED_PROMPT
from utils.preflight.model_files import context_of, model_config, model_file
from utils.problems import QUESTION, load_template, read_problems

N_COUNTED = 256  # prompts of the most bytes, among which the one of the most tokens is looked for


@dataclass(frozen=True)
class LongestPrompt:
    """Tokens to reckon with for the longest prompt that is not left out, and how they are known."""

    tokens: int
    how: str


def longest_prompt(config: Config) -> LongestPrompt:
    """The longest prompt of training and validation data, without what a chat template adds."""
    assumed, limit = config.training.max_prompt_tokens or ASSUMED_PROMPT, _limit(config)
    if limit is not None:
        assumed = max(1, min(assumed, limit))
    texts = _longest_texts(config)
    if texts is None:
        return LongestPrompt(assumed, f"{assumed:,} tokens are assumed, as the data cannot be read")
    counts = _count_tokens(config.paths.model_path, texts)
    if counts is None:
        n_bytes = len(texts[0].encode())
        tokens = min(n_bytes, assumed)
        return LongestPrompt(
            tokens, f"{tokens:,} tokens are assumed for {n_bytes:,} bytes, as its tokenizer is not here"
        )
    longest = max(counts)
    if limit is not None and longest > limit:
        n_long = sum(count > limit for count in counts)
        return LongestPrompt(max(1, limit), f"{longest:,} tokens; {n_long} or more above {limit:,} are left out")
    return LongestPrompt(longest, f"{longest:,} tokens")


def _longest_texts(config: Config) -> list[str] | None:
    """The prompts of the most bytes, the longest first; None if data or template cannot be read."""
    paths = config.paths
    try:
        template = load_template(paths.prompt_template_file)
        problems = [*read_problems(paths.train_data_file)[0], *read_problems(paths.val_data_file)[0]]
    except (ValueError, OSError):
        return None
    texts = [config.training.system_prompt + template.replace(QUESTION, problem.question) for problem in problems]
    return sorted(texts, key=lambda text: len(text.encode()), reverse=True)[:N_COUNTED]


def _limit(config: Config) -> int | None:
    """Tokens above which a prompt is left out; None if the model's context is not known here."""
    t = config.training
    if t.max_prompt_tokens is not None:
        return t.max_prompt_tokens
    try:
        sizes = model_config(config.paths.model_path)
    except (ValueError, OSError):  # an obstacle says so
        return None
    context = None if sizes is None else context_of(sizes)
    return None if context is None else context - t.max_tokens


def _count_tokens(model_path: str, texts: list[str]) -> list[int] | None:
    """Tokens of each text, None if the model's tokenizer.json is not on this machine or cannot be read."""
    from tokenizers import Tokenizer

    file = model_file(model_path, "tokenizer.json")
    if file is None:
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception:  # noqa: BLE001 (the library raises nothing narrower; loading the model will tell what is wrong)
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [len(encoding.ids) for encoding in tokenizer.encode_batch(texts)]

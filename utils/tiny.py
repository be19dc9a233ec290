"""A tiny world to watch GRPO in on two cores: a Qwen2 model, its tokenizer, sums, and messy demonstrations."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

from utils.records import Problem
from utils.seeding import derive_seed, preserved_random_state, seed_everything

if TYPE_CHECKING:
    from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

WORDS = ("User", "Assistant", "think", "answer", " <", " </")  # a token each; all else is spelled byte by byte
LARGEST_OPERAND = 49
ERRORS = (-10, -2, -1, 1, 2, 10)  # how far a wrong demonstration is off
FORMAT_ERRORS = (  # what a malformed demonstration has in place of what
    ("</think> ", ""),
    ("<answer> ", ""),
    (" </answer>", ""),
    ("</think> <answer>", "</think><answer>"),
)


def build_tokenizer() -> Qwen2Tokenizer:
    """A byte-level BPE tokenizer: 256 bytes, the merges that make each of WORDS one token, an end and a pad token.

    It is of the class that AutoTokenizer puts beside any qwen2 config.json, so that a saved copy tokenizes the same.
    The words are of letters only, within which that class's pre-tokenizer never splits.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1024,  # more than the words can fill: training ends when each is one token
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(WORDS, trainer)
    trained = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in trained["merges"]]
    return Qwen2Tokenizer(vocab=trained["vocab"], merges=merges, eos_token="<|endoftext|>", pad_token="<|pad|>")


def build_model(seed: int, hidden_size: int = 128, n_layers: int = 2, tie_embeddings: bool = True) -> Qwen2ForCausalLM:
    """A randomly initialised float32 Qwen2 model for `build_tokenizer`'s vocabulary: 0.4 M parameters by default."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = build_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=tie_embeddings,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        dtype="float32",
    )
    with preserved_random_state():
        seed_everything(seed)
        return Qwen2ForCausalLM(config)


def make_problems(n_validation_pairs: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """All sums of two numbers from 0 to LARGEST_OPERAND, split into (training, validation) problems.

    The split is by unordered pair, so that a + b and b + a are on the same side. Both lists are in shuffled order.
    """
    rng = random.Random(derive_seed(seed, "tiny_problems"))
    pairs = list(itertools.combinations_with_replacement(range(LARGEST_OPERAND + 1), 2))
    rng.shuffle(pairs)
    splits = []
    for part in (pairs[n_validation_pairs:], pairs[:n_validation_pairs]):
        sums = sorted({(a, b) for pair in part for a, b in (pair, pair[::-1])})
        rng.shuffle(sums)
        splits.append([Problem(f"{a}+{b}=?", str(a + b)) for a, b in sums])
    return splits[0], splits[1]


def make_demonstrations(
    problems: Sequence[Problem], template: str, n_each: int, share_wrong: float, share_malformed: float, seed: int
) -> list[dict[str, str]]:
    """Rows of `prompt` and `response` for SFT, n_each a problem, of which two shares (0 to 1) are spoilt on purpose."""
    rng = random.Random(derive_seed(seed, "tiny_demonstrations"))
    return [
        {
            "prompt": template.replace("{question}", problem.question),
            "response": make_response(problem, rng, share_wrong, share_malformed),
        }
        for problem in problems
        for _ in range(n_each)
    ]


def make_response(problem: Problem, rng: random.Random, share_wrong: float, share_malformed: float) -> str:
    """What follows `<think>`: ones and tens summed apart, then the answer. Wrong, or malformed, at random."""
    a, b = map(int, problem.question.removesuffix("=?").split("+"))
    ones, tens = a % 10 + b % 10, a // 10 * 10 + b // 10 * 10
    answer = a + b
    if rng.random() < share_wrong:
        answer = abs(answer + rng.choice(ERRORS))
    response = f" {ones}+{tens}={answer} </think> <answer> {answer} </answer>"
    if rng.random() < share_malformed:
        response = response.replace(*rng.choice(FORMAT_ERRORS))
    return response

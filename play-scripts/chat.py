"""Ask a model, in the prompt that it was trained with, and read its response as it is written.

    python play-scripts/chat.py runs/quickstart/checkpoints/best
    python play-scripts/chat.py Qwen/Qwen2.5-Math-1.5B --config configs/math.yaml --question "What is 17 * 23?"

Without --question, each line that you type is a question, answered on its own: the model is given no earlier ones. An
empty line, or the end of the input, ends it. Template, sampling and stop strings come from the config: --config, or the
config.yaml of the run that the checkpoint lies in. A field is changed as elsewhere, for example training.max_tokens=64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from evaluate import check_checkpoint, checkpoint_config

from configs.defaults import Config
from utils.log.terminal import visible
from utils.preflight.obstacles import refuse, shortfalls, unusable_files
from utils.problems import build_prompts, load_template
from utils.records import Problem, Prompt
from utils.run.ending import Status

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def main(arguments: Sequence[str] | None = None) -> Status:
    options = parse_arguments(arguments)
    try:
        check_checkpoint(options.checkpoint)
        config = checkpoint_config(options)
        inputs = ("prompt_template_file",)
        refuse([*shortfalls(config, inputs), *unusable_files(config, inputs)])
        chat(config, options)
    except ValueError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return Status.USER_MISTAKE
    return Status.FINISHED


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="checkpoint folder or hub name")
    parser.add_argument("--config", action="append", default=[], metavar="FILE", help="YAML file; later files win")
    parser.add_argument("--question", metavar="TEXT", help="ask only this")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time; else sample")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="change a field of the config")
    return parser.parse_intermixed_args(arguments)


def chat(config: Config, options: argparse.Namespace) -> None:
    """Answer every question. Raises ValueError for a prompt that leaves no room for a response."""
    import torch

    from utils.algorithm.policy import context_length, load_policy, load_tokenizer

    t = config.training
    tokenizer = load_tokenizer(config.paths.model_path)
    template = load_template(config.paths.prompt_template_file)
    longest = context_length(config.paths.model_path) - t.max_tokens
    policy = load_policy(config.paths.model_path, t).eval()
    torch.manual_seed(options.seed)
    for question in questions(options.question):
        prompts, _ = build_prompts(
            [Problem(question, "")], template, tokenizer, longest, t.use_chat_template, t.system_prompt
        )
        answer(policy, tokenizer, prompts[0], config, options.greedy)


def questions(given: str | None) -> Iterator[str]:
    """The one that is given, or those that are typed."""
    if given is not None:
        yield given
        return
    while True:
        if sys.stdin.isatty():
            print("question: ", end="", flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def answer(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, config: Config, greedy: bool
) -> None:
    """Print the response while it is generated, then its length and why it ended."""
    import torch
    from transformers import TextStreamer

    from utils.algorithm.policy import autocast

    class Stream(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            print(visible(text), end="\n" if stream_end else "", flush=True)

    t = config.training
    ids = torch.tensor([prompt.token_ids], device=policy.device)
    how = {"do_sample": False} if greedy else {"temperature": t.temperature, "top_p": t.top_p, "top_k": 0}
    with torch.no_grad(), autocast(policy, t.autocast_dtype, keep_copies=True):
        output = policy.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=t.max_tokens,
            min_new_tokens=t.min_tokens,
            **({"do_sample": True} | how),
            stop_strings=t.stop or None,
            tokenizer=tokenizer,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            streamer=Stream(tokenizer, skip_prompt=True, skip_special_tokens=True),
        )
    n_tokens = output.shape[1] - ids.shape[1]
    print(f"[{n_tokens} tokens{', ran into max_tokens' if n_tokens >= t.max_tokens else ''}]", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)  # as a shell shows SIGINT

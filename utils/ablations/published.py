"""What each ablation asks, what was published of it, and the claims in that which other runs can be held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SOURCE = (
    "published runs: Qwen2.5-Math-1.5B, MATH, 256 rollouts a step in groups of 8, at most 1,024 new tokens, one run a "
    "setting"
)
GRAD_NORM, LENGTH, CLIPPED, MOVED = (
    "train/grad_norm",
    "train/mean_response_length",
    "train/clip_fraction",
    "train/frac_weights_moved",
)
RATIO, SAMPLER_KL = "train/mean_ratio", "train/sampler_kl"


@dataclass(frozen=True)
class Claim:
    """`run` ends above `other` in `metric` (">"), equal to it ("="), or collapses."""

    text: str
    run: str
    relation: Literal[">", "=", "collapses"]
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


LR_QUESTION = "How high may the learning rate be?"
LR_PUBLISHED = "1e-6 and 3e-6 barely move; 1e-4 collapses (length spikes, entropy to 0); 3e-5 is best."
BASELINES_QUESTION = "What does subtracting the group's mean reward bring?"
BASELINES_PUBLISHED = (
    "With the baseline reward climbs to 0.61; without it reward peaks early, the gradient norm grows and responses "
    "shrink, at half the rate too."
)
BASELINE_CLAIMS = (
    Claim("with the baseline reward ends higher", "reinforce_with_baseline", ">", "no_baseline"),
    Claim("without it the gradient norm is larger", "no_baseline", ">", "reinforce_with_baseline", GRAD_NORM),
    Claim("without it responses are shorter", "reinforce_with_baseline", ">", "no_baseline", LENGTH),
)
PROMPT_PUBLISHED = (
    "The bare question with a boxed answer starts near 0.47 and reaches 0.71; r1_zero starts at 0.03 and ends ahead."
)
SFT_PUBLISHED = "The base model ends ahead of three SFT checkpoints (early, middle, final): more SFT, a lower ceiling."
SFT_QUESTION = "Does RL go further from the base model, or from a checkpoint fine-tuned on demonstrations?"
SFT_CLAIMS = (
    Claim("the base model ends above the final SFT checkpoint", "base", ">", "final"),
    Claim("the base model ends above the early SFT checkpoint", "base", ">", "early"),
    Claim("more SFT, a lower ceiling: early above final", "early", ">", "final"),
)
OFF_POLICY_QUESTION = "How many optimizer steps may be taken on one batch of rollouts?"

# Keyed by the folder of configs. A folder in configs/tiny that is not here has the entry of its last part.
ABLATIONS = {
    "lr_sweep": Ablation(
        LR_QUESTION,
        LR_PUBLISHED,
        (
            Claim("1e-4 collapses", "1e-4", "collapses"),
            Claim("3e-5 ends above 1e-5", "3e-5", ">", "1e-5"),
            Claim("1e-5 ends above 3e-6", "1e-5", ">", "3e-6"),
        ),
    ),
    "tiny/lr_sweep": Ablation(
        LR_QUESTION,
        LR_PUBLISHED,
        (
            Claim("1e-4 (here 1e-3) collapses", "1e-3", "collapses"),
            Claim("3e-5 (here 3e-4) ends above 1e-5 (here 1e-4)", "3e-4", ">", "1e-4"),
            Claim("1e-5 (here 1e-4) ends above 3e-6 (here 3e-5)", "1e-4", ">", "3e-5"),
        ),
        note="Rates here are ten times the published ones: so small a model takes larger steps.",
    ),
    "baselines": Ablation(BASELINES_QUESTION, BASELINES_PUBLISHED, BASELINE_CLAIMS),
    "length_normalization": Ablation(
        "By what should a response's loss be divided: its own length, a constant, the longest of its microbatch?",
        "The three reach the same reward; `constant` has the lower gradient norms.",
        (
            Claim("`mean` and `constant` reach the same reward", "mean", "=", "constant"),
            Claim("`mean` and `microbatch` reach the same reward", "mean", "=", "microbatch"),
            Claim("`constant` has lower gradient norms than `mean`", "mean", ">", "constant", GRAD_NORM),
        ),
    ),
    "std_dev": Ablation(
        "Should advantages be divided by the standard deviation of their group?",
        "0.72 with the division, 0.65 without, whose gradient norms are lower and steadier.",
        (
            Claim("with the division reward ends higher", "with_std", ">", "without_std"),
            Claim("without it gradient norms are lower", "with_std", ">", "without_std", GRAD_NORM),
        ),
    ),
    "off_policy_sweep": Ablation(
        OFF_POLICY_QUESTION,
        "Most settings end at 0.55 to 0.65 after 50 steps; 4 epochs in minibatches of 64 (16 optimizer steps a GRPO "
        "step) collapse: the gradient spikes, length falls to about 100.",
        (Claim("16 optimizer steps a GRPO step collapse", "e4_tb64_ga16", "collapses"),),
        (CLIPPED, RATIO),
    ),
    "tiny/off_policy_sweep": Ablation(
        OFF_POLICY_QUESTION,
        "In 50 steps most settings end at 0.55 to 0.65; 4 epochs in minibatches of 64 (16 optimizer steps a GRPO step) "
        "collapse: the gradient spikes, length falls to about 100. In 200 steps on-policy is best, 0.75 at the peak.",
        (
            Claim("16 optimizer steps a GRPO step collapse", "e4_tb64", "collapses"),
            Claim("on-policy ends above 2 minibatches", "e1_tb256", ">", "e1_tb128"),
            Claim("on-policy ends above 2 epochs", "e1_tb256", ">", "e2_tb256"),
        ),
        (CLIPPED, RATIO),
    ),
    "off_policy_full_sweep": Ablation(
        OFF_POLICY_QUESTION,
        "On-policy is best in 200 steps, 0.75 at the peak.",
        (
            Claim("on-policy ends above 2 minibatches", "e1_tb256_ga64", ">", "e1_tb128_ga32"),
            Claim("on-policy ends above 2 epochs", "e1_tb256_ga64", ">", "e2_tb256_ga64"),
        ),
        (CLIPPED, RATIO),
    ),
    "clip_ablation": Ablation(
        "Is clipping the ratio needed?",
        "On-policy the two losses are the same, as the ratio is 1.",
        (Claim("on-policy, clipping changes nothing", "e1_tb256_clip", "=", "e1_tb256_no_clip"),),
        (CLIPPED, RATIO),
    ),
    "prompt": Ablation(
        "Which prompt, with its reward function, goes further?",
        PROMPT_PUBLISHED,
        (Claim("the prompt that starts lower ends ahead", "r1_zero", ">", "question_only"),),
    ),
    "tiny/prompt": Ablation(
        "Does a prompt that the model answers badly at first end ahead of the one it knows?",
        PROMPT_PUBLISHED,
        (
            Claim("the prompt that starts lower (`no_think`) ends ahead", "no_think", ">", "familiar"),
            Claim("the prompt that starts lower (`question_only`) ends ahead", "question_only", ">", "familiar"),
        ),
        note="Not the same comparison: the tiny model has only ever seen one prompt (`familiar`, data/tiny.prompt) and "
        "one answer format, which all three runs ask for and reward. `no_think` leaves out the `<think>` that ends the "
        "prompt, `question_only` all but the question. The published `question_only` asks for a box, which the tiny "
        "model has never seen.",
    ),
    "sft_init": Ablation(SFT_QUESTION, SFT_PUBLISHED, SFT_CLAIMS),
    "tiny/sft_init": Ablation(
        SFT_QUESTION,
        SFT_PUBLISHED,
        SFT_CLAIMS,
        prepare=(
            "python play-scripts/train_sft.py --model data/tiny/model --data data/tiny/demonstrations.jsonl "
            "--output runs/tiny/sft --steps 600 --save-at 100 300 --learning-rate 1e-3 --schedule linear",
        ),
        note="The base model is here the quickstart's, itself warmed up on these demonstrations, many of them wrong on "
        "purpose; early, middle and final are 100, 300 and 600 more SFT steps on them.",
    ),
    "precision": Ablation(
        "At which learning rate does each precision of weights and optimizer state stop learning?",
        claims=tuple(
            Claim(f"at {rate} float32 ends above bfloat16", f"float32_{rate}", ">", f"bfloat16_{rate}")
            for rate in ("1e-5", "3e-5", "1e-4", "3e-4")
        ),
        also_drawn=(MOVED, SAMPLER_KL),
        note="A bfloat16 weight stays where it is when an update is below half its spacing; "
        "`train/frac_weights_moved` is the share that moved in a step.",
    ),
}


def find_ablation(topic: str) -> Ablation:
    """By the folder, else by its last part; an empty one for a folder that nothing is known of."""
    return ABLATIONS.get(topic) or ABLATIONS.get(topic.rsplit("/", 1)[-1]) or Ablation(f"Runs of `configs/{topic}`.")

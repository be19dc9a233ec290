"""Gradients of our losses beside those of TRL's GRPOTrainer on the same batch, as a table.

    python play-scripts/bench/losses_trl.py --output results/algorithm

Needs TRL 1.16 (pip install trl==1.16.*) and data/tiny (python play-scripts/make_tiny.py). TRL's trainer samples a batch
from the quickstart's model, scores it, computes advantages and then its loss. Our training loop, `update_policy`, gets
the same ids and rewards and computes everything else itself. On-policy the weights are those that sampled. Off-policy
they have moved at random since, so that ratios leave the clip range. So that the losses are compared in float64, two
pieces that compute in float32 whatever the weights are get replaced: TRL's language-model head, and both models' norms.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from configs.defaults import Training
from train_grpo import update_policy
from utils.algorithm.advantages import compute_advantages
from utils.algorithm.batch import TrainBatch, make_train_batch
from utils.algorithm.policy import load_policy, load_tokenizer
from utils.algorithm.update import with_old_log_probs
from utils.log.files import write_atomically
from utils.preflight.config import load_config
from utils.problems import load_problems, load_template
from utils.records import Problem, Prompt, Rollout

if TYPE_CHECKING:
    from trl import GRPOTrainer

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "configs" / "recipes"
N_PROMPTS, GROUP_SIZE, MAX_TOKENS, TEMPERATURE = 8, 4, 32, 1.5  # hot, so that lengths differ
STEP = 0.02  # standard deviation of what each weight moves by, off-policy
TRL_EPS = 1e-4  # what TRL adds to the standard deviation that advantages are divided by


@dataclass(frozen=True)
class Case:
    """One row: our recipe, what is changed in it, and TRL's options for the same."""

    recipe: str
    ours: dict[str, Any]
    trl: dict[str, Any]


GRPO, CISPO = {"loss_type": "grpo"}, {"loss_type": "cispo"}
GSPO = GRPO | {"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}
KL = {"kl_coef": 0.1}
CASES = [
    Case("grpo", {}, GRPO),
    Case("dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    Case("dr_grpo", {"normalize_constant": 32.0}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    Case("grpo", {"normalize_mode": "token"}, {"loss_type": "bnpo"}),
    Case("gspo", {}, GSPO),
    Case("cispo", {}, CISPO | {"epsilon_high": 5.0}),
    Case("sapo", {}, {"loss_type": "sapo"}),
    Case("cispo", {"cispo_max_ratio": 1.2}, CISPO | {"epsilon_high": 1.2}),
    Case("cispo", {"std_scope": "batch"}, CISPO | {"epsilon_high": 5.0, "scale_rewards": "batch"}),
    Case("grpo", {"dual_clip": 1.4}, GRPO | {"delta": 1.4}),
    Case("grpo", {"negative_mask": 0.02}, GRPO | {"off_policy_mask_threshold": 0.02}),
    Case("grpo", KL, GRPO | {"beta": 0.1}),
    Case("grpo", KL, GRPO | {"beta": 0.1, "use_bias_correction_kl": False}),
]
SETTINGS = [(False, 1), (True, 1), (True, 2)]  # off-policy or not, and microbatches
COLUMNS = ["recipe", "changed", "TRL's options", "on-policy", "off-policy", "off-policy, 2 microbatches"]
COLUMNS += ["clipped off-policy", "advantages"]


def our_training(case: Case, n_pieces: int) -> Training:
    """The recipe on the quickstart's config, one optimizer step per batch."""
    training = load_config([ROOT / "configs/quickstart.yaml", RECIPES / f"{case.recipe}.yaml"]).training
    n = N_PROMPTS * GROUP_SIZE
    settings = {
        "group_size": GROUP_SIZE, "rollout_batch_size": n, "train_batch_size": n,
        "temperature": TEMPERATURE, "max_tokens": MAX_TOKENS, "advantage_eps": TRL_EPS, "max_grad_norm": 1e9,
        "gradient_accumulation_steps": n_pieces, "attention_type": "sdpa", "use_onednn": False,
    }  # fmt: skip
    return replace(training, **settings, **case.ours)


def build_trainer(case: Case, n_pieces: int, model: torch.nn.Module, tokenizer: Any) -> tuple[GRPOTrainer, list]:
    """TRL's trainer of a model, and the list that it puts rewards into: 1 for a response that holds the sum."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    problems = load_problems(str(ROOT / "data/tiny/train.jsonl"))[:N_PROMPTS]
    template, rewards = load_template(str(ROOT / "data/tiny.prompt")), []

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        rewards[:] = [float(f">{a}<" in text.replace(" ", "")) for text, a in zip(completions, answer, strict=True)]
        return rewards

    rows = [{"prompt": template.replace("{question}", p.question), "answer": p.answer} for p in problems]
    options = GRPOConfig(
        output_dir=str(ROOT / "runs/bench/trl"), use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=N_PROMPTS * GROUP_SIZE // n_pieces, gradient_accumulation_steps=n_pieces,
        steps_per_generation=n_pieces, num_generations=GROUP_SIZE, max_completion_length=MAX_TOKENS,
        num_iterations=2,  # so that it keeps old log-probs
        gradient_checkpointing=False, temperature=TEMPERATURE, **case.trl,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model, reward_funcs=reward, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = n_pieces  # set by Trainer.train
    trainer._get_per_token_logps_and_entropies = functools.partial(float64_log_probs, TEMPERATURE)
    trainer.model.train()
    return trainer, rewards


def float64_log_probs(
    temperature: float, model: torch.nn.Module, ids: Tensor, mask: Tensor, n_kept: int, **_: Any
) -> tuple[Tensor, Tensor, None]:
    """(B, T) ids, padded on the left -> (B, n_kept) log-probs of the last ones; entropies of 0, which only TRL logs."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits[:, -n_kept - 1 : -1].double()
    log_probs = (logits / temperature).log_softmax(-1).gather(-1, ids[:, -n_kept:, None])[..., 0]
    return log_probs, torch.zeros_like(log_probs), None


def use_float64_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Give the model's RMS norms, which transformers computes in float32, the dtype of the weights; returns it."""

    def norm(module: torch.nn.Module, hidden: Tensor) -> Tensor:
        return module.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = functools.partial(norm, module)
    return model


def our_batch(inputs: dict[str, Tensor], rewards: list[float], training: Training) -> TrainBatch:
    """TRL's ids as our batch, with advantages of our own."""
    rollouts = []
    for i in range(len(rewards)):
        prompt, response = (
            tuple(inputs[f"{part}_ids"][i][inputs[f"{part}_mask"][i].bool()].tolist())
            for part in ("prompt", "completion")
        )
        rollouts.append(Rollout(Prompt(Problem("", "0"), "", prompt), "", response, (-1.0,) * len(response), "stop"))
    raw = torch.tensor(rewards, dtype=torch.float64)
    return make_train_batch(rollouts, raw, compute_advantages(raw, training))


def move(model: torch.nn.Module) -> None:
    """Move all weights at random, by the same for each model."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += STEP * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def trl_gradient(trainer: GRPOTrainer, inputs: dict[str, Tensor], n_pieces: int) -> Tensor:
    trainer.model.zero_grad()
    n = len(inputs["advantages"])
    for rows in torch.arange(n).split(n // n_pieces):
        piece = {name: values[rows] if values.ndim else values for name, values in inputs.items()}
        trainer.compute_loss(trainer.model, piece).backward()
    return torch.cat([p.grad.flatten() for _, p in sorted(trainer.model.named_parameters())])


def our_gradient(policy: torch.nn.Module, batch: TrainBatch, training: Training) -> tuple[Tensor, dict[str, float]]:
    """The gradient by which a step of plain gradient descent moves the weights, and the step's metrics."""
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    result = update_policy(policy, torch.optim.SGD(policy.parameters(), lr=1.0), batch, training, 0)
    gradient = torch.cat([(before[name] - p.detach()).flatten() for name, p in sorted(policy.named_parameters())])
    return gradient, result.metrics


def compare(case: Case, off_policy: bool, n_pieces: int, model: torch.nn.Module, tokenizer: Any) -> dict[str, Any]:
    """|ours - TRL's| / |TRL's| of the gradients, the same of the advantages, and what the batch was like."""
    torch.manual_seed(0)
    training = our_training(case, n_pieces)
    trainer, rewards = build_trainer(case, n_pieces, use_float64_norms(copy.deepcopy(model)), tokenizer)
    rows = [row for row in trainer.train_dataset for _ in range(GROUP_SIZE)]
    inputs = trainer._generate_and_score_completions(rows)
    batch = our_batch(inputs, rewards, training)
    advantages = inputs["advantages"].double()
    apart = (batch.advantages - advantages).norm() / advantages.norm()
    inputs["advantages"] = batch.advantages  # in float64; TRL's own are float32
    policy = our_policy(model, training)
    if off_policy:
        batch = with_old_log_probs(policy, batch, training)
        batch = replace(batch, sampler_log_probs=batch.old_log_probs)  # TRL's mask takes the old ones without vLLM
        move(policy)
        move(trainer.model)
    else:
        del inputs["old_per_token_logps"]
        batch = replace(batch, sampler_log_probs=with_old_log_probs(policy, batch, training).old_log_probs)
    if training.kl_coef:
        batch = replace(batch, reference_log_probs=on_our_grid(inputs["ref_per_token_logps"], inputs, batch))
    theirs = trl_gradient(trainer, inputs, n_pieces)
    ours, metrics = our_gradient(policy, batch, training)
    return {
        "gradient": ((ours - theirs).norm() / theirs.norm()).item(),
        "advantages": apart.item(),
        "clipped": metrics.get("clip_fraction", 0.0),
        "lengths": batch.response_mask.sum(dim=1).tolist(),
        "rewards": rewards,
    }


def our_policy(model: torch.nn.Module, training: Training) -> torch.nn.Module:
    """Our own loading of the model, then its weights in float64."""
    policy = load_policy(str(ROOT / "data/tiny/model"), training).double()
    policy.load_state_dict(model.state_dict())
    return use_float64_norms(policy)


def on_our_grid(values: Tensor, inputs: dict[str, Tensor], batch: TrainBatch) -> Tensor:
    """(B, C) of TRL's completions -> (B, T-1) aligned with our labels."""
    grid = torch.zeros(batch.response_mask.shape, dtype=torch.float64)
    grid[batch.response_mask] = values[inputs["completion_mask"].bool()].double()
    return grid


def measure() -> Iterator[tuple[Case, list[dict[str, Any]]]]:
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(str(ROOT / "data/tiny/model"))
    model = AutoModelForCausalLM.from_pretrained(ROOT / "data/tiny/model", dtype=torch.float64, trust_remote_code=False)
    for case in CASES:
        yield case, [compare(case, off_policy, n_pieces, model, tokenizer) for off_policy, n_pieces in SETTINGS]


PROSE = """\
On-policy is an optimizer step on the weights that sampled. Off-policy every weight has moved at random since. "Clipped"
is the share of tokens whose loss the clip changes there. "Advantages" is the same quotient of the advantages, which TRL
has in float32; both losses then get ours. TRL adds 1e-4 to the standard deviation, so `advantage_eps` is 1e-4 here; by
default it is 1e-6. All else is TRL's default.

They differ where the definitions do:

- TRL's `bnpo` averages over the tokens of each microbatch and then over microbatches. `normalize_mode: token` averages
  over all tokens of the optimizer step, however it is cut, as TRL's `dapo` does.
- `kl_coef` multiplies the estimate of the KL by the ratio, as TRL does by default. Without `use_bias_correction_kl` TRL
  leaves the ratio out, as DeepSeekMath does. On-policy the policy is here its own reference, and the term is 0.
- TRL keeps the temperatures of `sapo` in float32, where 1.05 is off by 5e-8."""


def page(rows: list[tuple[Case, list[dict[str, Any]]]]) -> str:
    """The table and what it says, as Markdown."""
    import transformers
    import trl

    batch = rows[0][1][0]
    lengths, n_right = batch["lengths"], int(sum(batch["rewards"]))
    lines = [f"| {' | '.join(COLUMNS)} |", f"| {' | '.join(['---'] * len(COLUMNS))} |"]
    for case, found in rows:
        changed, options = (", ".join(f"`{k}={v}`" for k, v in fields.items()) for fields in (case.ours, case.trl))
        cells = [f"{outcome['gradient']:.0e}" for outcome in found]
        share = f"{100 * found[1]['clipped']:.0f} %" if found[1]["clipped"] else "–"
        cells = [case.recipe, changed or "–", options, *cells, share, f"{found[0]['advantages']:.0e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return f"""# Our losses beside TRL's

|ours - TRL's| / |TRL's| of the gradient of all weights, on one batch of {len(lengths)} responses of {min(lengths)} to
{max(lengths)} tokens in groups of {GROUP_SIZE}, {n_right} of them right, with the quickstart's model in float64. TRL's
`GRPOTrainer` sampled the batch and computed its loss with its own code; ours is the gradient of the training loop.

{chr(10).join(lines)}

{PROSE}

TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}. The command:

```bash
python play-scripts/bench/losses_trl.py --output results/algorithm
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder that README.md is written to; without it, it is printed")
    args = parser.parse_args()
    if importlib.util.find_spec("trl") is None:
        print("skipped: TRL is not installed; pip install 'trl==1.16.*'")
        return
    text = page(list(measure()))
    if args.output is None:
        print(text)
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        write_atomically(args.output / "README.md", text)


if __name__ == "__main__":
    main()

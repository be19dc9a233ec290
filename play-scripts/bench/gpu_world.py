"""What the GPU report runs on, made on the spot: a model with random weights, data, configs, response lengths."""

from __future__ import annotations

import json
import random
from pathlib import Path

from engines import random_policy

from configs.defaults import Config
from utils import tiny
from utils.preflight.config import load_config_and_origins
from utils.preflight.fit import fit_to_card
from utils.seeding import derive_seed

ROOT = Path(__file__).parents[2]
PUBLISHED_SHAPE = "qwen2.5-1.5b"
MEAN_RESPONSE, LONGEST_RESPONSE = 400, 1024  # tokens, as published runs have them
TINY = [
    "training.device=cpu",
    "training.dtype=float32",
    "vllm.dtype=float32",
    "training.use_bnb_adamw8bit=false",
    "training.cpu_threads=1",
    "training.use_gradient_checkpointing=false",
    "training.use_vllm_sleep_mode=false",
    "training.rollout_engine=transformers",
    "training.rollout_batch_size=32",
    "training.train_batch_size=32",
    "training.gradient_accumulation_steps=4",
    "training.max_tokens=16",
    "training.max_val_examples=16",
    "grader.workers=1",
]
COMMON = [
    "training.skip_zero_advantage=false",
    "training.checkpoint_interval=1",
    "training.eval_interval=1000",
    "training.stop=[]",
    "training.min_tokens=0",
    "guard.action=off",
    "vllm.check_interval=1",
    "training.loss_type=reinforce_with_baseline",
]  # all groups are trained, and every step is saved


def make_world(folder: Path, is_tiny: bool, model: str | None) -> None:
    """Write problems, a template that adds nothing, and, unless a model is given, one of the published shape."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    lengths = [rng.randint(5, 20) if is_tiny else rng.randint(100, 300) for _ in range(1024)]  # bytes, so tokens
    rows = [{"problem": "".join(rng.choices("abcdefgh", k=n)), "answer": str(i)} for i, n in enumerate(lengths)]
    (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompt").write_text("{question}")
    if model is None and not (folder / "model").exists():
        if is_tiny:
            policy, tokenizer = tiny.build_model(seed=0), tiny.build_tokenizer()
        else:
            config = Config()
            config.training.device = "cpu"
            policy, tokenizer = random_policy(PUBLISHED_SHAPE, config)
        policy.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")


def options_of(folder: Path, is_tiny: bool, model: str | None, overlay: str | None) -> list[str]:
    """The command line of train_grpo.py for this world."""
    files = [] if is_tiny else ["--config", str(ROOT / "configs/math.yaml")]
    if overlay:
        files += ["--config", str(ROOT / f"configs/hardware/{overlay}.yaml")]
    data = [f"paths.{name}={folder}/problems.jsonl" for name in ("train_data_file", "val_data_file")]
    paths = [f"paths.prompt_template_file={folder}/prompt", f"paths.model_path={model or folder / 'model'}"]
    return [*files, *data, *paths, f"paths.output_dir={folder}/run", *COMMON, *(TINY if is_tiny else [])]


def config_of(options: list[str], *overrides: str) -> Config:
    """The config that train_grpo.py makes of these options, with what follows from the card."""
    files = [options[i + 1] for i, option in enumerate(options) if option == "--config"]
    settings = [option for option in options if "=" in option]
    return fit_to_card(*load_config_and_origins(files, [*settings, *overrides]))[0]


def response_length(longest: int, *path: int) -> int:
    """A length drawn like the published ones: Gamma-distributed with their mean, in proportion to the longest."""
    rng = random.Random(derive_seed(0, "lengths", *path))
    return max(1, min(longest, int(rng.gammavariate(3, longest * MEAN_RESPONSE / LONGEST_RESPONSE / 3))))

"""Build the parts of a run from its config: mistakes are found before anything slow is loaded or anything written."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from configs.defaults import Config
from utils.checkpoint import Checkpoints, TrainState, changed_fields
from utils.config import ConfigError, load_config, save_config, to_dict
from utils.dataset import ProblemStream, build_prompts, fixed_subset, load_problems, load_template
from utils.ending import StopRequest, TimeLimit
from utils.engines import build_engine
from utils.grader import Grader
from utils.guard import Advisor, CollapseGuard
from utils.memory import MemoryTracker
from utils.policy import build_optimizer, context_length, load_policy, load_tokenizer
from utils.preflight import check_machine
from utils.records import Prompt
from utils.rewards import RewardScorer
from utils.run import Run
from utils.run_files import METRICS_FILE, lock_run, save_run_info
from utils.run_log import RunLog
from utils.seeding import restore_random_state, seed_everything
from utils.trial import try_longest_microbatch

CONFIG_FILE = "config.yaml"


def build_run(config: Config, resume: bool, allow_changes: bool, stop: StopRequest, limit: TimeLimit) -> Run:
    """Everything that `train` needs, from the newest checkpoint in `output_dir` where `resume`.

    Raises ValueError for what the user can mend: missing files, bad rows, a folder that holds a run, a changed config.
    """
    t, output_dir = config.training, Path(config.paths.output_dir)
    check_start(config)
    lock = lock_run(output_dir) if output_dir.exists() else None
    checkpoint = find_checkpoint(config, resume, allow_changes)
    scorer = RewardScorer(t.reward_fn, t.extra_rewards, Grader(**to_dict(config)["grader"]))
    model_path = config.paths.model_path if checkpoint is None else str(checkpoint)
    tokenizer = load_tokenizer(model_path)
    train_prompts, notes = load_prompts(config, config.paths.train_data_file, tokenizer)
    validation_prompts, more_notes = load_prompts(config, config.paths.val_data_file, tokenizer)
    problem_stream = ProblemStream(train_prompts, t.seed)
    longest_prompt = max(len(prompt.token_ids) for prompt in (*train_prompts, *validation_prompts))

    seed_everything(t.seed)
    policy = load_policy(model_path, t)
    optimizer = build_optimizer(policy, t)
    engine = build_engine(config, policy, tokenizer, longest_prompt=longest_prompt)
    if t.try_longest_microbatch and t.device.startswith("cuda"):  # on the CPU the system ends a process without a word
        engine.sleep()  # as it will while the policy trains
        try_longest_microbatch(policy, t, longest_prompt)
        engine.update_weights(policy)
    stop.install()  # vLLM and others may have put handlers of their own in place

    lock = lock or lock_run(output_dir)
    checkpoints = Checkpoints(output_dir / "checkpoints", t.checkpoint_keep)
    guard, advisor = CollapseGuard(config), Advisor(config)
    state = TrainState(problem_stream=problem_stream.state_dict())
    if checkpoint is not None:
        state = checkpoints.load(checkpoint, optimizer)
        if state.skipped_in_a_row >= t.max_nonfinite_steps:  # what ended the run; a resume is another try
            state = replace(state, skipped_in_a_row=0)
        problem_stream.load_state_dict(state.problem_stream)
        guard.load_state_dict(state.guard)
        advisor.load_state_dict(state.advisor)
    log = open_log(config, output_dir, resume, state)
    log.note(f"rollouts by the {engine.name} engine")
    for note in [*notes, *more_notes]:
        log.warn(note)
    if checkpoint is not None:
        restore_random_state(state.random)  # last: loading models, engine and tracker draws from these generators
    return Run(
        config=config,
        policy=policy,
        tokenizer=tokenizer,
        optimizer=optimizer,
        engine=engine,
        scorer=scorer,
        problem_stream=problem_stream,
        validation_prompts=fixed_subset(validation_prompts, t.max_val_examples, t.seed),
        checkpoints=checkpoints,
        guard=guard,
        advisor=advisor,
        log=log,
        memory=MemoryTracker(torch.device(t.device), t.track_peak_memory),
        stop=stop,
        limit=limit,
        state=state,
        lock=lock,
    )


def check_start(config: Config) -> None:
    """Raise ConfigError for what can be seen to be missing before anything is loaded or written."""
    check_machine(config)
    device, output_dir = config.training.device, Path(config.paths.output_dir)
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"training.device = {device!r}: torch finds no GPU that it can use; set training.device=cpu")
    if output_dir.exists() and not output_dir.is_dir():
        raise ConfigError(f"paths.output_dir = {str(output_dir)!r} is a file; give a folder")


def find_checkpoint(config: Config, resume: bool, allow_changes: bool) -> Path | None:
    """The checkpoint to go on from, None to begin. Raises ConfigError where the folder's run forbids either."""
    output_dir = Path(config.paths.output_dir)
    saved_config, holds_run = output_dir / CONFIG_FILE, (output_dir / METRICS_FILE).exists()
    if not resume:
        if holds_run or saved_config.exists():
            raise ConfigError(
                f"paths.output_dir = {str(output_dir)!r} already holds a run; continue it with --resume, or choose "
                "another folder"
            )
        return None
    if not saved_config.exists():
        return None
    changed = changed_fields(load_config([saved_config]), config)
    if changed and not allow_changes:
        raise ConfigError(
            f"the run in {str(output_dir)!r} was begun with another config, and these fields may not change: "
            f"{'; '.join(changed)}. Give them the saved values, or insist with --allow-changes"
        )
    return Checkpoints(output_dir / "checkpoints", config.training.checkpoint_keep).newest()


def load_prompts(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[str]]:
    """The prompts of a data file, and what is to be said about rows that were left out."""
    t = config.training
    longest = t.max_prompt_tokens
    if longest is None:
        longest = context_length(config.paths.model_path) - t.max_tokens
        if longest < 1:
            raise ConfigError(
                f"training.max_tokens = {t.max_tokens} leaves no room for a prompt in the model's context of "
                f"{longest + t.max_tokens} tokens; lower it"
            )
    template = load_template(config.paths.prompt_template_file)
    problems = load_problems(path)
    prompts, n_left_out = build_prompts(problems, template, tokenizer, longest, t.use_chat_template, t.system_prompt)
    left_out = f"{path}: left out {n_left_out} of {len(problems)} problems, their prompts are over {longest} tokens"
    return prompts, [left_out] if n_left_out else []


def open_log(config: Config, output_dir: Path, resume: bool, state: TrainState) -> RunLog:
    """Open the run's log; write down its config, and what it runs on."""
    t = config.training
    resumes_run = resume and (output_dir / METRICS_FILE).exists()
    log = RunLog(
        output_dir,
        n_grpo_steps=t.n_grpo_steps,
        wandb_project=t.wandb_project,
        wandb_run_name=t.wandb_run_name,
        wandb_tags=t.wandb_tags,
        config=to_dict(config),
        tracker_id=state.tracker_id,
        resume_at=state.grpo_step if resumes_run else None,
        evaluated_at=-1 if state.evaluated_step is None else state.evaluated_step,
    )
    save_config(config, output_dir / CONFIG_FILE)
    save_run_info(output_dir, t.seed)
    if resume and state.grpo_step == 0:
        log.note(f"no checkpoint in {output_dir} yet: starting from the beginning")
    elif resume:
        log.note(f"resuming after GRPO step {state.grpo_step}")
    return log

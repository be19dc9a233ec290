"""Build the parts of a run from its config; a start that is refused leaves its output folder as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from configs.defaults import DEFAULT_PROJECT, Config, Training
from utils.adapter_files import is_own_reference, other_adapter
from utils.algorithm.adapters import describe, has_adapter
from utils.algorithm.head import find_head, head_of
from utils.algorithm.loss_scale import fit_loss_scale
from utils.algorithm.losses import find_loss
from utils.algorithm.optimizers import LOST_ABOVE, share_that_can_move
from utils.algorithm.packing import is_packable
from utils.algorithm.parallel import check_same_weights, first, is_first, join_cards, n_ranks
from utils.algorithm.policy import (
    build_optimizer,
    context_length,
    load_policy,
    load_reference,
    load_tokenizer,
    trainable,
)
from utils.engines import build_engine
from utils.engines.split_engine import SplitEngine
from utils.log.files import CONFIG_FILE, save_run_info
from utils.log.null_log import NullLog
from utils.log.output import claimed, holds_run
from utils.log.run_log import RunLog
from utils.own_code import digests
from utils.preflight.adapter_checks import adapter_notes
from utils.preflight.config import save_config, to_dict
from utils.preflight.config_rules import ConfigError, own_code
from utils.preflight.machine import machine_notes
from utils.preflight.obstacles import output_obstacles, refuse
from utils.preflight.two_cards import card_obstacles
from utils.problems import (
    ProblemStream,
    build_prompts,
    fixed_subset,
    load_problems,
    load_template,
    notes_on_data,
)
from utils.records import Prompt, RolloutEngine
from utils.rewards.functions import RewardScorer, find_reward_fn
from utils.rewards.grader import Grader
from utils.rewards.split_scorer import SplitScorer
from utils.run.background_save import BackgroundSaver, IdleSaver
from utils.run.checkpoint import Checkpoints, TrainState
from utils.run.ending import StopRequest, TimeLimit
from utils.run.engine_check import EngineCheck
from utils.run.learner import Learner
from utils.run.memory_tracker import MemoryTracker
from utils.run.run import Run
from utils.run.start import check_shared_folder, new_token, open_nothing, together, what_resume_found
from utils.run.step_meter import StepMeter
from utils.run.trial import try_longest_microbatch
from utils.run.watchers import Watchers
from utils.seeding import restore_random_state, seed_everything

MOST_ARE_LOST = 0.1  # below this share of weights that can move, a run says so at its start


def build_run(
    config: Config,
    resume: bool,
    allow_changes: bool,
    stop_request: StopRequest,
    limit: TimeLimit,
    first_lines: Sequence[str] = (),
) -> Run:
    """Everything that `train` needs, from the newest checkpoint in `output_dir` if `resume`.

    `first_lines` are shown as the log opens.

    Raises ValueError for what the user can fix: a model that does not load, a folder that holds a run, a changed
    config. The output folder is then as it was before.
    """
    device, output_dir = config.training.device, Path(config.paths.output_dir)
    with contextlib.ExitStack() as claim:
        with together():
            stop_request.check_while_loading()
            if device.startswith("cuda") and not torch.cuda.is_available():
                fault = "torch finds no GPU that it can use; set training.device=cpu"
                raise ConfigError(f"training.device = {device!r}: {fault}")
            refuse(card_obstacles(config, torch.cuda.device_count))
            found = None
            if is_first():
                lock = claim.enter_context(claimed(output_dir))
                found = new_token(lock), find_checkpoint(config, resume, allow_changes)
        token, checkpoint = first(found)
        with together():
            check_shared_folder(output_dir, token)
            try_own_code(config)
        run = assemble(config, checkpoint, resume, stop_request, limit, lock if is_first() else open_nothing())
        if device.startswith("cuda"):
            join_cards()
        check_same_weights(run.learner.policy)
        run.state = first(run.state)  # rank 0 alone has read the log
    for line in first_lines:
        run.log.note(line)
    return run


def assemble(
    config: Config, checkpoint: Path | None, resume: bool, stop_request: StopRequest, limit: TimeLimit, lock: TextIO
) -> Run:
    """Load, build and restore the parts of a run, and begin to write its files."""
    t, output_dir = config.training, Path(config.paths.output_dir)
    model_path = config.paths.model_path if checkpoint is None else str(checkpoint)
    with together():  # before anything is written: a start that any rank refuses leaves the folder as it was
        tokenizer = load_tokenizer(model_path)
        train_prompts, notes = load_prompts(config, config.paths.train_data_file, tokenizer)
        validation_prompts, more_notes = load_prompts(config, config.paths.val_data_file, tokenizer)
        problem_sets = [[prompt.problem for prompt in prompts] for prompts in (train_prompts, validation_prompts)]
        more_notes += notes_on_data(*problem_sets, prompts_per_step=t.rollout_batch_size // t.group_size)
        stop_request.check_while_loading()
        longest_prompt = max(len(prompt.token_ids) for prompt in (*train_prompts, *validation_prompts))
        policy, optimizer, engine = build_learner(config, model_path, tokenizer, longest_prompt)
        reference = build_reference(config, policy) if t.kl_coef else None
        stop_request.check_while_loading()
        stop_request.install()  # vLLM and others may have put handlers of their own in place

        problem_stream, watchers = ProblemStream(train_prompts, t.seed), Watchers(config)
        checkpoints = Checkpoints(output_dir / "checkpoints", t.checkpoint_keep)
        state = TrainState(problem_stream=problem_stream.state_dict())
        if checkpoint is not None:
            state = checkpoints.load(checkpoint, optimizer)
            fit_loss_scale(optimizer, t.autocast_dtype)  # one may have been saved
            problem_stream.load_state_dict(state.problem_stream)
            watchers.load_state_dict(state.guard, state.advisor)
            if state.skipped_in_a_row >= t.max_nonfinite_steps:  # what ended the run; a resume is another try
                state = replace(state, skipped_in_a_row=0)
        notes += [*more_notes, *notes_on_policy(policy, t), *machine_notes(config), *adapter_notes(config)]
    with together():
        log = open_log(config, resume, state, engine.name, notes) if is_first() else NullLog()
    if has_adapter(policy):
        log.note(describe(policy))
    if is_first():
        checkpoints.tidy()  # not before everything was read: until here a damaged run is as it was
    if log.lost_evaluation:
        state = replace(state, evaluated_step=None)
    if checkpoint is not None:
        restore_random_state(state.random)  # last: loading models, engine and tracker draws from these generators
    split = n_ranks() > 1
    scorer_class = SplitScorer if split else RewardScorer
    scorer = scorer_class(t.reward_fn, t.extra_rewards, Grader(**to_dict(config)["grader"]))
    engine = SplitEngine(engine) if split else engine
    return Run(
        config=config,
        learner=Learner(policy, tokenizer, optimizer, engine, scorer, problem_stream, reference),
        validation_prompts=fixed_subset(validation_prompts, t.max_val_examples, t.seed),
        checkpoints=checkpoints,
        saver=BackgroundSaver(checkpoints) if is_first() else IdleSaver(checkpoints),
        watchers=watchers,
        engine_check=EngineCheck(config),
        log=log,
        meter=StepMeter(MemoryTracker(torch.device(t.device), t.track_peak_memory)),
        stop_request=stop_request,
        limit=limit,
        state=state,
        lock=lock,
    )


def build_learner(
    config: Config, model_path: str, tokenizer: PreTrainedTokenizerBase, longest_prompt: int
) -> tuple[PreTrainedModel, torch.optim.Optimizer, RolloutEngine]:
    """The policy, its optimizer and the engine that samples from it; on a GPU, a longest-case microbatch is tried."""
    t = config.training
    if (reason := other_adapter(model_path, t)) is not None:
        raise ConfigError(reason)
    seed_everything(t.seed)
    policy = load_policy(model_path, t)
    head_of(policy, t.head_dtype)  # refuses a head that cannot be in float32, before anything is sampled
    optimizer = build_optimizer(policy, t)
    engine = build_engine(config, policy, tokenizer, longest_prompt=longest_prompt)
    if t.try_longest_microbatch and t.device.startswith("cuda"):  # on the CPU the system ends a process without a word
        engine.sleep()  # as it will while the policy trains
        try_longest_microbatch(policy, t, longest_prompt)
        engine.update_weights(policy)
    return policy, optimizer, engine


def build_reference(config: Config, policy: PreTrainedModel) -> PreTrainedModel:
    """What a KL term measures from: the policy itself without its adapter, where that is the model it began as."""
    if is_own_reference(config):
        return policy
    return load_reference(config.training.reference_path or config.paths.model_path, policy, config.training)


def try_own_code(config: Config) -> None:
    """Load the user's own functions, which tries them. Raises ValueError with field, file and line."""
    for field, names in own_code(config).items():
        for name in names:
            try:
                find_loss(name) if field == "training.loss_type" else find_reward_fn(name)
            except ValueError as error:
                raise ConfigError(f"{field} = {name!r}: {error}") from error


def notes_on_policy(policy: PreTrainedModel, training: Training) -> list[str]:
    """Which parts of this model make training slower or take more memory than usual."""
    notes, name = [], type(policy).__name__
    if training.use_packing and not is_packable(policy):
        notes.append(
            f"training.use_packing: a packed pass does not give the numbers of {name} with {training.attention_type} "
            "attention, so microbatches are padded"
        )
    if find_head(policy) is None:
        notes.append(
            f"{name} does more to its logits than a matrix product, a scale and a cap: log-probs are computed from "
            "full logits, which takes more memory"
        )
    return [*notes, *notes_on_precision(policy, training)]


def notes_on_precision(policy: PreTrainedModel, training: Training) -> Iterator[str]:
    """Whether bfloat16 will round most updates away, counted on the loaded weights."""
    weights = [parameter for parameter in trainable(policy) if parameter.dtype == torch.bfloat16]
    if not weights or training.optimizer_name == "adamw8bit_master":
        return
    share = share_that_can_move(weights, training.learning_rate)
    if share < MOST_ARE_LOST:
        yield (
            f"training.learning_rate = {training.learning_rate:g} with dtype bfloat16: at most {100 * share:.2g} % of "
            "the weights will move (train/frac_weights_moved), as a step is rounded away where a weight is larger than "
            f"{LOST_ABOVE} times the rate; set training.optimizer=adamw8bit_master (2 bytes per weight more than "
            "adamw8bit), or training.dtype=float32 with training.autocast_dtype=bfloat16"
        )


def find_checkpoint(config: Config, resume: bool, allow_changes: bool) -> Path | None:
    """The checkpoint to resume from, or None to begin. Raises ConfigError if the folder's run forbids it."""
    refuse(output_obstacles(config, resume, allow_changes))  # asked before; another process may have come since
    checkpoints = Path(config.paths.output_dir) / "checkpoints"
    return Checkpoints(checkpoints, config.training.checkpoint_keep).newest() if resume else None


def load_prompts(config: Config, path: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Prompt], list[str]]:
    """The prompts of a data file, and a note about rows that were left out, if any."""
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


def open_log(config: Config, resume: bool, state: TrainState, engine_name: str, notes: list[str]) -> RunLog:
    """Save the config and this launch, open the run's log, and print how far the run has come and the notes."""
    t, output_dir = config.training, Path(config.paths.output_dir)
    held_run = holds_run(output_dir)
    own = digests(name for names in own_code(config).values() for name in names)
    # these two come first: a disk that is full refuses them before the log is open
    save_run_info(output_dir, t.seed, own)
    save_config(config, output_dir / CONFIG_FILE)
    log = RunLog(
        output_dir,
        n_grpo_steps=t.n_grpo_steps,
        trackers=t.tracker_names,
        tracker_project=t.wandb_project or DEFAULT_PROJECT,
        tracker_run_name=t.wandb_run_name,
        tracker_tags=t.wandb_tags,
        config=to_dict(config),
        tracker_id=state.tracker_id,
        resume_at=state.steps_done if resume else None,
        evaluated_at=-1 if state.evaluated_step is None else state.evaluated_step,
    )
    if resume:
        tell = log.note if state.steps_done else log.warn
        tell(what_resume_found(output_dir, state.steps_done, t.n_grpo_steps, held_run))
    own_card = "" if config.vllm.device is None else f" on {config.vllm.device}, which never sleeps"
    log.note(f"rollouts by the {engine_name} engine{own_card}")
    for note in notes:
        log.warn(note)
    return log

"""The vLLM engine's life: knobs that can't work, starts and ends, in this process and in real ones of their own."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_cases import (
    LONGEST_PROMPT,
    asked_to_stop,
    assert_same_greedy,
    cpu_config,
    ids_of,
    needs_vllm_cpu,
    preserved_environment,
    prompts_of,
    sampling,
    set_sampling,
    sharpen,
    start,
    tiny_policy,  # noqa: F401, the fixture `policy`
    tiny_tokenizer,  # noqa: F401, the fixture `tokenizer`
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2Config

from utils import tiny
from utils.run.engine_check import compare_log_probs

pytestmark = needs_vllm_cpu


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    with preserved_environment():
        yield


# What can't work says so first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 335}, r"vllm\.max_model_len=335 is below the 336 tokens of the longest prompt \(320\)"),
        (
            {"max_model_len": 4096},
            r"vllm\.max_model_len=4096 is above .* context of 2048 tokens: lower it, or set it to",
        ),
        ({"cpu_kv_cache_mb": 1, "max_model_len": 2000}, r"vllm\.cpu_kv_cache_mb=1 can't hold one sequence of 2000"),
        ({"cpu_kv_cache_mb": 10**9}, r"vllm\.cpu_kv_cache_mb=1000000000, but only \d+ MiB of memory are free"),
    ],
)
def test_knobs_that_cannot_work(
    tiny_model_dir: Path, policy: PreTrainedModel, changes: dict[str, int], message: str
) -> None:
    from utils.engines.vllm_start import check_knobs

    config = cpu_config(tiny_model_dir)
    for name, value in changes.items():
        assert hasattr(config.vllm, name)
        setattr(config.vllm, name, value)
    with pytest.raises(ValueError, match=message):
        check_knobs(config, policy, LONGEST_PROMPT)


def test_prompts_and_responses_longer_than_the_context(tiny_model_dir: Path, policy: PreTrainedModel) -> None:
    """The derived max_model_len is too long: not its knob is named, but those of what it was derived from."""
    from utils.engines.vllm_start import check_knobs

    message = (
        r"prompt \(320 tokens\) and training\.max_tokens \(1729\) are more .* 2048 tokens: lower training\.max_tok"
    )
    with pytest.raises(ValueError, match=message):
        check_knobs(cpu_config(tiny_model_dir, max_tokens=1729), policy, LONGEST_PROMPT)


def test_max_model_len_is_derived(tiny_model_dir: Path, policy: PreTrainedModel) -> None:
    from utils.engines.vllm_start import check_knobs

    config = cpu_config(tiny_model_dir)
    assert check_knobs(config, policy, LONGEST_PROMPT) == LONGEST_PROMPT + config.training.max_tokens


def test_kv_cache_bytes_by_hand() -> None:
    """Keys and values, 3 layers, 2 heads of 128 / 4 each; 4 bytes in float32, 2 in bfloat16."""
    from utils.engines.vllm_start import kv_cache_bytes_per_token

    shape = Qwen2Config(hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    config = cpu_config(Path("model"))
    assert kv_cache_bytes_per_token(config, SimpleNamespace(config=shape)) == 2 * 3 * 2 * 32 * 4
    config.vllm.dtype = "bfloat16"
    assert kv_cache_bytes_per_token(config, SimpleNamespace(config=shape)) == 2 * 3 * 2 * 32 * 2


@pytest.mark.parametrize(
    ("utilization", "message"),
    [
        (0.00001, r"vllm\.gpu_memory_utilization=1e-05 is 0\.0 GB, but weights"),
        (0.5, r"vllm\.gpu_memory_utilization=0\.5 is 12\.0 GB, but only 6\.0 of 24\.0 GB are free"),
    ],
)
def test_gpu_memory_that_cannot_suffice(
    monkeypatch: pytest.MonkeyPatch,
    tiny_model_dir: Path,
    policy: PreTrainedModel,
    utilization: float,
    message: str,
) -> None:
    from utils.engines.vllm_start import check_knobs

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6_000_000_000, 24_000_000_000))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    config = cpu_config(tiny_model_dir, device="cuda:0")
    config.vllm.gpu_memory_utilization = utilization
    with pytest.raises(ValueError, match=message):
        check_knobs(config, policy, LONGEST_PROMPT)


def test_a_gpu_of_its_own_is_current_while_weights_come_from_the_policys(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """With stand-ins for CUDA and for vLLM: every weight is copied, on vLLM's card, and that card is waited for."""
    from utils.engines import vllm_engine
    from utils.engines.vllm_start import device_options

    events: list[str] = []
    copies: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def card(index: int) -> Iterator[None]:
        events.append(f"card {index}")
        yield
        events.append("card back")

    def reload(_method: str, kwargs: dict[str, Iterator[tuple[str, torch.Tensor]]]) -> None:
        events.append("reload")
        copies.update((name, tensor.clone()) for name, tensor in kwargs["weights_iterator"])

    monkeypatch.setattr(torch.cuda, "device", card)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    config = cpu_config(tiny_model_dir, device="cuda:1")
    config.vllm.device = "cuda:0"
    assert device_options(config, 336) == {"gpu_memory_utilization": 0.2, "enable_sleep_mode": False}
    llm = SimpleNamespace(get_tokenizer=lambda: None, collective_rpc=reload, reset_prefix_cache=lambda: True)
    monkeypatch.setattr(vllm_engine, "start_vllm", lambda *_: llm)
    monkeypatch.setattr(vllm_engine, "check_same_tokenizer", lambda *_: None)
    engine = vllm_engine.VllmEngine(config, policy, tokenizer, sampling(), LONGEST_PROMPT)
    del events[:]
    assert engine.sleep() == {}
    engine.update_weights(policy)
    assert events == ["card 0", "reload", "wait", "card back"]
    assert copies.keys() == policy.state_dict().keys()
    assert all(torch.equal(copies[name], tensor) for name, tensor in policy.state_dict().items())


def test_out_of_memory_at_the_start_names_the_knobs(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from utils.engines import vllm_start

    def fail(**_options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm_start, "LLM", fail)
    with pytest.raises(RuntimeError) as caught:
        start(cpu_config(tiny_model_dir), policy, tokenizer)
    for part in ("CUDA out of memory", "vllm.cpu_kv_cache_mb=256", "vllm.max_num_seqs=256", "vllm.max_model_len=336"):
        assert part in str(caught.value)
    config = cpu_config(tiny_model_dir, device="cuda:0")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1_500_000_000, 24_000_000_000))
    explained = vllm_start.explain_failed_start(config, 336, torch.OutOfMemoryError("CUDA out of memory"))
    assert "vllm.gpu_memory_utilization=0.2" in explained and "1.5 of 24.0 GB of GPU memory are free" in explained


def test_a_tokenizer_that_vllm_reads_differently_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    from utils.engines.vllm_engine import check_same_tokenizer

    check_same_tokenizer(tokenizer, tokenizer, len(tokenizer))
    other = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    other.backend_tokenizer.decoder = None
    with pytest.raises(ValueError, match="vLLM's tokenizer decodes differently"):
        check_same_tokenizer(tokenizer, other, len(tokenizer))


# Starts and ends


def test_same_greedy_ids_for_an_untied_padded_compiled_policy(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Half of the ids are padding, which the engine must never sample, and would with these weights."""
    config = tiny.build_model(seed=0, tie_embeddings=False).config
    config.vocab_size = 2 * len(tokenizer)
    policy = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    policy.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    sharpen(policy, seed=1)
    prompts = prompts_of(tokenizer, 64)
    with torch.no_grad():
        favourites = {policy(torch.tensor([p.token_ids])).logits[0, -1].argmax().item() for p in prompts}
    assert max(favourites) >= len(tokenizer)
    engine = start(cpu_config(tmp_path), policy, tokenizer)
    try:
        other = set_sampling(engine, policy)
        for seed in (1, 2):
            sharpen(policy, seed)
            engine.update_weights(torch.compile(policy))
            ours = engine.generate(prompts, n=1, seed=0, temperature=0.0)
            assert_same_greedy(ours, other.generate(prompts, n=1, seed=0, temperature=0.0))
        sampled = engine.generate(prompts, n=2, seed=0)
        assert max(max(ids) for ids in ids_of(sampled)) < len(tokenizer)
    finally:
        engine.close()


@pytest.fixture
def products_by_onednn() -> Iterator[None]:
    """What training.use_onednn sets."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.backends.mkldnn.matmul.fp32_precision = "none"


def test_start_and_use_leave_random_states_and_products_alone(
    tiny_model_dir: Path,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    products_by_onednn: None,
) -> None:
    """Started after others in this process; in bfloat16."""

    def states() -> list[object]:
        random_states = [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]
        return [*random_states, torch.backends.mkldnn.matmul.fp32_precision]

    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = states()
    config = cpu_config(tiny_model_dir, head_dtype="float32")
    config.vllm.dtype = "bfloat16"
    with caplog.at_level(logging.WARNING, logger="utils.engines.vllm_engine"):
        engine = start(config, policy, tokenizer, max_tokens=16)
        assert engine.sleep() == {} == engine.sleep()
    assert [record.message for record in caplog.records] == [
        "vLLM can't sleep on the CPU: training.use_vllm_sleep_mode has no effect"
    ]
    engine.update_weights(policy)
    rollouts = engine.generate(prompts_of(tokenizer, 8), n=2, seed=0)
    assert states() == before
    assert 1e-5 < compare_log_probs(engine, policy, rollouts, config)["check_mean_diff"] < 5e-2
    assert_float32_head_on_both_sides(engine, policy, rollouts, config)
    assert engine.generate(prompts_of(tokenizer, 8), n=2, seed=0, should_stop=asked_to_stop(2)) == []
    engine.close()
    engine.close()
    assert states() == before


def assert_float32_head_on_both_sides(engine, policy, rollouts, config) -> None:
    """The engine's head is tied to the embedding; a trainer in bfloat16 is nearer to it with a float32 head too."""
    assert policy.config.tie_word_embeddings
    narrow, gaps = copy.deepcopy(policy).bfloat16(), {}
    for head_dtype in (None, "float32"):
        config.training.head_dtype = head_dtype
        gaps[head_dtype] = compare_log_probs(engine, narrow, rollouts, config)["check_mean_diff"]
    assert gaps["float32"] < gaps[None]  # most of it is the layers' rounding in this untrained model


@pytest.mark.slow
def test_ctrl_c_in_a_generation_ends_all_processes(tiny_model_dir: Path) -> None:
    """A Python of its own, with vLLM in it to the end: the right exit status, and no process left behind."""
    import psutil  # comes with vLLM

    script = f"""
        import signal, sys, torch
        signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
        sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        from engine_cases import cpu_config, prompts_of
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from utils.engines import build_engine
        folder = {str(tiny_model_dir)!r}
        policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        prompts = prompts_of(tokenizer, 4)
        engine = build_engine(cpu_config(folder), policy, tokenizer, longest_prompt=320)
        try:
            assert len(engine.generate(prompts, n=2, seed=0)) == 8
            print("ready", flush=True)
            [engine.generate(prompts, n=8, seed=0) for _ in range(10**6)]
        finally:
            engine.close()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line == "ready\n":
            break
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGINT, errors
    group = [p.pid for p in psutil.process_iter() if p.pid != process.pid and _session_of(p.pid) == process.pid]
    assert not group


def _session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except (ProcessLookupError, PermissionError):
        return None


class FakeLlm:
    """Tells in which order an engine is woken and shut down."""

    def __init__(self, calls: list[str], fails: bool) -> None:
        self.calls, self.fails = calls, fails
        self.llm_engine = self.engine_core = self

    def wake_up(self) -> None:
        self.calls.append("wake")
        if self.fails:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def shutdown(self) -> None:
        self.calls.append("shutdown")


@pytest.mark.parametrize("fails", [False, True])
def test_a_sleeping_engine_is_woken_before_it_ends(fails: bool) -> None:
    from utils.engines.vllm_engine import VllmEngine

    engine, calls = VllmEngine.__new__(VllmEngine), []
    engine._llm, engine._asleep, engine._config = FakeLlm(calls, fails), True, cpu_config(Path("model"))
    engine.close()
    engine.close()
    assert calls == ["wake", "shutdown"] and engine._llm is None


def test_an_assertion_of_vllm_at_the_start_is_explained(
    monkeypatch: pytest.MonkeyPatch, tiny_model_dir: Path, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    from utils.engines import vllm_start

    def fail(**_options: object) -> None:
        raise AssertionError("CuMem allocator can only be used for one instance per process.")

    monkeypatch.setattr(vllm_start, "LLM", fail)
    with pytest.raises(RuntimeError, match="vLLM failed to start: CuMem allocator"):
        start(cpu_config(tiny_model_dir), policy, tokenizer)

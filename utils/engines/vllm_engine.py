"""Rollouts by vLLM inside the training process: on the policy's GPU, asleep while the policy trains, or on its own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase
from vllm import SamplingParams
from vllm.outputs import CompletionOutput

from configs.defaults import Config
from utils.algorithm.policy import checkpoint_name, full_weights
from utils.engines.responses import ResponseReader, check_rollouts, end_ids_of
from utils.engines.vllm_start import GB, compilation, free_gpu_bytes, give_memory_back, on_its_card, start_vllm
from utils.log.progress import progress_bar
from utils.records import Prompt, Rollout, Sampling
from utils.seeding import preserved_random_state

logger = logging.getLogger(__name__)


class VllmEngine:
    """Samples with vLLM from weights that `update_weights` copied out of the policy; random ones until then.

    `longest_prompt` is in tokens. Raises ValueError if a knob can't work, RuntimeError if vLLM fails to start.
    """

    name = "vllm"

    def __init__(
        self,
        config: Config,
        policy: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        longest_prompt: int,
    ):
        self.sampling, self._config = sampling, config
        self._dtype = getattr(torch, config.vllm.dtype)
        self.reader = ResponseReader(tokenizer, sampling, end_ids_of(policy, tokenizer))
        self._vocabulary_size = min(len(tokenizer), policy.config.vocab_size)
        self._sleep_level = config.vllm.sleep_level if config.vllm_sleeps else None
        if self._sleep_level is not None and config.training.device == "cpu":
            logger.warning("vLLM can't sleep on the CPU: training.use_vllm_sleep_mode has no effect")
            self._sleep_level = None
        self._asleep, self._warned_of_sleep = False, False
        with on_its_card(config):
            free_before = free_gpu_bytes()
            self._llm = start_vllm(config, policy, self._vocabulary_size, longest_prompt)
            self._bytes_at_start = free_before - free_gpu_bytes()
        check_same_tokenizer(tokenizer, self._llm.get_tokenizer(), self._vocabulary_size)

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        seed: int,
        temperature: float | None = None,
        label: str = "rollouts",
        should_stop: Callable[[], bool] = lambda: False,
    ) -> list[Rollout]:
        """See `utils.records.RolloutEngine`. One request per prompt, so that its n responses share the prefill.

        Raises RuntimeError if a log-prob is not finite.
        """
        assert self._llm is not None, "the engine is closed"
        assert not self._asleep, "the engine sleeps: update_weights wakes it"
        temperature = self.sampling.temperature if temperature is None else temperature
        copies = n if temperature == 0.0 else 1  # greedy responses to one prompt are all the same: vLLM samples one
        requests = [{"prompt_token_ids": list(prompt.token_ids)} for prompt in prompts]
        params = [self._sampling_params(n // copies, seed + i * n, temperature) for i in range(len(prompts))]
        engine, finished = self._llm.llm_engine, []
        device, n_in_all = self._config.training.device, len(prompts) * n
        with (
            on_its_card(self._config),
            preserved_random_state(),
            compilation(device),
            progress_bar(label, n_in_all) as advance,
        ):
            request_ids = self._llm.enqueue(requests, params, use_tqdm=False)
            # Beside each log-prob vLLM would put its token as text, a quarter of the whole time with a small model.
            for state in engine.output_processor.request_states.values():
                state.logprobs_processor.tokenizer = None
            while engine.has_unfinished_requests():
                if should_stop():
                    engine.abort_request(request_ids, internal=True)
                    return []
                done = [output for output in engine.step() if output.finished]
                finished += done
                advance(n * len(done))
        finished.sort(key=lambda output: int(output.request_id))  # in the order that they were asked for
        rollouts = [
            self._rollout(prompt, completion)
            for prompt, output in zip(prompts, finished, strict=True)
            for completion in output.outputs * copies
        ]
        check_rollouts(rollouts, self.name, self._vocabulary_size)
        return rollouts

    def update_weights(self, policy: torch.nn.Module) -> dict[str, float]:
        """Copy all of the policy's weights into the engine; wakes it if it sleeps. Returns the GB pushed.

        Waking has two phases, so that the cache's memory is still free while weights are loaded layer by layer.
        """
        assert self._llm is not None, "the engine is closed"
        pushed: dict[int | str, int] = {}
        with on_its_card(self._config):
            if self._asleep:
                free_gpu_bytes()  # what the trainer's allocator only caches must be there for vLLM
                self._llm.wake_up(tags=["weights"])
            # tensors of the policy's card are copied into those of vLLM's, which is the same card or another one
            weights = counted(weights_for_vllm(policy, self._vocabulary_size, self._dtype), policy, pushed)
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
            # Cached keys and values of a prompt's beginning are the old weights' work.
            if not self._llm.reset_prefix_cache():
                raise RuntimeError("vLLM kept its prefix cache after a weight push: a request is still running")
            if self._asleep:
                self._llm.wake_up(tags=["kv_cache"])
                self._asleep = False
        return {"push_gb": sum(pushed.values()) / GB}

    def sleep(self) -> dict[str, float]:
        """Free weights and cache until `update_weights`; returns the GB freed. Does nothing without sleep mode."""
        assert self._llm is not None, "the engine is closed"
        if self._sleep_level is None or self._asleep:
            return {}
        free_before = free_gpu_bytes()
        self._llm.sleep(level=self._sleep_level)
        self._asleep = True
        freed = free_gpu_bytes() - free_before
        if freed < 0.5 * self._bytes_at_start and not self._warned_of_sleep:
            self._warned_of_sleep = True
            logger.warning(
                "sleep freed %.2f GB of the %.2f GB that vLLM took as it started: another process may have taken memory"
                " in between, or this vLLM release frees less (vllm#32714); training.use_vllm_sleep_mode=false goes"
                " without",
                freed / GB,
                self._bytes_at_start / GB,
            )
        return {"sleep_freed_gb": freed / GB}

    def close(self) -> None:
        """End vLLM and free its memory. Called again, it does nothing."""
        if self._llm is None:
            return
        if self._asleep:  # memory that is unmapped would be unmapped again (vllm#36651)
            free_gpu_bytes()
            try:
                self._llm.wake_up()
            except RuntimeError as error:  # out of memory, say: the process ends anyway
                logger.warning("vLLM could not be woken to end it: %s", error)
        with on_its_card(self._config):
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            give_memory_back()

    def _sampling_params(self, n: int, seed: int, temperature: float) -> SamplingParams:
        """Response j of the request is sampled with seed + j."""
        sampling = self.sampling
        return SamplingParams(
            n=n,
            seed=seed,
            temperature=temperature,
            top_p=sampling.top_p,
            min_tokens=sampling.min_tokens,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            include_stop_str_in_output=sampling.include_stop_str_in_output,
            stop_token_ids=sorted(self.reader.end_ids),
            logprobs=0,  # the sampled token's, and no other's
            flat_logprobs=True,  # in one list
            detokenize=bool(sampling.stop),  # its text is read for stop strings only
        )

    def _rollout(self, prompt: Prompt, completion: CompletionOutput) -> Rollout:
        if completion.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM ended a response with finish reason {completion.finish_reason!r}")
        ids, log_probs = completion.token_ids, completion.logprobs
        assert list(log_probs.token_ids) == list(ids), "vLLM's log-probs are of other tokens than it returned"
        return self.reader.rollout(prompt, ids, log_probs.logprobs, completion.finish_reason)


def weights_for_vllm(
    policy: torch.nn.Module, vocabulary_size: int, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """The policy's full weights as (name, tensor), embeddings and head cut to the vocabulary.

    A tied head is there under both its names: vLLM's CPU build would keep its copy of the head otherwise. An adapter
    is merged and rounded to `dtype`, matrix by matrix; all other tensors are the policy's own memory.
    """
    vocabulary_layers = (policy.get_input_embeddings(), policy.get_output_embeddings())
    vocabulary_names = {
        checkpoint_name(name)
        for name, module in policy.named_modules(remove_duplicate=False)
        if module in vocabulary_layers
    }
    for name, tensor in full_weights(policy, dtype):
        yield name, tensor[:vocabulary_size] if name.rpartition(".")[0] in vocabulary_names else tensor


def counted(
    weights: Iterable[tuple[str, torch.Tensor]], policy: torch.nn.Module, pushed: dict[int | str, int]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass the weights on, and put the bytes of each into `pushed`; tied weights count once.

    Those are the policy's own and known by their address. Merged ones come and go, so addresses may come again.
    """
    own = {parameter.data_ptr() for parameter in policy.parameters()}
    for name, tensor in weights:
        pushed[tensor.data_ptr() if tensor.data_ptr() in own else name] = tensor.nbytes
        yield name, tensor


def check_same_tokenizer(ours: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase, vocabulary_size: int) -> None:
    """Raise ValueError if vLLM's tokenizer gives other text for the same ids: stop strings would be missed."""
    ids = list(range(vocabulary_size))
    if ours.decode(ids) != theirs.decode(ids):
        raise ValueError(
            "vLLM's tokenizer decodes differently from the trainer's: save the tokenizer beside the model in a form"
            " that AutoTokenizer loads unchanged, or set training.rollout_engine=transformers"
        )

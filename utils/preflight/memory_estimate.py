"""An estimate of a run's peak memory, by part, from the model's config.json. Nothing is loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from configs.defaults import Config, Training
from utils.adapter_files import is_in_4bit, is_own_reference
from utils.ranks import launched

GIB = 2**30
BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# For what no tensor holds: the CUDA context, the libraries' workspaces and gaps in the allocator. An allowance, not a
# measurement.
CUDA_ALLOWANCE = 1 * GIB
# What vLLM takes of its share beside weights and KV cache: its profile of a full batch, the sampler's logits, CUDA
# graphs. And what sleep leaves on the card, the graphs. Both are allowances too, read and not measured.
VLLM_OVERHEAD = 1 * GIB
CUDA_GRAPHS = 600 * 10**6


def count_parameters(model_config: dict[str, Any]) -> dict[str, int]:
    """Parameters of a Qwen2- or Llama-like model by part, from its config.json: `embeddings` (head included),
    `layers`, and their `total`. Biases and norms, well under a thousandth, are counted as Qwen2 has them.

    Raises ValueError if the config lacks a size that the count needs.
    """
    sizes = _sizes(model_config)
    hidden, intermediate, q, kv = sizes["hidden"], sizes["intermediate"], sizes["q"], sizes["kv"]
    attention = hidden * (q + 2 * kv) + q * hidden + (q + 2 * kv)
    layer = attention + 3 * hidden * intermediate + 2 * hidden
    n_tables = 1 if model_config.get("tie_word_embeddings", True) else 2
    parts = {"embeddings": n_tables * sizes["vocabulary"] * hidden, "layers": sizes["n_layers"] * layer + hidden}
    return parts | {"total": sum(parts.values())}


def adapted_matrices(model_config: dict[str, Any], target: str) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of one layer that `lora_target` names."""
    sizes = _sizes(model_config)
    hidden, q, kv, intermediate = sizes["hidden"], sizes["q"], sizes["kv"], sizes["intermediate"]
    attention = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q)]
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    return attention if target == "attention" else attention + mlp


def trained_parameters(model_config: dict[str, Any], training: Training) -> tuple[int, int]:
    """How many parameters an update changes, and the bytes of each: a LoRA adapter's, which are float32, or all."""
    if training.lora_rank is None:
        return count_parameters(model_config)["total"], BYTES[training.dtype]
    per_layer = training.lora_rank * sum(map(sum, adapted_matrices(model_config, training.lora_target)))
    return _sizes(model_config)["n_layers"] * per_layer, 4


def _weight_bytes(model_config: dict[str, Any], training: Training) -> int:
    """The policy's weights; with `load_in_4bit`, those of the layers' matrices have 4 bits and a share of a scale."""
    sizes, n_parameters = _sizes(model_config), count_parameters(model_config)["total"]
    in_four_bits = 0
    if training.load_in_4bit:
        in_four_bits = sizes["n_layers"] * sum(a * b for a, b in adapted_matrices(model_config, "all-linear"))
    n_adapter, bytes_each = trained_parameters(model_config, training) if training.lora_rank is not None else (0, 0)
    # 8 bits for the scale of 64 weights, and 32 for the scale of 256 of those
    four_bits = in_four_bits * (1 / 2 + 1 / 64 + 4 / (64 * 256))
    return int((n_parameters - in_four_bits) * BYTES[training.dtype] + four_bits) + n_adapter * bytes_each


def estimate_peak_memory(
    model_config: dict[str, Any],
    config: Config,
    longest_sequence: int,
    device_memory: int | None = None,
    uses_vllm: bool = True,
    engine_memory: int | None = None,
) -> dict[str, int]:
    """Bytes by part of the step's peak, from the model's config.json; with several ranks, of one of them.

    Args:
        model_config: config.json as a dict, of a Qwen2- or Llama-like model.
        config: the run's configuration.
        longest_sequence: tokens of the longest prompt and response together.
        device_memory: bytes of the GPU's whole memory, of which vLLM takes a share; None on the CPU.
        uses_vllm: whether the rollout engine is vLLM.
        engine_memory: with `vllm.device`, bytes of that GPU, of which vLLM then takes its share; not in the peaks.

    Returns:
        `weights`, `gradients`, `optimizer`, `reference` (the policy that a KL term measures from, unless it is the
        policy without its adapter), `activations` (kept for the backward pass of the largest microbatch), `log_probs`
        (a chunk of logits, and the head's gradient), `merging` (the largest matrix, while its adapter is merged for a
        push), `sampling` (what the transformers engine needs for a batch), `vllm_awake`, `vllm_asleep`; `allowance`
        for what no tensor holds; and the peaks of the phases, `rollout_peak` and `training_peak`.
    """
    training, sizes = config.training, _sizes(model_config)
    n_parameters = count_parameters(model_config)["total"]
    n_trained, bytes_each = trained_parameters(model_config, training)
    n_sequences = training.microbatch_size
    if training.max_tokens_per_microbatch is not None:
        n_sequences = max(1, min(training.train_batch_size, training.max_tokens_per_microbatch // longest_sequence))
    n_sequences = min(n_sequences, -(-training.train_batch_size // launched().n_ranks))
    n_tokens = n_sequences * longest_sequence
    n_response_tokens = min(n_tokens, n_sequences * training.max_tokens)

    activations, again = _activations(sizes, config, n_tokens, longest_sequence, n_trained)

    parts = {
        "weights": _weight_bytes(model_config, training),
        "gradients": n_trained * bytes_each,
        "optimizer": optimizer_state_bytes(n_trained, bytes_each, training),
        "reference": _reference(model_config, config),
        "activations": activations,
        "log_probs": _log_probs(sizes, config, n_response_tokens),
        "merging": _merging(model_config, config) if uses_vllm else 0,
        "sampling": 0 if uses_vllm else _sampling(sizes, training, longest_sequence),
        **_vllm(config, n_parameters, engine_memory or device_memory, uses_vllm),
        "allowance": CUDA_ALLOWANCE if device_memory is not None else 0,
    }
    resting = sum(parts[name] for name in ("weights", "optimizer", "reference", "allowance"))
    awake, asleep = (parts["vllm_awake"], parts["vllm_asleep"]) if config.vllm.device is None else (0, 0)
    parts["rollout_peak"] = resting + parts["merging"] + parts["sampling"] + awake
    # masters are put together tensor by tensor, in float32 beside their gradients, once the activations are gone
    joins = training.optimizer_name == "adamw8bit_master" and training.lora_rank is None
    step = 8 * sizes["vocabulary"] * sizes["hidden"] if joins else 0
    parts["training_peak"] = (
        resting + asleep + parts["gradients"] + max(step, parts["activations"] + parts["log_probs"])
    )
    if training.lora_rank is not None:  # a frozen head leaves nothing behind when a layer is computed again
        parts["training_peak"] -= min(again, parts["log_probs"])
    return parts


def optimizer_state_bytes(n_parameters: int, bytes_each: int, training: Training) -> int:
    """AdamW's moments and the low bits of bfloat16 weights' masters. With 8 bits, a block of 256 has two scales."""
    low_bits = 2 if training.optimizer_name == "adamw8bit_master" and bytes_each == 2 else 0
    if training.optimizer_name.startswith("adamw8bit"):
        return int(n_parameters * (2 + 8 / 256 + low_bits))
    return 2 * n_parameters * bytes_each


def _reference(model_config: dict[str, Any], config: Config) -> int:
    """A second model, if there is a KL term and the policy without its adapter is not what it measures from."""
    t = config.training
    if not t.kl_coef or is_own_reference(config):
        return 0
    in_4bit = is_in_4bit(t.reference_path or config.paths.model_path)
    return _weight_bytes(model_config, replace(t, dtype=t.reference_dtype, lora_rank=None, load_in_4bit=in_4bit))


def _sampling(sizes: dict[str, int], training: Training, longest_sequence: int) -> int:
    """The transformers engine's KV cache, a step's logits, log-softmax and cumulative probabilities in float64, and
    with autocast copies of weights."""
    n_sequences = min(training.generation_batch_size, training.rollout_batch_size // launched().n_ranks)
    cache = 2 * sizes["n_layers"] * sizes["kv"] * BYTES[training.dtype] * longest_sequence
    # torch keeps the copies of trained weights from token to token, and none of frozen ones
    copies = _autocast_copies(sizes, training, sizes["n_layers"] if training.lora_rank is None else 1)
    return n_sequences * (cache + (4 + 4 + 8 + 8) * sizes["vocabulary"]) + copies


def _merging(model_config: dict[str, Any], config: Config) -> int:
    """B A of the largest matrix in float32, and what it is rounded to, beside a matrix out of its 4 bits."""
    training = config.training
    if training.lora_rank is None:
        return 0
    largest = max(a * b for a, b in adapted_matrices(model_config, training.lora_target))
    return largest * (4 + BYTES[config.vllm.dtype] + (BYTES[training.dtype] if training.load_in_4bit else 0))


NAMES = {  # in a config.json
    "vocabulary": "vocab_size",
    "hidden": "hidden_size",
    "intermediate": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "heads": "num_attention_heads",
}


def _sizes(model_config: dict[str, Any]) -> dict[str, int]:
    """The sizes that a config.json gives, under short names; `q` and `kv` are the widths of queries and of keys."""
    text_config = model_config.get("text_config") or model_config
    for name in NAMES.values():
        if name not in text_config:
            raise ValueError(f"the model's config.json has no {name!r}, so its memory cannot be estimated")
        if not isinstance(text_config[name], int) or text_config[name] < 1:
            raise ValueError(f"the model's config.json has {name} = {text_config[name]!r}, which is no size")
    sizes = {short: text_config[name] for short, name in NAMES.items()}
    head_dim = text_config.get("head_dim") or sizes["hidden"] // sizes["heads"]
    kv_heads = text_config.get("num_key_value_heads") or sizes["heads"]
    changed = [text_config.get(name) for name in ("final_logit_softcapping", "logit_scale", "logits_scaling")]
    has_slope = int(any(value not in (None, 1) for value in changed))  # logits are more than a matrix product
    return sizes | {"q": sizes["heads"] * head_dim, "kv": kv_heads * head_dim, "has_slope": has_slope}


def _activations(
    sizes: dict[str, int], config: Config, n_tokens: int, longest_sequence: int, n_trained: int
) -> tuple[int, int]:
    """What autograd keeps of a forward pass, as transformers' Qwen2 writes it, plus copies of weights in its dtype.

    And how much of that is the one layer that checkpointing computes again; 0 if all of it is kept.
    """
    training = config.training
    bytes_each = BYTES[training.autocast_dtype or training.dtype]
    norm, layer = _per_token(sizes, config, longest_sequence)
    copies = _autocast_copies(sizes, training, 1 if training.use_gradient_checkpointing else sizes["n_layers"])
    if training.lora_rank is not None and bytes_each < 4:  # A and B, rounded
        copies += n_trained * bytes_each
    if training.load_in_4bit:  # the largest matrix out of its 4 bits
        copies += sizes["hidden"] * sizes["intermediate"] * bytes_each
    if not training.use_gradient_checkpointing:
        return n_tokens * (sizes["n_layers"] * layer + norm) + copies, 0
    # the residual stream at every layer's start, and one layer computed again
    kept = sizes["n_layers"] * BYTES[training.dtype] * sizes["hidden"]
    return n_tokens * (kept + layer + norm) + copies, n_tokens * layer


def _per_token(sizes: dict[str, int], config: Config, longest_sequence: int) -> tuple[int, int]:
    """Bytes per token that autograd keeps of a norm, and of a whole layer with its two norms."""
    training = config.training
    bytes_each = BYTES[training.autocast_dtype or training.dtype]
    hidden, intermediate = sizes["hidden"], sizes["intermediate"]
    # two norms keep float32 input, normalized input and output; attention q, k, v, output and a log-sum-exp; the MLP
    # gate, its activation, up, and their product
    norm = (4 + 2 * bytes_each) * hidden + 4
    layer = 2 * norm + bytes_each * (2 * sizes["q"] + 2 * sizes["kv"] + 4 * intermediate) + 4 * sizes["heads"]
    if training.autocast_dtype is not None:  # norms are float32, and five matrices each round what they are given
        layer += (2 * (4 - bytes_each) + 3 * bytes_each) * hidden
    if training.lora_rank is not None:
        # a frozen norm keeps no normalized input, a matrix without adapter not what it multiplies; A keeps its output
        adapts_mlp = training.lora_target == "all-linear"
        norm -= bytes_each * hidden
        layer += bytes_each * (training.lora_rank * (7 if adapts_mlp else 4) - 2 * hidden)
        layer -= 0 if adapts_mlp else bytes_each * (hidden + intermediate)
    if training.use_packing:
        layer += bytes_each * sizes["q"]  # attention's output, put back into the row
    if training.attention_type == "eager":
        # softmax in float32 and its copy in the dtype; what the packed version does not keep: output and log-sum-exp
        layer += (4 + bytes_each % 4) * sizes["heads"] * longest_sequence
        if training.use_packing:
            layer -= bytes_each * sizes["q"] + 4 * sizes["heads"]
        else:  # keys and values repeated for every query head
            layer += 2 * bytes_each * (sizes["q"] - sizes["kv"])
    return norm, layer


def _autocast_copies(sizes: dict[str, int], training: Training, n_layers: int) -> int:
    """The weights of so many layers and of the head in autocast's dtype; 0 without autocast.

    Autograd keeps those of all layers, or of one where layers are computed again. The embedding is looked up in its own
    dtype.
    """
    if training.autocast_dtype is None:
        return 0
    hidden, table = sizes["hidden"], sizes["vocabulary"] * sizes["hidden"]
    layer = 2 * hidden * (sizes["q"] + sizes["kv"]) + 3 * hidden * sizes["intermediate"]
    return (table + layer * n_layers) * BYTES[training.autocast_dtype]


def _log_probs(sizes: dict[str, int], config: Config, n_response_tokens: int) -> int:
    """The larger of the head's passes over a chunk, as utils/algorithm/log_probs.py makes them."""
    bytes_each = BYTES[config.training.autocast_dtype or config.training.dtype]
    logits = min(config.training.log_prob_chunk_size, n_response_tokens) * sizes["vocabulary"]
    forward = 8 * logits  # log-softmax and, for the entropy, its exponential, both float32
    is_trained = config.training.lora_rank is None
    if config.training.head_dtype is not None and bytes_each == 2:
        # the gradient of the logits in float32 and in two halves, that of the weight and what a chunk adds to it
        return max(forward, 8 * logits + (8 * sizes["vocabulary"] * sizes["hidden"] if is_trained else 0))
    # log-softmax in float32; the slope of a cap, or later its gradient in the weight's dtype (in place for float32);
    # the gradient of the weight
    backward = (8 if sizes["has_slope"] else 4 + bytes_each % 4) * logits
    if is_trained:
        backward += bytes_each * sizes["vocabulary"] * sizes["hidden"]
    return max(forward, backward)


def kv_cache_bytes_per_token(model_config: dict[str, Any], config: Config) -> int:
    """Keys and values of all layers for one token, in vLLM's dtype."""
    sizes = _sizes(model_config)
    return 2 * sizes["n_layers"] * sizes["kv"] * BYTES[config.vllm.dtype]


def kv_cache_tokens(model_config: dict[str, Any], config: Config, device_memory: int | None) -> int:
    """About how many tokens vLLM's KV cache holds: its share of the GPU less weights and `VLLM_OVERHEAD`."""
    if device_memory is None:
        cache = config.vllm.cpu_kv_cache_mb * 2**20
    else:
        weights = count_parameters(model_config)["total"] * BYTES[config.vllm.dtype]
        cache = config.vllm.gpu_memory_utilization * device_memory - weights - VLLM_OVERHEAD
    return max(0, int(cache)) // kv_cache_bytes_per_token(model_config, config)


def _vllm(config: Config, n_parameters: int, device_memory: int | None, uses_vllm: bool) -> dict[str, int]:
    """What vLLM takes awake and asleep. On CUDA both are shares of the device's memory; the CPU build never sleeps."""
    if not uses_vllm:
        awake = asleep = 0
    elif device_memory is None:
        awake = asleep = n_parameters * BYTES[config.vllm.dtype] + config.vllm.cpu_kv_cache_mb * 2**20
    else:
        assert config.vllm.gpu_memory_utilization is not None, "not derived: see utils/preflight/fit.py"
        awake = int(config.vllm.gpu_memory_utilization * device_memory)
        # both levels free weights and cache on the device; graphs stay
        graphs = 0 if config.vllm.enforce_eager else CUDA_GRAPHS
        asleep = min(graphs, awake) if config.vllm_sleeps else awake
    return {"vllm_awake": awake, "vllm_asleep": asleep}

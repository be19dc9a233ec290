"""An estimate of a run's peak memory, by part, from the model's config.json. Nothing is loaded."""

from __future__ import annotations

from typing import Any

from configs.defaults import Config, Training

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


def estimate_peak_memory(
    model_config: dict[str, Any],
    config: Config,
    longest_sequence: int,
    device_memory: int | None = None,
    uses_vllm: bool = True,
) -> dict[str, int]:
    """Bytes by part of the step's peak, from the model's config.json.

    Args:
        model_config: config.json as a dict, of a Qwen2- or Llama-like model.
        config: the run's configuration.
        longest_sequence: tokens of the longest prompt and response together.
        device_memory: bytes of the GPU's whole memory, of which vLLM takes a share; None on the CPU.
        uses_vllm: whether the rollout engine is vLLM.

    Returns:
        `weights`, `gradients`, `optimizer`, `reference` (the policy that a KL term measures from), `activations` (kept
        for the backward pass of the largest microbatch), `log_probs` (a chunk of logits, and the head's gradient),
        `vllm_awake`, `vllm_asleep`; `allowance` for what no tensor holds; and the peaks of the phases, `rollout_peak`
        and `training_peak`.
    """
    training, sizes, bytes_each = config.training, _sizes(model_config), BYTES[config.training.dtype]
    n_parameters = count_parameters(model_config)["total"]
    n_sequences = training.microbatch_size
    if training.max_tokens_per_microbatch is not None:
        n_sequences = max(1, min(training.train_batch_size, training.max_tokens_per_microbatch // longest_sequence))
    n_tokens = n_sequences * longest_sequence
    n_response_tokens = min(n_tokens, n_sequences * training.max_tokens)

    parts = {
        "weights": n_parameters * bytes_each,
        "gradients": n_parameters * bytes_each,
        "optimizer": optimizer_state_bytes(n_parameters, training),
        "reference": n_parameters * BYTES[training.reference_dtype] if training.kl_coef else 0,
        "activations": _activations(sizes, config, n_tokens, longest_sequence),
        "log_probs": _log_probs(sizes, config, n_response_tokens),
        **_vllm(config, n_parameters, device_memory, uses_vllm),
        "allowance": CUDA_ALLOWANCE if device_memory is not None else 0,
    }
    resting = sum(parts[name] for name in ("weights", "optimizer", "reference", "allowance"))
    parts["rollout_peak"] = resting + parts["vllm_awake"]
    # masters are put together tensor by tensor, in float32 beside their gradients, once the activations are gone
    step = 8 * sizes["vocabulary"] * sizes["hidden"] if training.optimizer_name == "adamw8bit_master" else 0
    parts["training_peak"] = (
        resting + parts["vllm_asleep"] + parts["gradients"] + max(step, parts["activations"] + parts["log_probs"])
    )
    return parts


def optimizer_state_bytes(n_parameters: int, training: Training) -> int:
    """AdamW's two moments, and the low bits of masters. With 8 bits, each block of 256 has two float32 scales."""
    low_bits = 2 if training.optimizer_name == "adamw8bit_master" else 0
    if training.optimizer_name.startswith("adamw8bit"):
        return int(n_parameters * (2 + 8 / 256 + low_bits))
    return 2 * n_parameters * BYTES[training.dtype]


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
    return sizes | {"q": sizes["heads"] * head_dim, "kv": kv_heads * head_dim}


def _activations(sizes: dict[str, int], config: Config, n_tokens: int, longest_sequence: int) -> int:
    """What autograd keeps of a forward pass, as transformers' Qwen2 writes it, plus autocast's copies of weights."""
    training = config.training
    autocast = training.autocast_dtype is not None
    bytes_each = BYTES[training.autocast_dtype or training.dtype]
    hidden = sizes["hidden"]
    # two norms keep float32 input, normalized input and output; attention q, k, v, output and a log-sum-exp; the MLP
    # gate, its activation, up, and their product
    norm = (4 + 2 * bytes_each) * hidden + 4
    layer = 2 * norm + bytes_each * (2 * sizes["q"] + 2 * sizes["kv"] + 4 * sizes["intermediate"]) + 4 * sizes["heads"]
    if autocast:  # norms are float32, and queries, keys, values, gate and up each round what they are given
        layer += (2 * (4 - bytes_each) + 3 * bytes_each) * hidden
    if training.use_packing:
        layer += bytes_each * sizes["q"]  # attention's output, put back into the row
    if training.attention_type == "eager":
        # softmax in float32 and its copy in the dtype; what the packed version does not keep: output and log-sum-exp
        layer += (4 + bytes_each % 4) * sizes["heads"] * longest_sequence
        if training.use_packing:
            layer -= bytes_each * sizes["q"] + 4 * sizes["heads"]
        else:  # keys and values repeated for every query head
            layer += 2 * bytes_each * (sizes["q"] - sizes["kv"])
    if training.use_gradient_checkpointing:
        # the residual stream at every layer's start, and one layer computed again
        per_token = sizes["n_layers"] * BYTES[training.dtype] * hidden + layer
    else:
        per_token = sizes["n_layers"] * layer
    return n_tokens * (per_token + norm) + (_autocast_copies(sizes, training) if autocast else 0)


def _autocast_copies(sizes: dict[str, int], training: Training) -> int:
    """The weights in autocast's dtype that autograd keeps; where layers are computed again, one layer's and the head's.

    The embedding is looked up in its own dtype.
    """
    hidden, table = sizes["hidden"], sizes["vocabulary"] * sizes["hidden"]
    layer = 2 * hidden * (sizes["q"] + sizes["kv"]) + 3 * hidden * sizes["intermediate"]
    n_copied = table + layer * (1 if training.use_gradient_checkpointing else sizes["n_layers"])
    return n_copied * BYTES[training.autocast_dtype]


def _log_probs(sizes: dict[str, int], config: Config, n_response_tokens: int) -> int:
    """The larger of the head's passes over a chunk, as utils/algorithm/log_probs.py makes them."""
    bytes_each = BYTES[config.training.autocast_dtype or config.training.dtype]
    logits = min(config.training.log_prob_chunk_size, n_response_tokens) * sizes["vocabulary"]
    forward = 8 * logits  # log-softmax and, for the entropy, its exponential, both float32
    if config.training.head_dtype is not None and bytes_each == 2:
        # the gradient of the logits in float32 and in two halves, that of the weight and what a chunk adds to it
        return max(forward, 8 * logits + 8 * sizes["vocabulary"] * sizes["hidden"])
    # log-softmax in float32, its gradient in the weight's dtype (in place for float32), the gradient of the weight
    backward = (4 + bytes_each % 4) * logits + bytes_each * sizes["vocabulary"] * sizes["hidden"]
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
        asleep = min(graphs, awake) if config.training.use_vllm_sleep_mode else awake
    return {"vllm_awake": awake, "vllm_asleep": asleep}

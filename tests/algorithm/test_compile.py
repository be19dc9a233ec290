"""torch.compile together with packing: the same numbers, one graph for every length."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from update_cases import ON_POLICY, make_batch

from utils.algorithm.batch import microbatches
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.packing import is_packable
from utils.algorithm.policy import load_policy


@pytest.mark.slow
def test_packed_microbatches_of_many_lengths_take_one_graph(one_layer_model_dir: Path) -> None:
    """By inductor, forward and backward, without a break or a second compilation after the first lengths."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, compiled = (
        load_policy(str(one_layer_model_dir), replace(ON_POLICY, attention_type="sdpa", use_compile=compiles))
        for compiles in (False, True)
    )
    assert is_packable(compiled)
    n_graphs = []
    for seed, n_repeats in enumerate((1, 2, 3, 5)):
        batch = make_batch(seed=seed, n_repeats=n_repeats)
        for microbatch in microbatches(plain, batch, torch.arange(8), ON_POLICY):
            expected, _ = policy_log_probs(plain, microbatch, ON_POLICY)
            found, _ = policy_log_probs(compiled, microbatch, ON_POLICY)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            expected.sum().backward()
            found.sum().backward()
            n_graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(n_graphs) >= 8 and set(n_graphs) == {1}
    assert not torch._dynamo.utils.counters["graph_break"]
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-3, rtol=1e-3)

"""Rollouts become tensors without losing or moving a token, and are cut without changing what is in them."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby, pairwise
from random import Random

import torch
from hypothesis import given
from hypothesis import strategies as st

from utils import tiny
from utils.algorithm.batch import make_train_batch, response_mask, split_rows, take_microbatch
from utils.records import Problem, Prompt, Rollout

PAD = 0
POLICY = tiny.build_model(seed=0)


def make_rollout(prompt_ids: list[int], response_ids: list[int]) -> Rollout:
    prompt = Prompt(Problem("?", "1"), "", tuple(prompt_ids))
    log_probs = tuple(-0.1 * (i + 1) for i in range(len(response_ids)))
    return Rollout(prompt, "", tuple(response_ids), log_probs, "stop")


ids = st.lists(st.integers(0, 9), max_size=6)
some_rollouts = st.lists(st.builds(make_rollout, ids.filter(len), ids), min_size=1, max_size=8)


def test_train_batch_by_hand() -> None:
    # the end id is also the pad id: only the lengths tell them apart
    rollouts = [make_rollout([5, 6, 7], [8, PAD]), make_rollout([5], [])]
    batch = make_train_batch(rollouts, torch.tensor([1.0, 0.0]), torch.tensor([0.5, -0.5]), pad_id=PAD)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, PAD], [5, PAD, PAD, PAD, PAD]]
    assert batch.response_mask.tolist() == [[False, False, True, True], [False] * 4]
    assert batch.sampler_log_probs.tolist() == [
        [0.0, 0.0, torch.tensor(-0.1).item(), torch.tensor(-0.2).item()],
        [0.0] * 4,
    ]
    assert batch.sequence_lengths.tolist() == [5, 1]


@given(some_rollouts)
def test_masked_labels_are_the_sampled_ids(rollouts: list[Rollout]) -> None:
    zeros = torch.zeros(len(rollouts))
    batch = make_train_batch(rollouts, zeros, zeros, pad_id=PAD)
    for i, rollout in enumerate(rollouts):
        mask = batch.response_mask[i]
        assert tuple(batch.input_ids[i, 1:][mask].tolist()) == rollout.response_ids
        assert torch.equal(batch.sampler_log_probs[i][mask], torch.tensor(rollout.sampler_log_probs))


@given(some_rollouts, st.integers(1, 5), st.one_of(st.none(), st.integers(1, 40)))
def test_microbatches_hold_every_row_once_and_nothing_else(
    rollouts: list[Rollout], size: int, max_tokens: int | None
) -> None:
    values = torch.arange(len(rollouts)).float()
    batch = make_train_batch(rollouts, values, -values, pad_id=PAD)
    batch = replace(batch, denominators=values, old_log_probs=batch.sampler_log_probs)
    rows = torch.arange(len(rollouts))
    pieces = split_rows(rows, batch.sequence_lengths, size, max_tokens)
    assert sorted(torch.cat(pieces).tolist()) == rows.tolist()
    longest_of_each = [batch.sequence_lengths[piece].max() for piece in pieces]
    assert longest_of_each == sorted(longest_of_each, reverse=True)
    for piece in pieces:
        microbatch = take_microbatch(POLICY, batch, piece)
        n_rows, width = microbatch.input_ids.shape
        assert width == batch.sequence_lengths[piece].max()
        assert n_rows == 1 or (n_rows <= size if max_tokens is None else n_rows * width <= max_tokens)
        for k, row in enumerate(piece.tolist()):
            rollout = rollouts[row]
            mask = microbatch.response_mask[k]
            assert tuple(microbatch.input_ids[k, 1:][mask].tolist()) == rollout.response_ids
            assert torch.equal(microbatch.old_log_probs[k][mask], torch.tensor(rollout.sampler_log_probs))
            assert microbatch.advantages[k] == -row
            assert microbatch.denominators[k] == row
        assert torch.equal(microbatch.response_index, microbatch.response_mask.flatten().nonzero().flatten())


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 40), st.randoms())
def test_rows_of_a_group_stay_together(lengths: list[int], group_size: int, max_tokens: int, random: Random) -> None:
    rows = random.sample(range(len(lengths)), random.randint(1, len(lengths)))
    pieces = split_rows(torch.tensor(rows), torch.tensor(lengths), 1, max_tokens, group_size)
    order = torch.cat(pieces).tolist()
    assert sorted(order) == sorted(rows)
    groups = [group for group, _ in groupby(row // group_size for row in order)]
    assert len(groups) == len(set(groups))
    longest = [max(lengths[row] for row in order if row // group_size == group) for group in groups]
    assert longest == sorted(longest, reverse=True)
    areas = [len(piece) * max(lengths[row] for row in piece.tolist()) for piece in pieces]
    assert all(area <= max_tokens or len(piece) == 1 for area, piece in zip(areas, pieces, strict=True))
    for piece, following in pairwise(pieces):  # no piece had room for one more
        widest = max(lengths[row] for row in [*piece.tolist(), int(following[0])])
        assert (len(piece) + 1) * widest > max_tokens


def test_no_rows_make_no_microbatch() -> None:
    assert split_rows(torch.empty(0, dtype=torch.int64), torch.tensor([3]), 2) == []


def test_response_mask_by_hand() -> None:
    mask = response_mask(torch.tensor([2, 1]), torch.tensor([1, 3]), 5)
    assert mask.tolist() == [[False, True, False, False], [True, True, True, False]]

"""Everything that measures an update, and trains nothing: sums kept on the device and read once, at the end.

With several ranks each adds up what it has computed, and the sums are added before anything is divided.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from configs.defaults import Training
from utils.algorithm.batch import Microbatch, TrainBatch, microbatches
from utils.algorithm.log_probs import policy_log_probs
from utils.algorithm.parallel import gather, is_first, sum_tensor
from utils.algorithm.policy import trainable

SAMPLES_PER_TENSOR = 65_536


@dataclass
class UpdateResult:
    """What one rollout batch did to the policy."""

    metrics: dict[str, float]
    n_optimizer_steps: int = 0  # taken
    skipped: list[bool] = field(default_factory=list)  # one entry per optimizer step: was it not finite?
    nonfinite_rows: list[int] = field(default_factory=list)  # rows of the batch that may have caused it
    abandoned: bool = False  # asked to stop before any optimizer step: the weights are as they were

    def skipped_in_a_row(self, before: int) -> int:
        """How many optimizer steps have been skipped since the last one taken, after `before` and these."""
        for was_skipped in self.skipped:
            before = before + 1 if was_skipped else 0
        return before


class UpdateStatistics:
    """Measures an update beside the inner loop, which reports each minibatch, microbatch and optimizer step."""

    def __init__(self, policy: torch.nn.Module, batch: TrainBatch, training: Training) -> None:
        self._policy, self._batch, self._training = policy, batch, training
        weight = next(policy.parameters())
        self._device, self._dtype = weight.device, torch.promote_types(weight.dtype, torch.float32)
        self._movement = WeightMovement(trainable(policy))
        self._sums: dict[str, Tensor] = {}  # over trained tokens
        self._losses: list[Tensor] = []  # of each optimizer step taken
        self._grad_norms: list[Tensor] = []
        self._n_too_large = 0  # optimizer steps that the loss scale has cost
        self._result = UpdateResult(metrics={})
        order = batch.response_mask.sum(dim=1).argsort()
        self._thirds = {"shortest": torch.zeros(len(order), dtype=torch.bool)}
        self._thirds["longest"] = self._thirds["shortest"].clone()
        self._thirds["shortest"][order[: len(order) // 3]] = True
        self._thirds["longest"][order[len(order) - len(order) // 3 :]] = True
        self._start_minibatch()

    @property
    def weights_untouched(self) -> bool:
        """Whether the weights are still those that sampled: no optimizer step has been taken."""
        return not self._losses

    def minibatch(self, rows: Tensor) -> None:
        """An optimizer step over these rows (N,) begins.

        If the first one has no rollout with a gradient, one microbatch is compared with the sampler by a forward pass,
        so that the gap is known at every step.
        """
        self._start_minibatch()
        if self.weights_untouched and not self._batch.rows_with_gradient[rows].any() and is_first():
            everything = replace(self._batch, has_gradient=None)
            with torch.no_grad():
                microbatch = next(microbatches(self._policy, everything, rows, self._training))
                log_probs, _ = policy_log_probs(self._policy, microbatch, self._training, with_entropy=False)
                self._add_sampler_gap(microbatch, log_probs)

    def _start_minibatch(self) -> None:
        self._loss = torch.zeros((), device=self._device, dtype=self._dtype)
        self._suspects: list[tuple[Tensor, Tensor]] = []  # rows, and which of them are not finite

    def microbatch(
        self, microbatch: Microbatch, log_probs: Tensor, entropy: Tensor, loss: Tensor, extras: dict[str, Tensor]
    ) -> None:
        """A microbatch's forward and backward are done. `log_probs`, `entropy` and `extras` are (M, t-1)."""
        log_probs, mask = log_probs.detach(), microbatch.response_mask
        old = log_probs if microbatch.old_log_probs is None else microbatch.old_log_probs
        self._loss += loss.detach()
        self._add("tokens", mask.sum())
        measured = {"entropy": entropy, "clip_fraction": extras.get("clipped", torch.zeros_like(mask))}
        # off-policy without old log-probs the ratio is unknown
        if microbatch.old_log_probs is not None or self._training.optimizer_steps_per_rollout_batch == 1:
            measured["mean_ratio"] = torch.exp(log_probs - old)
        if "reference_kl" in extras:
            measured["reference_kl"] = extras["reference_kl"]
        if "sampler_weight" in extras:
            self._add_sampler_weights(microbatch, extras["sampler_weight"])
        for name, values in measured.items():
            self._add(name, torch.where(mask, values.to(self._loss.dtype), 0.0).sum())
        if microbatch.old_log_probs is not None or self.weights_untouched:
            self._add_sampler_gap(microbatch, old)
        finite = torch.isfinite(log_probs) & torch.isfinite(old) & torch.isfinite(microbatch.sampler_log_probs)
        self._suspects.append((microbatch.rows, ~finite.all(dim=1)))

    def _add_sampler_weights(self, microbatch: Microbatch, weights: Tensor) -> None:
        """What a correction for the sampler does, and to which responses: (M, t-1) weights of tokens."""
        mask = microbatch.response_mask
        weights = torch.where(mask, weights, 0.0)
        masked = mask & (weights == 0)
        self._add("weight", weights.sum())
        self._add("squared_weight", weights.square().sum())
        self._add("masked_tokens", masked.sum())
        self._add("sequences", mask.any(dim=1).sum())
        self._add("masked_sequences", (mask.any(dim=1) & (masked == mask).all(dim=1)).sum())
        for third, rows in self._thirds.items():
            chosen = mask & rows[microbatch.rows].to(mask.device)[:, None]
            self._add(f"tokens_{third}", chosen.sum())
            self._add(f"masked_{third}", (masked & chosen).sum())

    def _sampler_weight_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """The metrics of the sampler's correction; removes their sums from `sums`."""
        weight, squared, masked, sequences, masked_sequences = (
            sums.pop(name, 0.0)
            for name in ("weight", "squared_weight", "masked_tokens", "sequences", "masked_sequences")
        )
        thirds = {t: (sums.pop(f"masked_{t}", 0.0), sums.pop(f"tokens_{t}", 0.0)) for t in self._thirds}
        if not sequences:
            return {}
        tokens = sums["tokens"]
        return {
            "sampler_weight": weight / tokens,
            "effective_sample_size": weight**2 / squared / tokens if squared else 0.0,
            "frac_masked_tokens": masked / tokens,
            "frac_masked_sequences": masked_sequences / sequences,
            **{f"frac_masked_{third}": m / n for third, (m, n) in thirds.items() if n},
        }

    def all_finite(self) -> Tensor:
        """() bool on the device: whether this minibatch's loss, and all that it was computed from, is finite.

        On every rank: they meet here.
        """
        finite = torch.isfinite(self._loss)
        for _, bad in self._suspects:
            finite = finite & ~bad.any()
        return sum_tensor((~finite).int()) == 0

    def optimizer_step(self, grad_norm: Tensor, taken: bool, too_large: bool = False) -> None:
        """The optimizer step of this minibatch was taken, or skipped because a number was not finite.

        `too_large`: because the loss scale made the gradient too large for float16, which is no fault of the rollouts.
        """
        result = self._result
        if too_large:
            self._n_too_large += 1
            return
        result.skipped.append(not taken)
        if taken:
            result.n_optimizer_steps += 1
            self._losses.append(self._loss)
            self._grad_norms.append(grad_norm)
            return
        own = [pair for rows, bad in self._suspects for pair in zip(rows.tolist(), bad.tolist(), strict=True)]
        suspects = [pair for each in gather(own) for pair in each]
        # if the gradient alone is not finite, any of the rows may have caused it
        found = any(is_bad for _, is_bad in suspects)
        result.nonfinite_rows += [row for row, is_bad in suspects if is_bad or not found]

    def abandoned(self) -> UpdateResult:
        """The update was given up before its first optimizer step."""
        self._result.abandoned = True
        return self._result

    def result(self) -> UpdateResult:
        """What the update did. A mean over tokens or optimizer steps is absent if there were none."""
        sums, losses = self._over_ranks()
        compared, kl, largest = (sums.pop(name, 0.0) for name in ("compared_tokens", "sampler_kl", "sampler_max_diff"))
        corrected = self._sampler_weight_metrics(sums)
        tokens = sums.pop("tokens", 0.0)
        metrics = corrected | {
            "frac_trained_rollouts": self._batch.rows_with_gradient.double().mean().item(),
            "nonfinite_steps": float(sum(self._result.skipped)),
            "frac_weights_moved": self._movement.share(),
        }
        if self._training.autocast_dtype == "float16":
            metrics["loss_scale_skips"] = float(self._n_too_large)
        metrics |= {name: value / tokens for name, value in sums.items()} if tokens else {}
        if compared:
            metrics |= {"sampler_kl": kl / compared, "sampler_max_diff": largest}
        if self._grad_norms:
            norms = torch.stack(self._grad_norms).double().cpu()
            metrics["loss"] = sum(losses) / len(losses)
            metrics["grad_norm"] = norms.mean().item()
            metrics["frac_grad_clipped"] = (norms > self._training.max_grad_norm).double().mean().item()
        metrics["trained_tokens"] = tokens
        self._result.metrics = metrics
        return self._result

    def _over_ranks(self) -> tuple[dict[str, float], list[float]]:
        """The sums, and the losses of the optimizer steps taken: those of all ranks together."""
        losses = torch.stack(self._losses).tolist() if self._losses else []
        each = gather(({name: value.item() for name, value in self._sums.items()}, losses))
        sums: dict[str, float] = {}
        for own, _ in each:
            for name, value in own.items():
                combine = max if name == "sampler_max_diff" else float.__add__
                sums[name] = combine(sums[name], value) if name in sums else value
        return sums, [sum(parts) for parts in zip(*(losses for _, losses in each), strict=True)]

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0) + value.detach().double()

    def _add_sampler_gap(self, microbatch: Microbatch, log_probs: Tensor) -> None:
        """How far the sampler's log-probs are from the trainer's (M, t-1) under the weights that sampled."""
        mask = microbatch.response_mask
        difference = torch.where(mask, log_probs - microbatch.sampler_log_probs, 0.0)
        self._add("compared_tokens", mask.sum())
        # KL(sampler || trainer) by the estimator r - 1 - log r, which is never negative (Schulman 2020)
        self._add("sampler_kl", (torch.expm1(difference) - difference).sum())
        largest = difference.abs().max().double()
        self._sums["sampler_max_diff"] = torch.maximum(self._sums.get("sampler_max_diff", largest), largest)


class WeightMovement:
    """What share of the weights has moved: a bfloat16 weight stays where an update is below half its spacing.

    Remembers evenly spaced weights of every tensor, at most `SAMPLES_PER_TENSOR` of each, so that no second copy of a
    large model is held.
    """

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._before = [_sample(parameter).clone() for parameter in parameters]

    def share(self) -> float:
        """The share of all weights that differ from when this object was made, each tensor weighted by its size."""
        moved = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        for parameter, before in zip(self._parameters, self._before, strict=True):
            moved += (_sample(parameter) != before).double().mean() * parameter.numel()
        return moved.item() / sum(parameter.numel() for parameter in self._parameters)


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().flatten()[:: -(-parameter.numel() // SAMPLES_PER_TENSOR)]

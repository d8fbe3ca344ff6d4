"""The policy of one rank as a weight sync uses it: its weights, its probe, its perturbations and its memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from grpo.learner import heads
from grpo.learner.probe import Perturbation, read_probe
from grpo.learner.zero.models import Models
from grpo.learner.zero.setup import Ranks
from grpo.learner.zero.weights import drop_gathered, weights_of
from grpo.sync.probe import Probe, Reading, group_members
from grpo.sync.weights import Bucket


class SyncedPolicy:
    """The `grpo.sync.transaction.SyncedLearner` of DeepSpeed."""

    def __init__(self, models: Models, ranks: Ranks, zero_stage: int) -> None:
        self._models, self._ranks, self._zero_stage = models, ranks, zero_stage

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every weight as the model folder has it, tied ones once; gathered at ZeRO 3.

        A yielded tensor stays valid as long as it is referenced: at ZeRO 3 it keeps the gathered storage.
        """
        for name, tensor in weights_of(self._models.policy, self._zero_stage):
            if name in self._stored_alike:
                yield name, tensor
            else:
                yield from heads.as_in_folder(self._models.policy.module, name, tensor).items()

    @functools.cached_property
    def _stored_alike(self) -> frozenset[str]:
        """Names of the parameters that the model folder has unchanged.

        They are cached: the conversion in transformers takes a millisecond per parameter, a third of a small model's
        sync.
        """
        module, alike = self._models.policy.module, []
        for name, parameter in module.named_parameters():
            blank = torch.empty(getattr(parameter, "ds_shape", parameter.shape), device="meta")
            if heads.as_in_folder(module, name, blank).get(name) is blank:
                alike.append(name)
        return frozenset(alike)

    def parameter_count(self) -> int:
        """Return the number of the policy's parameter tensors."""
        return sum(1 for _ in self._models.policy.module.parameters())

    def read_probe(self, probe: Probe) -> Reading:
        """Return the logprobs of the probe under the current weights, and their rounding noise."""
        models = self._models
        assert not models.offloaded, "the learner's weights are in host memory"
        return read_probe(models.policy, models.policy.module, models.head, probe, models.device)

    @contextmanager
    def perturbation(self, group: int, groups: int) -> Iterator[Callable[[float], None]]:
        """Yield a function that perturbs a group of the parameters by a strength; each call replaces the previous one.

        The parameters are restored bit for bit at the end. At ZeRO 3 this rank's shards are perturbed.
        """
        module = self._models.policy.module
        parameters = list(module.parameters())
        vocabulary = module.config.get_text_config().vocab_size
        chosen = group_members(group, groups, len(parameters))
        rank = self._ranks.rank if self._zero_stage == 3 else 0
        perturbation = Perturbation(parameters, chosen, vocabulary, rank)

        def perturb(strength: float) -> None:
            perturbation.apply(strength)
            drop_gathered(parameters, self._zero_stage)

        try:
            yield perturb
        finally:  # the parameters may have new storage: the learner may have been offloaded since
            perturbation.undo()
            drop_gathered(parameters, self._zero_stage)

    def offload(self) -> None:
        self._models.offload()

    def reload(self) -> None:
        self._models.reload()

    def drop_cache(self) -> None:
        """Release the GPU memory that torch caches for the next step's activations."""
        if self._models.device.type == "cuda":
            torch.cuda.empty_cache()

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return the mean of each of `values` over the ranks. A collective."""
        return [value / self._ranks.count for value in self._ranks.all_sum(values)]

    def barrier(self) -> None:
        self._ranks.barrier()

    def gathered(self, ours: Bucket | None) -> list[Bucket | None]:
        return self._ranks.gathered(ours)

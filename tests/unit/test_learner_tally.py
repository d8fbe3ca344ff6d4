"""The ranks' sums, counts, maxima and minima, by hand."""

from __future__ import annotations

import numpy as np

from grpo.learner.tally import Tally, merge


def test_ranks_are_merged() -> None:
    first, second = Tally(), Tally()
    for tally, loss, largest, smallest in ((first, 1.5, 2.0, 0.5), (second, 2.0, 3.0, 0.25)):
        tally.add("policy/loss", loss, 0)
        tally.add("policy/entropy", 10 * loss, 4)
        for value in (largest, 1.0):
            tally.maximum("weight/max", value)
        for value in (1.0, smallest):
            tally.minimum("weight/min", value)
    second.minimum("other/min", -1.0)
    first.learner_logprob_sums, second.learner_logprob_sums = {0: -1.0}, {1: -2.0}
    first.kl_ref.add(0.5, 2)
    for tally, square in ((first, 0.25), (second, 1.0)):
        tally.mismatch_square.add(square, 4)
    first.mismatch_counts[1], second.mismatch_counts[1] = 3, 4
    result = merge([first, second], 7)
    assert result.optimizer_steps == 7
    assert result.metrics == {"policy/loss": (3.5, 0), "policy/entropy": (35.0, 8)}
    assert result.maxima == {"weight/max": 3.0}
    assert result.minima == {"weight/min": 0.25, "other/min": -1.0}
    assert (result.kl_ref.value, result.mismatch_square.value) == (0.25, 1.25 / 8)
    assert result.learner_logprob_sums == {0: -1.0, 1: -2.0}
    assert result.mismatch_counts[1] == np.sum(result.mismatch_counts) == 7
    assert first.sums["policy/loss"] == [1.5, 0]  # what is merged stays as it was

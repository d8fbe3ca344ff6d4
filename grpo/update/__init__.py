"""One learner rank's arithmetic in a step: pure torch that calls a `StepEngine`. DeepSpeed stays in `grpo.learner`.

Losses are dot products with `token_weights`: nothing here divides by a batch size.

    prepare   old and reference logprobs, values -> token-level advantages, whitened over the step
    step      microbatches -> backward, optimizer steps, metric sums
"""

from grpo.update.engine import Model, StepEngine
from grpo.update.prepare import Prepared
from grpo.update.step import run_step
from grpo.update.tally import Tally

__all__ = ["Model", "Prepared", "StepEngine", "Tally", "run_step"]

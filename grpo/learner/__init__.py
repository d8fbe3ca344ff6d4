"""Batches to weights: one rank's arithmetic, the models and their heads. `zero/` has DeepSpeed.

Losses are dot products with `token_weights`: nothing here divides by a batch size.

    protocol  the interface of a step to the models and their optimizers
    tokens    the trained tokens of a microbatch, on one axis
    prepare   old and reference logprobs, values -> token-level advantages, whitened over the step
    step      microbatches -> backward, optimizer steps, metric sums
"""

__all__ = ["paper", "replay", "zero"]

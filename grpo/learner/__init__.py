"""Batches to weights: one rank's arithmetic, the models and their heads. `zero/` has DeepSpeed.

Losses are dot products with `token_weights`: nothing here divides by a batch size.

    protocol  the interface of a step to the models and their optimizers
    prepare   the trained tokens of a microbatch; old and reference logprobs, values -> advantages of tokens
    step      microbatches -> backward, optimizer steps, metric sums
"""

__all__ = ["paper", "replay", "zero"]

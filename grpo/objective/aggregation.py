"""Token weights: the aggregation and the denominator of a whole optimizer step, made once when the step is batched."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.objective.legal import Aggregation


def aggregation_weights(
    lengths: Sequence[int], prompts: Sequence[int], *, aggregation: Aggregation, constant_length: int
) -> list[float]:
    """Weight of each token of each row; the loss is the dot product of these with the token losses.

    token_mean       1 / (tokens of the step)                      DAPO, arXiv 2503.14476 eq. 8
    sequence_mean    1 / (rows * tokens of the row)                GRPO, arXiv 2402.03300 eq. 3
    sequence_sum     1 / rows                                      mean over rows of the sum over tokens
    constant_length  1 / (rows * constant_length)                  Dr.GRPO, arXiv 2503.20783 eq. 4
    prompt_mean      1 / (prompts * tokens of the row's prompt)    every prompt counts the same

    The weights of token_mean, sequence_mean and prompt_mean add up to 1 over the step. Only rows that are trained on
    are given, so rows, tokens and prompts are those that are left.

    Args:
        lengths: [R] trained tokens of each row of the optimizer step, over all ranks and microbatches; at least 1.
        prompts: [R] which prompt each row belongs to.
        constant_length: for that aggregation only.
    """
    rows = len(lengths)
    match aggregation:
        case "token_mean":
            return [1.0 / sum(lengths)] * rows
        case "sequence_mean":
            return [1.0 / (rows * length) for length in lengths]
        case "sequence_sum":
            return [1.0 / rows] * rows
        case "constant_length":
            return [1.0 / (rows * constant_length)] * rows
        case "prompt_mean":
            tokens: dict[int, int] = {}
            for prompt, length in zip(prompts, lengths, strict=True):
                tokens[prompt] = tokens.get(prompt, 0) + length
            return [1.0 / (len(tokens) * tokens[prompt]) for prompt in prompts]

"""Token weights: the aggregation and its denominator over a whole optimizer step, computed when the step is batched."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.objective.compatibility import Aggregation


def aggregation_weights(
    lengths: Sequence[int], prompts: Sequence[int], *, aggregation: Aggregation, constant_length: int
) -> list[float]:
    """Return the weight of the tokens of each row. The loss is the dot product of token weights and token losses.

    token_mean       1 / (tokens of the step)                      DAPO, arXiv 2503.14476 eq. 8
    sequence_mean    1 / (rows * tokens of the row)                GRPO, arXiv 2402.03300 eq. 3
    sequence_sum     1 / rows                                      mean over rows of the sum over tokens
    constant_length  1 / (rows * constant_length)                  Dr.GRPO, arXiv 2503.20783 eq. 4
    prompt_mean      1 / (prompts * tokens of the row's prompt)    every prompt counts the same

    The weights of token_mean, sequence_mean and prompt_mean add up to 1 over the step. Rows, tokens and prompts are
    counted over the given rows, which are only those that are trained on.

    Args:
        lengths: [R] trained tokens of each row of the optimizer step, over all ranks and microbatches; at least 1.
        prompts: [R] index of each row's prompt.
        constant_length: used by the aggregation of that name only.
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

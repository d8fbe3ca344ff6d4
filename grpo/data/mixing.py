"""Interleave several data sets in exact proportion to their weights.

Set i has the share p_i = weight / sum of the weights. Draw n goes to one of the sets that have had fewer than n p_i
draws: the one whose next draw is due first, where the m-th draw of a set is due at m / p_i. After every n, each set
then has n p_i draws, to within one. (Choosing the set that is furthest behind is simpler, but with many sets of unequal
weights some fall short by more than one.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import TypedDict, final

from grpo.config import DataConfig
from grpo.data.order import Cursor, CursorState
from grpo.types import Prompt, UserError


@final
class MixedState(TypedDict):
    """State of a `MixedCursor`, as plain JSON."""

    weights: list[float]
    drawn: list[int]
    sets: dict[str, CursorState]


class MixedCursor:
    """Endless stream of the indices of several concatenated data sets, interleaved by their weights.

    Each set has its own `Cursor`. When a set has no more prompts for a draw, because the rest of them are retired, its
    turns go to the other sets by the same rule.
    """

    def __init__(self, sizes: Mapping[str, int], weights: Sequence[float], *, seed: int) -> None:
        self.names = list(sizes)
        self.weights = list(weights)
        # data.seed is below 2**32, so the seeds of the sets differ and their orders are independent
        self._cursors = [Cursor(size, seed=seed + (i << 32)) for i, size in enumerate(sizes.values())]
        self._shares = whole_numbers(weights)
        self._drawn = [0 for _ in sizes]
        self._starts = [0, *itertools.accumulate(sizes.values())][:-1]

    @property
    def epochs(self) -> float:
        """Number of passes over the data: prompts drawn / prompts."""
        sizes = [cursor.size for cursor in self._cursors]
        return sum(c.epochs * size for c, size in zip(self._cursors, sizes, strict=True)) / sum(sizes)

    @property
    def epochs_by_set(self) -> dict[str, float]:
        """Number of passes over each data set, by its name."""
        return {name: cursor.epochs for name, cursor in zip(self.names, self._cursors, strict=True)}

    def draw(self, count: int, retired: Collection[int]) -> list[int]:
        """Return the next `count` indices, all different, none of `retired`."""
        out: list[set[int]] = [
            {i - start for i in retired if start <= i < start + cursor.size}
            for start, cursor in zip(self._starts, self._cursors, strict=True)
        ]
        left = [cursor.size - len(gone) for cursor, gone in zip(self._cursors, out, strict=True)]
        if count > sum(left):
            raise ValueError(f"cannot draw {count} different prompts out of {sum(left)}")
        turns = []
        for _ in range(count):
            turn = self._whose_turn([i for i, free in enumerate(left) if free])
            turns.append(turn)
            left[turn] -= 1
            self._drawn[turn] += 1
        queues = [
            iter([start + index for index in cursor.draw(turns.count(i), gone)])
            for i, (start, cursor, gone) in enumerate(zip(self._starts, self._cursors, out, strict=True))
        ]
        return [next(queues[turn]) for turn in turns]

    def _whose_turn(self, able: Sequence[int]) -> int:
        n, total = sum(self._drawn) + 1, sum(self._shares)

        def due(i: int) -> tuple[bool, Fraction, int]:
            ahead = self._drawn[i] * total >= n * self._shares[i]
            return ahead, Fraction(self._drawn[i] + 1, self._shares[i]), i

        return min(able, key=due)

    def state(self) -> MixedState:
        """Return the state that `restore` needs."""
        return {
            "weights": self.weights,
            "drawn": list(self._drawn),
            "sets": {name: cursor.state() for name, cursor in zip(self.names, self._cursors, strict=True)},
        }

    @classmethod
    def restore(cls, sizes: Mapping[str, int], state: MixedState) -> MixedCursor:
        """Return a cursor that continues the stream from `state`.

        Raises UserError when the data sets differ.
        """
        if list(state["sets"]) != list(sizes):
            raise UserError(
                f"data.train has the data sets {', '.join(sizes)} now and had {', '.join(state['sets'])} when the run "
                "was saved; resume with the same data"
            )
        cursor = cls(sizes, state["weights"], seed=0)
        cursor._cursors = [Cursor.restore(sizes[name], of_set) for name, of_set in state["sets"].items()]
        cursor._drawn = list(state["drawn"])
        return cursor


def start_cursor(prompts: Sequence[Prompt], data: DataConfig) -> Cursor | MixedCursor:
    """Return a cursor at the start of the order in which `prompts` are drawn."""
    weights = [dataset.weight for dataset in data.train if dataset.weight is not None]
    if not weights:
        return Cursor(len(prompts), seed=data.seed)
    return MixedCursor(sizes_of(prompts), weights, seed=data.seed)


def restore_cursor(prompts: Sequence[Prompt], state: CursorState | MixedState) -> Cursor | MixedCursor:
    """Return a cursor that continues from `state`."""
    if "sets" in state:
        return MixedCursor.restore(sizes_of(prompts), state)
    return Cursor.restore(len(prompts), state)


def sizes_of(prompts: Sequence[Prompt]) -> dict[str, int]:
    """Return data set -> number of its prompts, in the order of the prompts."""
    return {name: len(list(group)) for name, group in itertools.groupby(prompts, key=lambda prompt: prompt.dataset)}


def whole_numbers(weights: Sequence[float]) -> list[int]:
    """Return integers in the exact proportions of the decimal notation of `weights`, so that turns are exact."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = math.lcm(*(weight.denominator for weight in exact))
    return [int(weight * scale) for weight in exact]


def most_in_one_draw(weights: Sequence[float], count: int, *, any_start: bool) -> list[int]:
    """Return the largest number of prompts of each set that one draw of `count` may need.

    `any_start`: earlier draws may have any size, so this one may start anywhere; else every draw is of `count`.
    """
    shares = whole_numbers(weights)
    total = sum(shares)
    step = 1 if any_start else count
    # between floor(n p) and ceil((n + count) p); n p lies at multiples of gcd / total above a whole number
    return [-(-(count * share + total - math.gcd(step * share, total)) // total) for share in shares]

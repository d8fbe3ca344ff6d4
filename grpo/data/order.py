"""Order of prompts and seeds of completions: pure functions of a few integers and names."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import TypedDict, final

import numpy as np

from grpo.config import DataConfig
from grpo.types import Prompt, UserError


@final
class CursorState(TypedDict):
    """State of a `Cursor`, as plain JSON."""

    size: int
    seed: int
    epoch: int
    position: int
    deferred: list[int]
    """Indices that the next draws give first, out of the order of the permutation."""


class Cursor:
    """Endless shuffled stream of the indices 0..size-1, resumable at any point.

    Epoch e visits every index once, in the order of a permutation that depends on (seed, e) alone. A `take` may span
    two epochs. An index that it already got from the old epoch is then deferred to the next `take`, so that no step has
    the same prompt twice. Deferred indices are part of the state. Nothing else in the past affects the stream.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        if size < 1:
            raise ValueError(f"a cursor needs at least one prompt, not {size}")
        if seed < 0:
            raise UserError(f"data.seed must not be negative, not {seed}")
        self.size = size
        self.seed = seed
        self.epoch = 0
        """Epoch of the last index that was yielded."""
        self._rest = self._permutation(0)  # indices of this epoch not yet yielded, in order
        self._deferred = 0  # number of deferred indices at the front of _rest, out of permutation order

    @property
    def position(self) -> int:
        """Number of indices of this epoch that have been yielded."""
        return self.size - len(self._rest)

    @property
    def epochs_by_set(self) -> dict[str, float]:
        """Empty: all prompts form one pool."""
        return {}

    @property
    def epochs(self) -> float:
        """Number of passes over the data."""
        return self.epoch + self.position / self.size

    def draw(self, count: int, retired: Collection[int]) -> list[int]:
        """Return the next `count` indices, all different, none of `retired`."""
        if not retired:
            return self.take(count)
        if count > self.size - len(retired):
            raise ValueError(f"cannot draw {count} different prompts out of {self.size - len(retired)}")
        drawn: list[int] = []
        while len(drawn) < count:
            [index] = self.take(1)
            if index not in retired and index not in drawn:
                drawn.append(index)
        return drawn

    def take(self, n: int) -> list[int]:
        """Return the next `n` indices, all different."""
        if not 0 <= n <= self.size:
            raise ValueError(f"cannot take {n} different prompts out of {self.size}")
        taken, self._rest = self._rest[:n], self._rest[n:]
        self._deferred = max(0, self._deferred - n)
        missing = n - len(taken)
        if missing:
            self.epoch += 1
            order, old = self._permutation(self.epoch), set(taken)
            fresh: list[int] = []
            put_off: list[int] = []
            for index in order:
                if len(fresh) == missing:
                    break
                (put_off if index in old else fresh).append(index)
            self._rest = put_off + order[missing + len(put_off) :]
            self._deferred = len(put_off)
            taken += fresh
        return taken

    def state(self) -> CursorState:
        """Return the state that `restore` needs."""
        return {
            "size": self.size,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "deferred": self._rest[: self._deferred],
        }

    @classmethod
    def restore(cls, size: int, state: CursorState) -> Cursor:
        """Return a cursor that continues the stream from `state`.

        Raises UserError when the data set no longer has the size recorded in `state`.
        """
        if state["size"] != size:
            raise UserError(
                f"data.train gives {size} prompts now and gave {state['size']} when the run was saved; "
                "resume with the same data"
            )
        cursor = cls(size, seed=state["seed"])
        cursor.epoch = state["epoch"]
        deferred = list(state["deferred"])
        order = cursor._permutation(cursor.epoch)
        cursor._rest = deferred + order[state["position"] + len(deferred) :]
        cursor._deferred = len(deferred)
        return cursor

    def _permutation(self, epoch: int) -> list[int]:
        generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, epoch])))
        order: list[int] = generator.permutation(self.size).tolist()
        return order


@final
class MixedState(TypedDict):
    """State of a `MixedCursor`, as plain JSON."""

    weights: list[float]
    drawn: list[int]
    sets: dict[str, CursorState]


class MixedCursor:
    """Endless stream of the indices of several concatenated data sets, interleaved in exact proportion to the weights.

    Set i has the share p_i = weight / sum of the weights. Draw n goes to one of the sets that have had fewer than n p_i
    draws: the one whose next draw is due first, where the m-th draw of a set is due at m / p_i. After every n, each set
    then has n p_i draws, to within one. (Choosing the set that is furthest behind is simpler, but with many sets of
    unequal weights some fall short by more than one.)

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


def sample_seed(run_seed: int, step: int, prompt_id: str, sample_index: int, attempt: int = 0) -> int:
    """Return the seed of one completion, in [0, 2**63): it fits a signed 64-bit field, and it is never a negative
    special value.

    It is a hash of the arguments, so it does not depend on order, batch or the number of samplers.
    """
    fields = json.dumps([run_seed, step, prompt_id, sample_index, attempt])
    digest = hashlib.blake2b(fields.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

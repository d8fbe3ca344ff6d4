"""The order of prompts and the seeds of completions: pure functions of a few integers and names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from grpo.types import UserError


class Cursor:
    """Endless shuffled stream of the indices 0..size-1, resumable at any point.

    Epoch e visits every index once, in the order of a permutation that depends on (seed, e) alone. A `take` may
    straddle two epochs; an index that it already got from the old epoch is then put off to the next `take`, so that
    no step holds the same prompt twice. Indices put off this way are part of the state: nothing else about the past
    matters to the stream.
    """

    def __init__(self, size: int, *, seed: int) -> None:
        if size < 1:
            raise ValueError(f"a cursor needs at least one prompt, not {size}")
        if seed < 0:
            raise UserError(f"data.seed must not be negative, not {seed}")
        self.size = size
        self.seed = seed
        self.epoch = 0
        """Epoch of the index that was yielded last."""
        self._rest = self._permutation(0)  # what this epoch has still to yield, in order
        self._deferred = 0  # how many at the front of _rest were put off and stand out of the permutation's order

    @property
    def position(self) -> int:
        """How many indices of this epoch have been yielded."""
        return self.size - len(self._rest)

    @property
    def epochs_by_set(self) -> dict[str, float]:
        """Nothing: all prompts are one pool."""
        return {}

    @property
    def epochs(self) -> float:
        """How often the data have been gone through."""
        return self.epoch + self.position / self.size

    def draw(self, count: int, retired: Collection[int]) -> list[int]:
        """The next `count` indices, all different, none of `retired`."""
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
        """The next `n` indices, all different."""
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

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as plain JSON: four integers, and the list of indices that were put off."""
        return {
            "size": self.size,
            "seed": self.seed,
            "epoch": self.epoch,
            "position": self.position,
            "deferred": self._rest[: self._deferred],
        }

    @classmethod
    def restore(cls, size: int, state: Mapping[str, Any]) -> Cursor:
        """The cursor that continues the stream where `state` was taken.

        Raises UserError when the data set no longer has the size that the state was taken with.
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


def sample_seed(run_seed: int, step: int, prompt_id: str, sample_index: int, attempt: int = 0) -> int:
    """Seed of one completion, in [0, 2**63): what a signed 64-bit field takes, and never a negative special value.

    A hash of who is sampled, so it does not depend on order, batch or the number of samplers.
    """
    fields = json.dumps([run_seed, step, prompt_id, sample_index, attempt])
    digest = hashlib.blake2b(fields.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

"""Order of prompts and seeds of completions: pure functions of a few integers and names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from typing import TypedDict, final

import numpy as np

from grpo.types import UserError


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


def sample_seed(run_seed: int, step: int, prompt_id: str, sample_index: int, attempt: int = 0) -> int:
    """Return the seed of one completion, in [0, 2**63): it fits a signed 64-bit field, and it is never a negative
    special value.

    It is a hash of the arguments, so it does not depend on order, batch or the number of samplers.
    """
    fields = json.dumps([run_seed, step, prompt_id, sample_index, attempt])
    digest = hashlib.blake2b(fields.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1

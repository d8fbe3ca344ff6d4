"""What is declared beside a field of `grpo.config.schema`, as `Annotated[type, ...]`.

    lr: Annotated[float, Bound(ge=0)] = 1e-6
    betas: Annotated[tuple[float, float], Bound(ge=0, lt=1), OnlyWith("name", "adamw")] = (0.9, 0.999)
    path: Annotated[str, OnResume.CONTENT, OnSubmit.SHARED_OR_HUB] = MISSING

A mark beside a section holds for all its options. An option's own OnResume or OnSubmit takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The range of a number, or of each number of a list. None is always valid."""

    ge: float | None = None
    """The value is greater than or equal to this."""
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    why: str = ""
    """Reason, for the error message."""

    def holds(self, value: float) -> bool:
        """Return whether `value` is in the range."""
        return (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    @property
    def words(self) -> str:
        """Return the range in words, such as "at least 1"."""
        if self.ge is not None and self.le is not None:
            return f"between {self.ge} and {self.le}"
        limits = {"at least": self.ge, "above": self.gt, "at most": self.le, "below": self.lt}
        return " and ".join(f"{word} {limit}" for word, limit in limits.items() if limit is not None)

    def refusal(self, name: str, value: float) -> str:
        """Return the error message for a value that is out of the range."""
        verb = "must lie" if self.words.startswith("between") else "must be"
        rule = "must not be negative" if self.words == "at least 0" else f"{verb} {self.words}"
        return f"{name} {rule}, not {value}{self.why and f': {self.why}'}"


class OnlyWith:
    """The option has an effect only if another option has one of `values`; without `values`: if it is set, which null,
    false, 0 and an empty list are not."""

    def __init__(self, option: str, *values: str | int | bool, reason: str = "") -> None:
        """`option`: the other option; a name without a dot is in the same section. `reason`: what to say instead of the
        other option's value, if that is not clear by itself."""
        self.option, self.values, self.reason = option, values, reason

    def other(self, name: str) -> str:
        """Return the full name of the other option; `name` is the full name of the option with this mark."""
        return self.option if "." in self.option else f"{name.rpartition('.')[0]}.{self.option}"

    @property
    def words(self) -> str:
        """Return the values as text, such as "ppo_clip, gspo or cispo"."""
        *others, last = (str(value).lower() if isinstance(value, bool) else str(value) for value in self.values)
        return f"{', '.join(others)} or {last}" if others else last

    def condition(self, name: str) -> str:
        """Return when the option `name` has an effect, such as "algorithm.loss=ppo_clip or gspo"."""
        return self.other(name) + (f"={self.words}" if self.values else "")


class OnResume(Enum):
    """How a resumed run may differ from its checkpoint. An option without a mark is SAME."""

    SAME = "must have the value of the checkpoint, unless allow= names it"
    FREE = "may change"
    CONTENT = "may change; the content that it selects must be that of the checkpoint, unless allow= names it"
    ROUNDING = "may change; the run is equal up to the order of additions, not bit for bit"


class OnSubmit(Enum):
    """What `grpo submit` does with an option. An option without a mark is part of the submitted recipe as it is."""

    OWN_CLUSTER = "must be left out: the run joins the cluster of --address"
    SHARED_OR_HUB = "must be a hub id, or an absolute path that all nodes share"
    SHARED = "must be an absolute path that all nodes share"
    PACKED = "the file is sent with the job"


Mark = Bound | OnlyWith | OnResume | OnSubmit

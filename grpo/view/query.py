"""The parameters of an endpoint, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from grpo.suggest import suggest
from grpo.types import UserError

MAX_LIMIT = 1000
"""Maximum number of entries of a page."""
MAX_TEXT = 2000
"""Maximum characters of a parameter."""


class Query:
    """Parameters of one request. Every error is a UserError that names the parameter."""

    def __init__(self, given: Mapping[str, str], known: Sequence[str]) -> None:
        """Raises UserError for a parameter that is not in `known`, or is too long."""
        for name, value in given.items():
            if name not in known:
                have = f"; it has {', '.join(known)}" if known else "; it has none"
                raise UserError(f"there is no parameter {name[:80]!r}{suggest(name[:80], known) or have}")
            if len(value) > MAX_TEXT:
                raise UserError(f"{name}: it has {len(value)} characters; at most {MAX_TEXT} are allowed")
        self._given = given

    def text(self, name: str, default: str = "") -> str:
        """Return a parameter."""
        return self._given.get(name, default)

    def needed(self, name: str) -> str:
        """Return a parameter. Raises UserError if it is absent or empty."""
        value = self._given.get(name, "")
        if not value:
            raise UserError(f"{name}= is missing")
        return value

    def whole(self, name: str, default: int, high: int = 2**31) -> int:
        """Return a parameter that is a whole number from 0 to `high`."""
        return whole(name, self._given.get(name, str(default)), high)

    def page(self, limit: int) -> tuple[int, int]:
        """Return `offset` and `limit`; `limit` is the default."""
        return self.whole("offset", 0), self.whole("limit", limit, MAX_LIMIT)

    def choice(self, name: str, choices: Sequence[str], default: str) -> str:
        """Return a parameter that is one of `choices`."""
        value = self._given.get(name) or default
        if value not in choices:
            raise UserError(f"{name}={value[:80]}: it must be {', '.join(choices)}{suggest(value[:80], choices)}")
        return value


def whole(name: str, value: str, high: int = 2**31) -> int:
    """Return `value` as a whole number from 0 to `high`. Raises UserError otherwise."""
    if not (value.isascii() and value.isdigit()) or len(value) > 10 or int(value) > high:
        raise UserError(f"{name}={value[:80]}: it must be a whole number from 0 to {high}")
    return int(value)

"""Rewards from a service over HTTP.

Each completion is a POST of {"completion": text, "row": {column: value, ...}} to REWARD_URL; the answer is
{"reward": number}, or null to abstain. In the recipe, with as many requests at once per reward worker as
REWARD_CONCURRENCY says:

    rewards:
      - file: reward_fns/remote.py
        style: trl            # a whole group at a time
        timeout_s: 120        # deadline of a group, tries and waits included; the worker is killed when it passes
        env: [REWARD_TOKEN]   # only if the service asks for one: sent as a bearer token

A request that fails to connect, takes longer than REWARD_TIMEOUT_S (10) or is answered by 429, 502, 503 or 504 is
tried again up to REWARD_RETRIES (3) times: at once, after 0.5 s, after 1 s, or when the answer's Retry-After says, but
no later than after REWARD_TIMEOUT_S. What fails for good fails that completion alone, as does any other answer, one of
more than 1 MiB, and one that has begun and is not there whole after REWARD_TIMEOUT_S. Headers that come in drips are
waited for as long as each drip is in time, until `timeout_s`.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import urllib3

TRIED_AGAIN = (429, 502, 503, 504)
LONGEST = 1 << 20
"""Bytes of an answer."""


def remote(completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | Exception | None]:
    """What the service says of each completion; an exception in the place of what it could not judge.

    Raises KeyError without REWARD_URL.
    """
    url, concurrency = os.environ["REWARD_URL"], int(os.environ.get("REWARD_CONCURRENCY", "16"))
    columns.pop("prompts", None)
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(completions))]
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    with ThreadPoolExecutor(concurrency) as threads:
        return list(threads.map(functools.partial(_ask, _client(concurrency), url), texts, rows))


@functools.cache
def _client(concurrency: int) -> urllib3.PoolManager:
    """One for all calls of this process, which keeps its connections open."""
    tries = _Retry(
        total=int(os.environ.get("REWARD_RETRIES", "3")), backoff_factor=0.25, status_forcelist=TRIED_AGAIN,
        allowed_methods=None, redirect=False,
    )  # fmt: skip
    timeout = urllib3.Timeout(total=_timeout_s())
    return urllib3.PoolManager(maxsize=concurrency, block=True, retries=tries, timeout=timeout)


def _timeout_s() -> float:
    return float(os.environ.get("REWARD_TIMEOUT_S", "10"))


class _Retry(urllib3.Retry):
    def get_retry_after(self, response: Any) -> float | None:
        """Seconds, but not so many that the group's deadline passes for the sake of one completion."""
        try:
            after = super().get_retry_after(response)
        except urllib3.exceptions.InvalidHeader:  # neither a number nor a date
            return None
        return None if after is None else min(after, _timeout_s())


def _ask(client: urllib3.PoolManager, url: str, completion: str, row: Mapping[str, Any]) -> float | Exception | None:
    """The verdict on one completion, or why there is none."""
    token = os.environ.get("REWARD_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        answer = client.request(
            "POST", url, json={"completion": completion, "row": row}, headers=headers, preload_content=False
        )
        body = _body(answer, url)
        if answer.status != 200:
            raise ValueError(f"{url} answered {answer.status}: {body[:100]!r}")
        reward = json.loads(body)["reward"]
        if reward is not None and (isinstance(reward, bool) or not isinstance(reward, int | float)):
            raise ValueError(f"{url} answered a reward that is no number: {reward!r:.80}")
    except (urllib3.exceptions.HTTPError, ValueError, LookupError, TypeError, RecursionError) as error:
        return error
    return reward


def _body(answer: Any, url: str) -> bytes:
    """What has been answered: urllib3's timeout is that of each packet, which an answer in drips never passes.

    Raises ValueError for an answer that is too slow or too long.
    """
    body, deadline = b"", time.monotonic() + _timeout_s()
    try:
        while part := answer.read1(1 << 16):
            body += part
            if len(body) > LONGEST or time.monotonic() > deadline:
                raise ValueError(f"{url} answered {len(body)} bytes in {_timeout_s():g} s and was not at its end")
    finally:  # a connection that is not at its end is of no more use, but its place is
        answer.close()
        answer.release_conn()
    return body
